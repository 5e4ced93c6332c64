"""An export has the checkpoint's bits in Hugging Face's layout, is streamed piece by piece, and is atomic."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints
from support.exporting import STEPS, FrozenStem, Trained, assert_same, contents, weights
from support.models import PartlyUsed, Tokens, conv_recipe, gpt_recipe, grouped, partly_used_recipe


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


# - The bits


@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_has_the_trained_bits(tmp_path: Path, precision: str, size: int | str) -> None:
    trained = Trained(gpt_recipe(precision), tmp_path / "checkpoints")
    masters = mh.export(trained.checkpoint, tmp_path / "masters", dtype="fp32", max_shard_size=size)
    assert_same(weights(tmp_path / "masters"), without(trained.full, "head.weight"))  # tied to tokens.weight
    own = mh.export(trained.checkpoint, tmp_path / "own", max_shard_size=size)
    assert_same(weights(tmp_path / "own"), without(trained.own, "head.weight"))
    assert (masters.step, masters.digest, own.digest) == (STEPS, trained.digest, trained.digest)
    assert (masters.dtype, own.dtype) == ("float32", {"fp32": "float32", "bf16": "bfloat16"}[precision])
    assert masters.weights_bytes == sum(tensor.nbytes for tensor in without(trained.full, "head.weight").values())
    assert masters.parameters == sum(tensor.numel() for tensor in without(trained.full, "head.weight").values())
    assert sorted(own.files) == sorted(path.name for path in (tmp_path / "own").iterdir())
    assert not own.has_config


def test_masters_can_be_written_as_bf16(tmp_path: Path) -> None:
    trained = Trained(gpt_recipe("fp32"), tmp_path / "checkpoints")
    mh.export(trained.checkpoint, tmp_path / "out", dtype="bf16")
    expected = {name: tensor.bfloat16() for name, tensor in without(trained.full, "head.weight").items()}
    assert_same(weights(tmp_path / "out"), expected)


def test_the_bytes_of_an_export_do_not_depend_on_workers_or_sharding(tmp_path: Path) -> None:
    found = []
    for workers, sharding in ((1, "ddp"), (2, "zero1"), (3, "zero2")):
        trained = Trained(gpt_recipe("bf16"), tmp_path / sharding / "checkpoints", workers, sharding)
        mh.export(trained.checkpoint, tmp_path / sharding / "out", max_shard_size="20KB")
        found.append(contents(tmp_path / sharding / "out"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_and_buffers_are_exported(tmp_path: Path, precision: str, workers: int) -> None:
    trained = Trained(conv_recipe(precision, model=FrozenStem), tmp_path / "checkpoints", workers)
    mh.export(trained.checkpoint, tmp_path / "own")
    assert_same(weights(tmp_path / "own"), trained.own)
    mh.export(trained.checkpoint, tmp_path / "masters", dtype="fp32")
    expected = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in trained.full.items()
    }
    assert_same(weights(tmp_path / "masters"), expected)


def test_frozen_parameters_are_written_once_and_again_if_they_were_deleted(tmp_path: Path) -> None:
    with mh.Engine(conv_recipe(model=FrozenStem)) as engine:
        batches = engine.batches()
        first = engine.save(tmp_path)
        (frozen,) = tmp_path.glob("frozen-*")
        written = frozen.stat()
        engine.step(next(batches))
        second = engine.save(tmp_path)
        assert frozen.stat() == written
        assert b"frozen|" not in b"".join(contents(first).values())
        shutil.rmtree(frozen)
        with pytest.raises(mh.CheckpointError, match="frozen parameters are missing") as caught:
            mh.export(second, tmp_path / "out")
        assert frozen.name in str(caught.value)
        engine.load(second)  # needs none: the recipe has them
        engine.step(next(engine.batches()))
        engine.save(tmp_path)
        mh.export(second, tmp_path / "out")


def test_runs_with_other_frozen_parameters_share_a_folder(tmp_path: Path) -> None:
    for seed, steps in ((1, 1), (2, 2)):
        with mh.Engine(conv_recipe(model=FrozenStem, seed=seed)) as engine:
            for batch in engine.batches(steps):
                engine.step(batch)
            engine.save(tmp_path)
            own = {key: value.detach().clone() for key, value in engine.model.state_dict().items()}
        mh.export(tmp_path, tmp_path / f"out-{seed}")
        assert_same(weights(tmp_path / f"out-{seed}"), own)
    assert len(list(tmp_path.glob("frozen-*"))) == 2


class Odd(PartlyUsed):
    """A model with tied, scalar, empty and integer tensors, and a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.register_buffer("calls", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("halves", torch.tensor([0.1, 0.2], dtype=torch.bfloat16))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.other = nn.Module()
        self.other.register_buffer("mask", self.mask)
        self.again = self.always

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_odd_tensors_are_exported(tmp_path: Path, precision: str) -> None:
    trained = Trained(partly_used_recipe(precision, model=Odd), tmp_path / "checkpoints", 2)
    mh.export(trained.checkpoint, tmp_path / "out", max_shard_size=100)
    assert_same(weights(tmp_path / "out"), without(trained.own, "again.weight", "again.bias", "other.mask"))


class Hooked(PartlyUsed):
    """A model whose state_dict has a tensor that is not in the model."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {**super().state_dict(*args, **options), "sum": self.head.weight.sum()}


def test_tensors_computed_by_a_state_dict_are_refused_and_named(tmp_path: Path) -> None:
    with mh.Engine(partly_used_recipe(model=Hooked)) as engine:
        checkpoint = engine.save(tmp_path / "checkpoints")
        engine.load(checkpoint)
    with pytest.raises(mh.CheckpointError, match="tensors that are not parameters or buffers of the model: sum"):
        mh.export(checkpoint, tmp_path / "out")


def test_a_dtype_that_safetensors_lacks_is_refused_and_named(tmp_path: Path) -> None:
    class Complex(PartlyUsed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turns", torch.zeros(3, dtype=torch.complex128))

    with (
        mh.Engine(partly_used_recipe(model=Complex)) as engine,
        pytest.raises(mh.CheckpointError, match="'turns' has a type that a checkpoint can't hold"),
    ):
        engine.save(tmp_path)
    assert list_checkpoints(tmp_path) == []


# - transformers


def language_model_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    inputs = tokens[:, :-1].contiguous()
    return model(input_ids=inputs, labels=inputs).loss


def transformers_models() -> dict[str, Callable[[], nn.Module]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, **sizes)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_key_value_heads=2, **llama, **sizes)
        ),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_loads_an_export(
    tmp_path: Path, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    recipe = gpt_recipe(precision, model=transformers_models()[name], loss=language_model_loss)
    tokens = torch.stack([Tokens()[index] for index in range(3)])[:, :-1]
    with mh.Engine(recipe) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
        checkpoint = engine.save(tmp_path / "checkpoints")
        summary = mh.export(checkpoint, tmp_path / "out", max_shard_size="20KB")
        found, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values()), report
        assert type(found) is type(engine.model)
        assert_same(found.state_dict(), engine.model.state_dict())
        assert torch.equal(found.eval()(tokens).logits, engine.model.eval()(tokens).logits)
        engine.model.save_pretrained(tmp_path / "theirs")
        assert_same(weights(tmp_path / "out"), weights(tmp_path / "theirs"))
    assert summary.has_config
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    mh.export(checkpoint, tmp_path / "masters", dtype="fp32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masters")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def test_a_model_that_wraps_one_of_transformers_gets_no_config(tmp_path: Path) -> None:
    inner = transformers_models()["gpt2"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner()
            self.config = self.inner.config  # type: ignore[assignment]

    with mh.Engine(gpt_recipe(model=Wrapper)) as engine:
        checkpoint = engine.save(tmp_path)
    assert mh.export(checkpoint, tmp_path / "out").files == ["model.safetensors"]


# - Memory


class Big(nn.Module):
    """A model of 256 MiB, an eighth of it frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(16))
        self.layers[0].requires_grad_(False)
        self.layers[1].requires_grad_(False)


MEASURE = """
    import resource, sys
    import manyhands as mh

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small, big, out = sys.argv[1:]
    mh.export(small, out + "/small")
    before = peak()
    for dtype in ("fp32", "bf16"):
        summary = mh.export(big, f"{out}/{dtype}", dtype=dtype)
    print(summary.parameters * 4, peak() - before)
"""


@pytest.mark.slow
def test_the_complete_model_is_never_in_memory(tmp_path: Path) -> None:
    small = Trained(conv_recipe(model=FrozenStem), tmp_path / "small").checkpoint
    recipe = gpt_recipe(model=Big, optimizer=grouped(torch.optim.SGD, lr=0.1))
    with mh.Engine(recipe) as engine:
        big = engine.save(tmp_path / "big")
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(big), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    model_bytes, grown_bytes = map(int, done.stdout.split())
    assert model_bytes == 256 * 2**20
    assert grown_bytes < 48 * 2**20
