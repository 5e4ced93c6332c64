"""An adapter is exported with its trained bits, peft loads it without a warning, and a merged export is equivalent."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.export import explain_export
from manyhands.cli.main import app
from support.exporting import Trained, assert_same, weights
from support.models import Tokens, gpt_recipe

os.environ["HF_HUB_OFFLINE"] = "1"
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

pytestmark = [
    # peft asks transformers for properties by the names that they had before transformers 5.24.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"),
]
TOKENS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> nn.Module:
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SIZES))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SIZES))


class Convolutions(nn.Module):
    """Predicts each token from the three around it, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mixed, self.head = nn.Embedding(61, 8), nn.Conv1d(8, 12, 3, padding=1), nn.Linear(12, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mixed(self.tokens(tokens).mT).mT)


def wrapped(base: Callable[[], nn.Module], **config: Any) -> Callable[[], nn.Module]:
    """The base with an adapter that isn't zero, so that an untrained tensor isn't mistaken for a trained one."""
    return lambda: peft.get_peft_model(base(), peft.LoraConfig(init_lora_weights=False, **config))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(TOKENS)
    return found if isinstance(found, Tensor) else found.logits


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    found = model(tokens[:, :-1].contiguous())
    found = found if isinstance(found, Tensor) else found.logits
    return nn.functional.cross_entropy(found.float().flatten(0, 1), tokens[:, 1:].flatten())


def trained(build: Callable[[], nn.Module], folder: Path, workers: int = 1, sharding: str = "zero2") -> Trained:
    return Trained(gpt_recipe(model=build, loss=loss, data=Tokens()), folder, workers, sharding)


EVERY_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, str]] = {
    # name: base, config, workers, sharding. With two workers and zero3, no worker has a complete adapter.
    "llama": (llama, {"r": 4, "lora_alpha": 16, "target_modules": EVERY_LLAMA, "task_type": "CAUSAL_LM"}, 2, "zero3"),
    "gpt2": (
        gpt2,
        {"r": 3, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "use_rslora": True}
        | {"modules_to_save": ["lm_head"], "rank_pattern": {"wte": 5}},
        1,
        "ddp",
    ),
    "convolutions": (Convolutions, {"r": 2, "target_modules": ["tokens", "mixed", "head"]}, 2, "zero2"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_exported_and_merged(tmp_path: Path, name: str) -> None:
    base, config, workers, sharding = CASES[name]
    build = wrapped(base, **config)
    run = trained(build, tmp_path / "checkpoints", workers, sharding)
    model: Any = mh.load_model(run.checkpoint, build)

    summary = mh.export(run.checkpoint, tmp_path / "adapter")
    assert (summary.form, summary.files) == ("adapter", ["adapter_config.json", "adapter_model.safetensors"])
    assert "PeftModel.from_pretrained" in explain_export(summary)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    found = _adapter(tmp_path / "adapter")
    assert_same(found, _adapter(tmp_path / "theirs"))
    named = {key.replace(".default", "").replace("modules_to_save.", ""): value for key, value in run.full.items()}
    assert_same(found, {key: named[key] for key in found})
    assert all(value.numel() for value in found.values())
    ours, theirs = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("adapter", "theirs"))
    assert {key: sorted(value) if isinstance(value, list) else value for key, value in theirs.items()} == ours

    frozen: Any = mh.load_model(run.checkpoint, build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        loaded = peft.PeftModel.from_pretrained(frozen.unload(), str(tmp_path / "adapter"))
    found, expected_state = (
        {key: each for key, each in net.state_dict().items() if "original_module" not in key} for net in (loaded, model)
    )
    assert_same(found, expected_state)

    merged = mh.export(run.checkpoint, tmp_path / "merged", merge=True, max_shard_size="20KB")
    assert (merged.form, merged.digest) == ("merged", run.digest)
    plain: Any = base()
    if name == "convolutions":
        plain.load_state_dict(weights(tmp_path / "merged"))
    else:
        plain, report = type(plain).from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(report.values()), report
    expected = logits(model)
    limit = 1e-5 * expected.abs().max().clamp(min=1)
    assert (logits(plain) - expected).abs().max() < limit
    assert (logits(loaded.unload()) - expected).abs().max() > 100 * limit


def test_the_command_exports_and_merges(tmp_path: Path) -> None:
    run = trained(wrapped(Convolutions, r=2, target_modules=["head"]), tmp_path / "checkpoints")
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        done = CliRunner().invoke(app, ["export", str(run.checkpoint), str(tmp_path / name), "--json", *options])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout.splitlines()[-1])["form"] == name
    assert weights(tmp_path / "merged").keys() == Convolutions().state_dict().keys()


def _adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_merged_weights_have_the_dtype_of_the_base(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return peft.get_peft_model(
            llama().bfloat16(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )

    run = trained(build, tmp_path / "checkpoints")
    mh.export(run.checkpoint, tmp_path / "own", merge=True)
    mh.export(run.checkpoint, tmp_path / "fp32", merge=True, dtype="fp32")
    own, exact = weights(tmp_path / "own"), weights(tmp_path / "fp32")
    assert {value.dtype for value in own.values()} == {torch.bfloat16}
    assert_same(own, {name: value.bfloat16() for name, value in exact.items()})
    assert json.loads((tmp_path / "own" / "config.json").read_text())["dtype"] == "bfloat16"


def also_trained() -> nn.Module:
    model: Any = wrapped(Convolutions, r=2, target_modules=["head"])()
    model.base_model.model.mixed.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "merge", "message"),
    [
        (Convolutions, True, "the model has no adapter to merge"),
        (
            wrapped(Convolutions, r=2, target_modules=["head"], use_dora=True),
            True,
            "can't be merged.*[\\s\\S]*DoraLinear",
        ),
        (wrapped(Convolutions, r=2, target_modules=["head"], lora_bias=True), True, "can't be merged.*[\\s\\S]*bias"),
        (also_trained, False, "not part of the adapter[\\s\\S]*mixed.weight"),
    ],
    ids=["no adapter", "DoRA", "bias", "also trained"],
)
def test_an_export_that_would_lack_something_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], merge: bool, message: str
) -> None:
    run = trained(build, tmp_path / "checkpoints")
    with pytest.raises(mh.ConfigError, match=message):
        mh.export(run.checkpoint, tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_tensors_are_computed_is_exported_as_a_model(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))

    with mh.Engine(gpt_recipe(model=build, loss=loss)) as engine:
        checkpoint = engine.save(tmp_path / "checkpoints")
    assert mh.export(checkpoint, tmp_path / "out").form == "model"
    with pytest.raises(mh.ConfigError, match="no adapter to merge"):
        mh.export(checkpoint, tmp_path / "merged", merge=True)
