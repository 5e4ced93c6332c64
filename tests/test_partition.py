"""Units are found in models as people write them, or named; they never mix what can't travel together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyhands.engine.partition import SMALL_NUMEL, plan_units
from manyhands.errors import ConfigError


class Body(nn.Module):
    def __init__(self, depth: int = 3, width: int = 600) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)


def test_repeated_children_are_units_and_the_rest_goes_by_module() -> None:
    names = [plan.name for plan in plan_units(Body(), "fp32")]
    assert names == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_every_parameter_is_in_one_unit_in_construction_order() -> None:
    model = Body()
    plans = plan_units(model, "bf16")
    assert [name for plan in plans for name in plan.params] == [name for name, _ in model.named_parameters()]


def test_small_neighbours_travel_together() -> None:
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(10)))
    (plan,) = plan_units(model, "fp32")
    assert plan.name == "0 to 9"
    numel = sum(param.numel() for param in model.parameters())
    assert numel <= SMALL_NUMEL


def test_batch_norm_stays_in_fp32_and_frozen_parameters_stay_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model[2].requires_grad_(False)
    found = {name: (plan.dtype, plan.trainable) for plan in plan_units(model, "bf16") for name in plan.params}
    assert found["0.weight"] == (torch.bfloat16, True)
    assert found["1.weight"] == (torch.float32, True)
    assert found["2.weight"] == (torch.bfloat16, False)


def test_tied_parameters_travel_once() -> None:
    model = Body()
    model.head.weight = model.embedding.weight
    names = [name for plan in plan_units(model, "fp32") for name in plan.params]
    assert "head.weight" not in names
    assert names.count("embedding.weight") == 1


def test_named_units() -> None:
    names = [plan.name for plan in plan_units(Body(), "fp32", ["blocks", "head"])]
    assert names == ["embedding", "blocks", "norm", "head"]


def test_an_unknown_unit_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.1"):
        plan_units(Body(), "fp32", ["block.1"])
