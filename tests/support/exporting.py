"""What exports are made of, and how they are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import manyhands as mh
from support.models import ConvNet
from support.threads import run_threads

STEPS = 2


class Trained:
    """A recipe trained for some steps: its checkpoint, the master weights, and the model's own state_dict."""

    def __init__(self, recipe: mh.Recipe, folder: Path, workers: int = 1, sharding: str = "zero2") -> None:
        def work(group: Any) -> tuple[Path, dict[str, Tensor], dict[str, Tensor], str]:
            with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
                for batch in engine.batches(STEPS):
                    engine.step(batch)
                saved = engine.save(folder)
                own = {key: value.detach().clone() for key, value in engine.model.state_dict().items()}
                return saved, engine.full_state_dict(), own, engine.digest()

        self.checkpoint, self.full, self.own, self.digest = run_threads(workers, work)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(out: Path) -> dict[str, Tensor]:
    """All tensors of an export, by its index if it has one."""
    index = out / "model.safetensors.index.json"
    if not index.exists():
        return load_file(out / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found = {}
    for file in set(weight_map.values()):
        here = load_file(out / file)
        assert set(here) == {name for name, other in weight_map.items() if other == file}
        found.update(here)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


class FrozenStem(ConvNet):
    """A model whose first layers and three tables aren't trained.

    The tables are too large to be managed like buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(3)).requires_grad_(False)
        self.conv_1.requires_grad_(False)
        self.norm_1.requires_grad_(False)
