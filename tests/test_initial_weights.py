"""Weights from files give the bits of a model that was built with them. Each worker reads only its own ranges."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import manyhands as mh
from manyhands.checkpoint.weight_files import WeightFiles
from manyhands.models.building import UNWRITTEN_BYTES, Unwritten
from support.models import conv_recipe, gpt_recipe
from support.real_models import RECIPES
from support.threads import run_threads
from support.training import train_with_engine

SHARDINGS = ("ddp", "zero1", "zero2", "zero3")
OFFLOADS = ("none", "disk")
STEPS = 2


def trained(recipe: mh.Recipe, workers: int = 1, **strategy: Any) -> str:
    """Train some steps and return the digest, which is the same on all workers."""
    found = run_threads(
        workers, lambda group: train_with_engine(recipe, mh.Strategy(**strategy), steps=STEPS, group=group)
    )
    assert len({(outcome.digest, outcome.losses) for outcome in found}) == 1
    return found[0].digest


def built(recipe: mh.Recipe, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return recipe.model()


# - The same bits


class Pretrained:
    """A folder that transformers wrote, and the digest of training from it in the usual way."""

    def __init__(self, name: str, precision: str, folder: Path, **options: Any) -> None:
        pytest.importorskip("transformers")
        self.recipe, self.folder = RECIPES[name](precision), folder
        model: Any = built(self.recipe, 11)
        if "dtype" in options:
            model = model.to(options.pop("dtype"))
        model.save_pretrained(folder, **options)
        self.digest = trained(replace(self.recipe, model=lambda: from_pretrained(folder)))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A folder with one file, in fp32."""
    found = Pretrained("gpt2", "bf16", tmp_path_factory.mktemp("gpt2"))
    assert (found.folder / "model.safetensors").is_file()
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A folder with several files and their index, in bf16."""
    found = Pretrained("llama", "fp32", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(found.folder.glob("model-*-of-*.safetensors"))) > 2
    return found


def from_pretrained(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


PLACES = [
    pytest.param(sharding, offload, workers, marks=[] if (index + workers) % 3 == 0 else pytest.mark.slow)
    for index, (sharding, offload) in enumerate((sharding, offload) for offload in OFFLOADS for sharding in SHARDINGS)
    for workers in (1, 2, 3)
]


@pytest.mark.parametrize(("sharding", "offload", "workers"), PLACES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_folder_of_transformers_gives_the_bits_of_from_pretrained(
    name: str, sharding: str, offload: str, workers: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    files = request.getfixturevalue(name)
    recipe = replace(files.recipe, weights=files.folder)
    assert trained(recipe, workers, sharding=sharding, offload=offload, scratch=str(tmp_path)) == files.digest


class Everything(nn.Module):
    """A model with large, small, trainable, frozen and tied parameters, and buffers both in and not in the files."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2100, 500)
        self.blocks = nn.ModuleList(nn.Linear(500, 200) for _ in range(2))
        self.still = nn.ModuleList(nn.Linear(500, 200, dtype=torch.bfloat16) for _ in range(2)).requires_grad_(False)
        self.stiller = nn.ModuleList([nn.Linear(500, 2100)]).requires_grad_(False)
        self.norm = nn.BatchNorm1d(500)
        self.table.weight.data.normal_(0, 0.02)
        nn.init.trunc_normal_(self.stiller[0].weight, std=0.02)
        self.head = nn.Linear(500, 2100, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.empty(2100, 500).fill_(0.5).triu_(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for still in self.still:
            x = torch.tanh(x + nn.functional.pad(still(x.bfloat16()).to(x.dtype), (0, 300)))
        x = torch.tanh(x + (self.stiller[0](x) * self.mask[:, -1].to(x.dtype))[..., :500])
        for block in self.blocks:
            x = torch.tanh(x + nn.functional.pad(block(x), (0, 300)))
        x = self.norm(x.float().flatten(0, 1)).view(x.shape).to(x.dtype)
        return self.head(x).float()


def everything(precision: str, model: Callable[[], nn.Module] = Everything) -> mh.Recipe:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return mh.Recipe(
        model=model,
        loss=loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=[torch.arange(5) * (index + 3) % 2100 for index in range(16)],
        batch=mh.Batch(global_size=6, micro_size=2),
        precision=precision,
    )


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the weights of `Everything`: parameters in fp16, buffers in their own types."""
    model = built(everything("fp32"), 13)
    model.norm.running_mean.fill_(0.25)  # type: ignore[operator, union-attr]
    params = {name: param.detach().half() for name, param in model.named_parameters()}
    file = tmp_path_factory.mktemp("everything") / "halves.safetensors"
    save_file(params | dict(model.norm.named_buffers(prefix="norm")), file)  # type: ignore[operator]
    return file


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_frozen_parameters_and_buffers_come_from_files_too(precision: str, halves: Path, tmp_path: Path) -> None:
    def with_weights() -> nn.Module:
        model = Everything()
        model.load_state_dict(load_file(halves), strict=False)
        return model

    def state(recipe: mh.Recipe, strategy: mh.Strategy, group: Any = None) -> tuple[Any, ...]:
        with mh.Engine(recipe, strategy, group) as engine:
            before = engine.full_state_dict()
            engine.step(next(engine.batches()))
            return before, engine.facts(), engine.digest()

    expected = state(everything(precision, with_weights), mh.Strategy())
    recipe = replace(everything(precision), weights=halves)
    for workers, sharding, offload in ((1, "ddp", "none"), (2, "zero3", "disk"), (3, "zero2", "none")):
        strategy = mh.Strategy(sharding=sharding, offload=offload, scratch=str(tmp_path))
        for before, *rest in run_threads(workers, lambda group, strategy=strategy: state(recipe, strategy, group)):
            assert rest == list(expected[1:])
            for key, value in expected[0].items():
                assert torch.equal(before[key], value), key


def test_a_run_resumes_even_if_the_weight_files_have_changed(halves: Path, tmp_path: Path) -> None:
    recipe = replace(everything("fp32"), weights=halves)
    expected = mh.train(recipe, steps=2, show=False).digest
    mh.train(recipe, steps=1, run_dir=tmp_path / "run", show=False)
    tensors = load_file(halves)
    save_file(tensors | {"table.weight": tensors["table.weight"] * 2}, tmp_path / "other")
    other = replace(recipe, weights=tmp_path / "other")
    assert mh.train(other, steps=2, run_dir=tmp_path / "run", show=False).digest == expected
    save_file(tensors | {"still.0.weight": tensors["still.0.weight"] * 2}, tmp_path / "frozen")
    with pytest.raises(mh.CheckpointError, match=r"frozen parameter still\.0\.weight differs"):
        mh.train(replace(recipe, weights=tmp_path / "frozen"), steps=3, run_dir=tmp_path / "run", show=False)


def test_a_resumed_run_reads_only_frozen_parameters_from_weight_files(halves: Path, tmp_path: Path) -> None:
    """The files of a model without frozen parameters may have been deleted."""
    model = nn.Linear(5, 5)
    save_file(dict(model.state_dict()), tmp_path / "weights")
    recipe = mh.Recipe(
        model=lambda: nn.Linear(5, 5),
        weights=tmp_path / "weights",
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=[torch.arange(5.0) + index for index in range(8)],
        batch=mh.Batch(global_size=4, micro_size=2),
    )
    expected = mh.train(recipe, steps=2, show=False).digest
    mh.train(recipe, steps=1, run_dir=tmp_path / "run", show=False)
    (tmp_path / "weights").unlink()
    assert mh.train(recipe, steps=2, run_dir=tmp_path / "run", show=False).digest == expected

    def read_bytes(group: Any) -> int:
        with mh.Engine(replace(everything("fp32"), weights=halves), group=group, resumes=True) as engine:
            for use in (lambda: engine.step(next(engine.batches())), lambda: engine.save(tmp_path)):
                with pytest.raises(mh.ConfigError, match="created with resumes=True, but no checkpoint was loaded"):
                    use()
            return engine.weights_read_bytes

    frozen = sum(value.nbytes for key, value in load_file(halves).items() if key.startswith("still"))
    for found in run_threads(2, read_bytes):
        assert frozen < found < 2.2 * frozen  # once to have them, once more for their fingerprints


# - Names


def test_an_error_names_a_prefix_that_rename_can_remove(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    recipe = RECIPES["gpt2"]("fp32")
    model: Any = built(recipe, 14)
    model.transformer.save_pretrained(tmp_path)  # without the head, which is tied
    with pytest.raises(mh.ConfigError, match="28 missing from the files, 28 not in the model") as caught:
        trained(replace(recipe, weights=tmp_path))
    assert caught.value.hint is not None
    assert 'rename = { "^" = "transformer." }' in caught.value.hint
    found = trained(replace(recipe, weights=mh.Weights(path=tmp_path, rename={"^": "transformer."})), 2)
    assert found == trained(replace(recipe, model=lambda: from_pretrained(tmp_path)))


# peft asks transformers for a property by the name that it had before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_keep_their_initial_values(llama: Pretrained) -> None:
    peft = pytest.importorskip("peft")
    plain = llama.recipe

    def adapted(base: nn.Module) -> nn.Module:
        torch.manual_seed(5)  # loading draws other numbers than building
        targets = ["q_proj", "v_proj"]
        model: nn.Module = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
        return model

    weights = mh.Weights(
        path=llama.folder,
        rename={"^": "base_model.model.", r"([qv]_proj)": r"\1.base_layer"},
        allow_missing=["*lora_*"],
    )
    expected = trained(replace(plain, model=lambda: adapted(from_pretrained(llama.folder))))
    recipe = replace(plain, model=lambda: adapted(plain.model()), weights=weights)
    assert trained(recipe, 2, sharding="zero3") == trained(recipe, 3, sharding="ddp") == expected


def test_a_large_parameter_that_files_may_lack_has_its_seeded_values(halves: Path, tmp_path: Path) -> None:
    tensors = load_file(halves)
    del tensors["table.weight"]
    save_file(tensors, tmp_path / "file")
    weights = mh.Weights(path=tmp_path / "file", allow_missing=["head.*", "blocks.0.*"])  # head: table's other name
    with (
        mh.Engine(everything("fp32")) as plain,
        mh.Engine(replace(everything("fp32"), weights=weights)) as engine,
    ):
        expected, found = plain.full_params(), engine.full_params()
    assert found["table.weight"].nbytes >= UNWRITTEN_BYTES
    assert torch.equal(found["table.weight"], expected["table.weight"])
    assert torch.equal(found["blocks.0.weight"], tensors["blocks.0.weight"].float())


# - What is wrong


def conv_files(folder: Path, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> mh.Recipe:
    """A recipe whose weights are two files and their index, after `change`."""
    tensors = dict(built(conv_recipe(), 15).state_dict())
    change(tensors)
    names = sorted(tensors)
    files = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    folder.mkdir(exist_ok=True)
    for file, held in files.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return replace(conv_recipe(), weights=folder)


def test_files_that_fit_are_loaded(tmp_path: Path) -> None:
    recipe = conv_files(tmp_path)

    def with_weights() -> nn.Module:
        return built(conv_recipe(), 15)

    assert trained(recipe, 3) == trained(replace(conv_recipe(), model=with_weights))
    assert trained(replace(recipe, weights=tmp_path / "model.safetensors.index.json")) == trained(recipe)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("head.weight"), r"1 missing from the files\n(.|\n)*head\.weight \[5, 24\]"),
    "unexpected": (lambda t: t.update({"haed.bias": t["head.bias"] + 1}), r"haed\.bias; did you mean head\.bias\?"),
    "shape": (
        lambda t: t.update({"head.weight": t["head.weight"][:4]}),
        r"head\.weight: expected float32 \[5, 24\], got float32 \[4, 24\] \(head\.weight in .*one\.safetensors\)",
    ),
    "integers": (
        lambda t: t.update({"head.bias": t["head.bias"].int()}),
        r"head\.bias: expected float32 \[5\], got int32 \[5\]",
    ),
    "8 bits": (lambda t: t.update({"head.bias": t["head.bias"].to(torch.float8_e4m3fn)}), "got float8_e4m3fn"),
    "no counter": (lambda t: t.pop("norm_1.num_batches_tracked"), r"norm_1\.num_batches_tracked \[\]"),
    "another model": (
        lambda t: ([t.pop(name) for name in list(t)], t.update({"a": torch.ones(2), "b": torch.ones(2)})),
        "14 missing from the files, 2 not in the model",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_do_not_fit_are_named(what: str, tmp_path: Path) -> None:
    change, message = CHANGES[what]
    recipe = conv_files(tmp_path, change)

    def work(group: Any) -> str:
        with pytest.raises(mh.ConfigError, match=message) as caught:
            mh.Engine(recipe, mh.Strategy(), group)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert len(set(run_threads(2, work))) == 1


def test_missing_and_extra_tensors_must_be_allowed_explicitly(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["head.weight"], tensors["head.bias"]
        tensors["extra"] = torch.ones(1)

    recipe = conv_files(tmp_path, change)
    weights = mh.Weights(path=tmp_path, allow_missing=["head.*"], ignore=["ext*"])
    assert trained(replace(recipe, weights=weights)) == trained(replace(recipe, weights=weights), 2)
    with pytest.raises(mh.ConfigError, match=r"allow_missing: 'heads\.\*' matches no tensor of the model"):
        trained(replace(recipe, weights=mh.Weights(path=tmp_path, allow_missing=["heads.*"], ignore=["*"])))
    with pytest.raises(mh.ConfigError, match="the files have none of its tensors"):
        trained(
            replace(recipe, weights=mh.Weights(path=tmp_path, rename={"^": "x"}, allow_missing=["*"], ignore=["*"]))
        )
    with pytest.raises(mh.ConfigError, match="renamed to the same name") as caught:
        trained(replace(recipe, weights=mh.Weights(path=tmp_path, rename={"bias": "weight", "_[12]": "_1"})))
    assert "norm_1.weight: norm_1.bias, norm_1.weight" in str(caught.value)


def test_a_tied_parameter_may_be_stored_twice_if_both_are_equal(tmp_path: Path) -> None:
    model = built(gpt_recipe(), 16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    recipe = replace(gpt_recipe(), weights=tmp_path)
    assert trained(recipe, 2) == trained(replace(gpt_recipe(), model=lambda: built(gpt_recipe(), 16)))
    tensors["head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(mh.ConfigError, match=r"two values for 'tokens\.weight', which is a single parameter") as caught:
        trained(recipe)
    assert "head.weight and tokens.weight differ" in str(caught.value.got)


def cut(folder: Path) -> None:
    data = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(data[:-4])


def longer(folder: Path) -> None:
    data = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(data + bytes(8))


def doubled_header(folder: Path) -> None:
    one = b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + one + b"," + one + b"}"
    (folder / "two.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1")


def rewritten(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "cut": (cut, "two.safetensors", "does not fit the file"),
    "longer": (longer, "one.safetensors", "something was added"),
    "foreign": (
        lambda f: (f / "two.safetensors").write_bytes(b"PK\3\4 and so on"),
        "two.safetensors",
        "truncated",
    ),
    "not there": (lambda f: (f / "two.safetensors").unlink(), "two.safetensors", "No such file"),
    "doubled": (doubled_header, "two.safetensors", "'x' occurs twice"),
    "in both": (lambda f: shutil.copy(f / "one.safetensors", f / "two.safetensors"), "two.safetensors", "it lacks 'n"),
    "lying": (
        lambda f: rewritten(f, lambda m: m.update({"norm_2.weight": "one.safetensors"})),
        "one.safetensors",
        r"it lacks 'norm_2.weight'",
    ),
    "elsewhere": (
        lambda f: rewritten(f, lambda m: m.update({"norm_2.weight": "../two.safetensors"})),
        "index.json",
        "not the name of a file in the same folder",
    ),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json", "has no weight_map"),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json", "Expecting"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weight_files_are_refused_and_named(what: str, tmp_path: Path) -> None:
    damage, file, message = DAMAGE[what]
    recipe = conv_files(tmp_path)
    damage(tmp_path)
    with pytest.raises(mh.CheckpointError, match="a file of the initial weights is missing or broken") as caught:
        trained(recipe, 2)
    assert (caught.value.where or "").endswith(file)
    assert message in str(caught.value.got)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    conv_files(tmp_path)
    tensors = load_file(tmp_path / "two.safetensors")
    save_file(tensors | {"head.bias": torch.ones(5)}, tmp_path / "two.safetensors")
    with pytest.raises(mh.CheckpointError, match=r"'head\.bias' is in this file, and also in one\.safetensors"):
        WeightFiles(tmp_path)


def test_missing_weights_are_reported_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    hints = {"bin": "save_pretrained", "org/name": "downloaded"}
    for name, hint in hints.items():
        with pytest.raises(mh.ConfigError, match="there are no initial weights here") as caught:
            trained(replace(conv_recipe(), weights=tmp_path / name))
        assert hint in (caught.value.hint or "")


def test_training_can_start_from_an_export(tmp_path: Path) -> None:
    digest = mh.train(gpt_recipe("bf16"), steps=1, run_dir=tmp_path / "run", show=False).digest
    mh.export(tmp_path / "run", tmp_path / "out", dtype="fp32", max_shard_size="20KB")
    with mh.Engine(replace(gpt_recipe("bf16", seed=5), weights=tmp_path / "out")) as engine:
        assert engine.digest() == digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "weights.path is not a path"),
        ({"path": 3}, "weights.path is not a path"),
        ({"path": ".", "allow_missing": "head.*"}, "weights.allow_missing is a string"),
        ({"path": ".", "rename": {"(": ""}}, r"weights.rename has an invalid pattern or replacement: missing \)"),
        ({"path": ".", "rename": {"x": r"\1"}}, "weights.rename has an invalid pattern or replacement: invalid group"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mh.ConfigError, match=message):
        mh.Weights(**options)


def test_other_types_are_refused() -> None:
    with pytest.raises(mh.ConfigError, match=r"recipe\.weights has the wrong type"):
        replace(conv_recipe(), weights=load_file)  # type: ignore[arg-type]


# - Workers


def test_workers_with_different_files_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    conv_files(folders[0])
    conv_files(folders[1], lambda tensors: tensors.update({"head.bias": tensors["head.bias"] + 1}))

    def work(group: Any) -> None:
        with pytest.raises(mh.ConfigError, match=r"don't have the same initial weights: they differ in head\.bias"):
            mh.Engine(replace(conv_recipe(), weights=folders[group.rank]), mh.Strategy(), group)

    run_threads(2, work)


def test_a_file_missing_on_one_worker_ends_all_workers(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        conv_files(folder)
    (folders[1] / "two.safetensors").unlink()

    def work(group: Any) -> str:
        with pytest.raises(mh.ManyhandsError) as caught:
            mh.Engine(replace(conv_recipe(), weights=folders[group.rank]), mh.Strategy(), group)
        return f"{type(caught.value).__name__}: {caught.value}"

    first, second = run_threads(2, work)
    assert first.startswith("WorkerError")
    assert "worker 1" in first
    assert second.startswith("CheckpointError")


@pytest.mark.parametrize(("sharding", "offload", "parts"), [("ddp", "none", 1), ("zero3", "disk", 4)])
def test_a_worker_reads_only_its_own_ranges(
    sharding: str, offload: str, parts: int, halves: Path, tmp_path: Path
) -> None:
    recipe = replace(everything("fp32"), weights=halves, batch=mh.Batch(global_size=8, micro_size=2))
    strategy = mh.Strategy(sharding=sharding, offload=offload, scratch=str(tmp_path))

    def work(group: Any) -> int:
        with mh.Engine(recipe, strategy, group) as engine:
            return engine.weights_read_bytes

    read = run_threads(4, work)
    tensors = load_file(halves)
    still = {name for name in tensors if name.startswith("still")}
    frozen = sum(tensors[name].nbytes for name in still)
    trained = sum(tensors[name].nbytes for name in tensors) - frozen
    inspected = len(tensors) * 2 * 1024  # the first elements of each, by which workers know that they have the same
    assert sum(read) == pytest.approx(4 / parts * (trained + frozen) + frozen, rel=0.02, abs=4 * inspected)
    assert (
        max(read) <= (trained + frozen) / parts + frozen + inspected
    )  # who hashes a frozen parameter reads all of it, in parts
    assert min(read) >= 0.9 * trained / parts


# - Construction


class Wide(nn.Module):
    """A model of linear layers of 16 MiB each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(depth))
        for layer in self.layers:
            layer.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def resident_bytes(line: str) -> int:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(text for text in status.splitlines() if text.startswith(line)).split()[1])


def wide_llama() -> nn.Module:
    """A library replaces torch's initialisation functions by its own."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=8))
    return model


def test_large_parameters_take_no_memory_until_they_are_loaded() -> None:
    wide_llama()  # what is imported
    gc.collect()  # garbage of earlier tests, whose memory could be used again
    before = resident_bytes("VmRSS")
    with Unwritten():
        models = Wide(8), wide_llama()  # 128 and 136 MiB
        other = torch.empty(2048, 2048).normal_()
        small = nn.init.ones_(nn.Parameter(torch.zeros(10)))
    assert resident_bytes("VmRSS") - before < 40 << 20
    assert bool((small == 1).all())
    assert 0.9 < float(other.std()) < 1.1
    assert all(param.requires_grad for model in models for param in model.parameters())


def peak_growth(folder: Path) -> int:
    """Return the growth of this worker's peak memory until it is ready for the first step."""
    recipe = mh.Recipe(
        model=lambda: Wide(8),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=[torch.ones(2048)] * 4,
        batch=mh.Batch(global_size=4, micro_size=1),
        weights=folder,
    )
    with mh.Engine(
        conv_recipe(), mh.Strategy(sharding="zero3", transport="distributed")
    ):  # what is imported and made once
        pass
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with mh.Engine(recipe, mh.Strategy(sharding="zero3", transport="distributed")) as engine:
        assert 60 << 20 < engine.weights_read_bytes < 70 << 20
        return resident_bytes("VmHWM") - before


@pytest.mark.slow
def test_no_worker_has_the_complete_model_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Wide(8).state_dict(), tmp_path / "model.safetensors")  # 128 MiB
    found = mh.launch(peak_growth, tmp_path, workers=2)
    assert max(found) < 96 << 20, found
