"""peft saves and loads the adapters of a run with the trained bits, and the merged model computes the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from support.real_models import RECIPES

pytest.importorskip("peft")


# peft asks transformers for a property by the name that it had before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_a_run_are_loaded_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = RECIPES["lora"]("fp32")
    mh.train(recipe, steps=2, run_dir=tmp_path / "run", show=False)
    loaded: Any = mh.load_model(tmp_path / "run", recipe)
    base: Any = recipe.model()
    adapters = {name: value for name, value in loaded.state_dict().items() if "lora_" in name}
    fresh = base.state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in adapters.items() if "lora_B" in name)

    loaded.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in adapters}
    base = mh.load_model(tmp_path / "run", recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again: Any = PeftModel.from_pretrained(base.unload(), str(tmp_path / "adapter")).eval()
    found = again.state_dict()
    assert all(torch.equal(found[name], value) for name, value in adapters.items())
    assert all(value.numel() for value in adapters.values())

    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        unmerged = loaded(input_ids=tokens).logits
        assert torch.equal(again(input_ids=tokens).logits, unmerged)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert (merged(input_ids=tokens).logits - unmerged).abs().max() < 1e-5
        plain = again.unload()(input_ids=tokens).logits
        assert (plain - unmerged).abs().max() > 1e-5
