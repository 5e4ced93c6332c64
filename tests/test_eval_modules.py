"""Modules that stay in evaluation mode while training: their batch norms and dropout act as if they were frozen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.documents.recipe_file import load_recipe
from support.threads import run_threads
from test_evaluation import recipe_of
from test_recipe_file import MODULE, RECIPE

STEPS = 3


class Backbone(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))


class Net(nn.Module):
    """A backbone and a head, each with batch norm and dropout."""

    def __init__(self, backbone: Callable[[], nn.Module] = Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone(), Backbone()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


class AlwaysEvaluating(Backbone):
    """What a model had to do without the option."""

    def train(self, mode: bool = True) -> AlwaysEvaluating:
        super().train(False)
        return self


def trained(group: Group | None, sharding: str, **changes: Any) -> tuple[str, dict[str, list[float]]]:
    """Digest and buffers after some steps, with an evaluation after each."""
    with mh.Engine(recipe_of(**{"model": Net, **changes}), mh.Strategy(sharding=sharding), group) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
            with engine.evaluating() as model:
                model(torch.zeros(2, 8))
        buffers = {name: buffer.tolist() for name, buffer in engine.model.named_buffers()}
        return engine.digest(), buffers


def test_modules_in_evaluation_mode_have_the_same_bits_for_any_number_of_workers() -> None:
    expected = trained(None, "ddp", model=lambda: Net(AlwaysEvaluating))
    digest, buffers = expected
    start = {name: buffer.tolist() for name, buffer in Net().named_buffers()}
    assert {name for name in buffers if buffers[name] != start[name]} == {
        f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert trained(None, "ddp", eval_modules=["backbone"]) == expected
    assert trained(None, "ddp", eval_modules="backbone.*") == expected
    for sharding in ("ddp", "zero3"):
        found = run_threads(2, lambda group, sharding=sharding: trained(group, sharding, eval_modules=["backbone.*"]))
        assert found == [expected] * 2
    assert len({digest, trained(None, "ddp")[0], trained(None, "ddp", eval_modules=["backbone.1"])[0]}) == 3


def test_a_pattern_without_a_module_is_refused_before_the_first_step() -> None:
    with pytest.raises(mh.ConfigError, match="eval_modules matches no module") as caught:
        trained(None, "ddp", eval_modules=["head", "backbon.*"])
    assert (caught.value.got, caught.value.hint) == ("'backbon.*'", "did you mean 'backbone'?")


def test_a_checkpoint_of_other_modes_is_refused(tmp_path: Path) -> None:
    with mh.Engine(recipe_of(model=Net, eval_modules=["backbone"])) as engine:
        saved = engine.save(tmp_path)
    with mh.Engine(recipe_of(model=Net)) as engine, pytest.raises(mh.CheckpointError, match="eval_modules"):
        engine.load(saved)


def test_a_recipe_file_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.py").write_text(MODULE)
    (tmp_path / "recipe.toml").write_text('eval_modules = ["layers.*", "norm"]\n' + RECIPE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    assert load_recipe(tmp_path / "recipe.toml").recipe.eval_modules == ("layers.*", "norm")
    sys.modules.pop("tiny", None)
