"""Extra states of modules (`get_extra_state`) are saved, restored and exported, or refused before training."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import manyhands as mh
from manyhands.checkpoint.format import read_manifest
from manyhands.checkpoint.snapshot import SnapshotMemory, take_snapshot
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError
from support.models import WIDTH, gpt_recipe
from support.threads import run_threads

STATE: dict[Any, Any] = {
    "plain": [None, True, 1 << 80, "ä", 0.1, -math.inf, b"\x00\xff"],
    3: (torch.arange(6).view(2, 3).t(), torch.tensor(2.5, dtype=torch.bfloat16), torch.zeros(0, 4)),
    ("a", 1): OrderedDict(b=torch.float16, a=np.arange(4.0).reshape(2, 2)),
}


class Scaled(nn.Linear):
    """A layer with a scale that is neither a parameter nor a buffer. state: what else `get_extra_state` returns."""

    def __init__(self, state: Any = None) -> None:
        super().__init__(WIDTH, 4 * WIDTH)
        self.scale, self.state = torch.ones(()), state

    def get_extra_state(self) -> Any:
        return self.scale if self.state is None else {"scale": self.scale, "state": self.state}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state if self.state is None else state["scale"]
        self.state = None if self.state is None else state["state"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def recipe_of(make: Any, state: Any = None) -> mh.Recipe:
    def model() -> nn.Module:
        built = gpt_recipe().model()
        built.blocks[0].up, built.blocks[1].up = make(), Scaled(state)
        return built

    return gpt_recipe(model=model, batch=mh.Batch(global_size=8, micro_size=2))


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other) and one.dtype == other.dtype if isinstance(one, np.ndarray) else one == other


def test_extra_states_are_saved_restored_and_exported(tmp_path: Path) -> None:
    recipe = recipe_of(Scaled, STATE)

    def save(group: Group) -> str:
        with mh.Engine(recipe, mh.Strategy(sharding="zero3"), group=group) as engine:
            for block in engine.model.blocks:
                block.up.scale = torch.tensor(0.25)
            for batch in engine.batches(4):
                engine.step(batch)
                if engine.step_index == 2:
                    engine.save(tmp_path)
            return engine.digest()

    (digest,) = set(run_threads(2, save))
    with mh.Engine(recipe_of(Scaled, {"other": 1}), mh.Strategy(sharding="ddp")) as engine:
        engine.load(tmp_path / "step-00000002")
        ups = [block.up for block in engine.model.blocks]
        assert [up.scale for up in ups] == [0.25, 0.25]
        assert equal(ups[1].state, STATE)
        full = engine.full_state_dict()
        assert equal(full["blocks.1.up._extra_state"]["state"], STATE)
        assert full["blocks.0.up._extra_state"] == 0.25
        for batch in engine.batches(4):
            engine.step(batch)
        assert engine.digest() == digest

    exported = mh.export(tmp_path, tmp_path / "out", step=2)
    assert load_file(tmp_path / "out" / "model.safetensors")["blocks.0.up._extra_state"] == 0.25
    assert "extra_state.json" in exported.files
    found = json.loads((tmp_path / "out" / "extra_state.json").read_text())["blocks.1.up._extra_state"]
    assert found["scale"] == {"dtype": "float32", "values": 0.25}
    assert found["state"][0] == ["plain", [None, True, 1 << 80, "ä", 0.1, "-inf", "AP8="]]


def test_snapshots_hold_extra_states_and_checkpoints_without_any_are_as_before(tmp_path: Path) -> None:
    memory = SnapshotMemory.create(1)
    with mh.Engine(recipe_of(Scaled, STATE)) as engine:
        engine.model.blocks[1].up.scale = torch.tensor(0.5)
        take_snapshot(engine, memory, None)
    with mh.Engine(recipe_of(Scaled, 0)) as engine:
        engine.load_snapshot(memory)
        assert equal(engine.model.blocks[1].up.get_extra_state(), {"scale": torch.tensor(0.5), "state": STATE})
    memory.close()
    with mh.Engine(gpt_recipe()) as engine:
        engine.save(tmp_path)
    assert "extra_states" not in json.loads((tmp_path / "step-00000000" / "manifest.json").read_bytes())
    with mh.Engine(recipe_of(Scaled)) as engine:
        manifest = read_manifest(engine.save(tmp_path / "other"))
    assert [each.name for each in manifest.pieces if each.kind == "extra"] == [
        "blocks.0.up._extra_state|0",
        "blocks.1.up._extra_state|0",
    ]


class Unsettable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, 4 * WIDTH)

    def get_extra_state(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("make", "state", "what"),
    [
        (Unsettable, None, "'blocks.0.up._extra_state' could not be restored"),
        (Scaled, [object()], "has a type that a checkpoint can't hold: object"),
        (Scaled, {"set": {1, 2}}, "has a type that a checkpoint can't hold: set"),
        (Scaled, torch.zeros(2).to_sparse(), "has a type that a checkpoint can't hold: Tensor"),
        (Scaled, np.array([object()]), "has a type that a checkpoint can't hold: ndarray"),
    ],
)
def test_extra_states_that_cannot_be_saved_are_refused_before_training(make: Any, state: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        mh.Engine(recipe_of(make, state))


class Counting(Scaled):
    """Counts the micro-batches of this worker."""

    def forward(self, x: Tensor) -> Tensor:
        self.state = (self.state or 0) + 1
        return super().forward(x)


def test_an_extra_state_that_differs_between_workers_is_refused_after_the_first_step() -> None:
    def work(group: Group) -> None:
        with mh.Engine(recipe_of(Counting), group=group) as engine:
            for batch in engine.batches(2):
                engine.step(batch)

    with pytest.raises(ConfigError, match=r"the same extra state: they differ in blocks\.0\.up\._extra_state"):
        run_threads(3, work)


def test_a_checkpoint_with_other_extra_states_is_refused(tmp_path: Path) -> None:
    with mh.Engine(recipe_of(Scaled)) as engine:
        saved = engine.save(tmp_path)
    with (
        mh.Engine(recipe_of(lambda: nn.Linear(WIDTH, 4 * WIDTH))) as engine,
        pytest.raises(CheckpointError, match="extra states are not those of the model's modules"),
    ):
        engine.load(saved)
