"""Units are found in typical models, or named; parameters of different kinds are never in one unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyhands.engine.units.unit_plan import SMALL_NUMEL, plan_units
from manyhands.errors import ConfigError
from manyhands.shard_layout import build_layout, divide_evenly


class Body(nn.Module):
    def __init__(self, depth: int = 3, width: int = 600) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)


def test_repeated_children_are_units_and_other_parameters_are_grouped_by_module() -> None:
    names = [plan.name for plan in plan_units(Body(), "fp32")]
    assert names == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_every_parameter_is_in_one_unit_in_construction_order() -> None:
    model = Body()
    plans = plan_units(model, "bf16")
    assert [name for plan in plans for name in plan.params] == [name for name, _ in model.named_parameters()]


def test_small_neighbours_are_merged() -> None:
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(10)))
    (plan,) = plan_units(model, "fp32")
    assert plan.name == "0 to 9"
    numel = sum(param.numel() for param in model.parameters())
    assert numel <= SMALL_NUMEL


def test_batch_norm_stays_in_fp32_and_frozen_parameters_have_separate_units() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model[2].requires_grad_(False)
    found = {name: (plan.dtype, plan.trainable) for plan in plan_units(model, "bf16") for name in plan.params}
    assert found["0.weight"] == (torch.bfloat16, True)
    assert found["1.weight"] == (torch.float32, True)
    assert found["2.weight"] == (torch.bfloat16, False)


def test_tied_parameters_are_in_one_unit_once() -> None:
    model = Body()
    model.head.weight = model.embedding.weight
    names = [name for plan in plan_units(model, "fp32") for name in plan.params]
    assert "head.weight" not in names
    assert names.count("embedding.weight") == 1


class Decoder(nn.Module):
    """The matrices of a GPT: 3 + 1 + 4 + 4 parts in each of 12 blocks."""

    def __init__(self, depth: int = 12, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(a * width, b * width) for a, b in ((1, 3), (1, 1), (1, 4), (4, 1))))
            for _ in range(depth)
        )


@pytest.mark.parametrize(("workers", "most"), [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (6, 0.0), (8, 0.17), (16, 0.34)])
def test_unsplittable_matrices_are_divided_with_little_padding(workers: int, most: float) -> None:
    with torch.device("meta"):
        model = Decoder()
    numels = {name: param.numel() for name, param in model.named_parameters()}
    unsplittable = {name for name, param in model.named_parameters() if param.ndim == 2 and "blocks" in name}
    plans = plan_units(model, "fp32", unsplittable=unsplittable, workers=workers)
    assert sorted(name for plan in plans for name in plan.params) == sorted(numels)
    assert all((name in unsplittable) == plan.unsplittable for plan in plans for name in plan.params)
    names = {plan.name for plan in plans if plan.unsplittable}
    layout = build_layout(list(numels.items()), [(plan.name, plan.params) for plan in plans], workers, names)
    padded = sum(unit.padded_numel for unit in layout.units if unit.unsplittable)
    assert padded <= (1 + most) * sum(numels[name] for name in unsplittable)
    loads = [sum(unit.shard(rank).numel for unit in layout.units if unit.unsplittable) for rank in range(workers)]
    assert max(loads) <= (1 + most) * sum(loads) / workers


def test_a_matrix_larger_than_all_others_is_merged_with_enough_others_to_balance_it() -> None:
    with torch.device("meta"):
        model = Decoder()
        model.embedding = nn.Embedding(9000, 256)
    unsplittable = {name for name, param in model.named_parameters() if param.ndim == 2}
    numels = {name: param.numel() for name, param in model.named_parameters()}
    plans = plan_units(model, "fp32", unsplittable=unsplittable, workers=2)
    first = next(plan for plan in plans if plan.unsplittable)
    assert first.params[0] == "embedding.weight"
    shares = divide_evenly([numels[name] for name in first.params], 2)
    heaviest = max(sum(numels[first.params[index]] for index in share) for share in shares)
    assert heaviest * 2 <= 1.07 * sum(numels[name] for name in first.params)


def test_named_units() -> None:
    names = [plan.name for plan in plan_units(Body(), "fp32", ["blocks", "head"])]
    assert names == ["embedding", "blocks", "norm", "head"]


def test_an_unknown_unit_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.1"):
        plan_units(Body(), "fp32", ["block.1"])
