"""What own loops exchange: figures over all workers, and small values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.comm.group import Group
from support.threads import run_threads
from test_evaluation import recipe_of

PARTS = [(0.1 * 3**index, float(index % 3)) for index in range(7)]
"""Totals and weights. Their sum depends on the order of addition."""


def figures(group: Group | None, sharding: str = "ddp") -> Any:
    with mh.Engine(recipe_of(), mh.Strategy(sharding=sharding), group) as engine:
        mine = range(engine.group.rank, len(PARTS), engine.group.size)
        by_part = engine.mean(
            {part: torch.tensor(PARTS[part][0], dtype=torch.float64) for part in mine}, {p: PARTS[p][1] for p in mine}
        )
        whole = engine.mean(PARTS[0][0] if engine.is_first else 0, engine.is_first)
        nothing = engine.mean({}, {})
        values = engine.all_gather_json({"rank": engine.group.rank, "pair": (1, math.nan), 3: None})
        assert all(math.isnan(each.pop("pair")[1]) for each in values)
        return by_part, whole, nothing, values, engine.is_first


def test_a_mean_has_the_same_bits_for_any_number_of_workers() -> None:
    total = 0.0
    for part, _ in PARTS:
        total += part
    expected = total / 6
    assert sum(part for part, _ in reversed(PARTS)) != total
    assert figures(None) == (expected, PARTS[0][0], None, [{"rank": 0, 3: None}], True)
    for size, sharding in ((2, "zero3"), (3, "ddp")):
        values = [{"rank": rank, 3: None} for rank in range(size)]
        found = run_threads(size, lambda group, sharding=sharding: figures(group, sharding))
        assert found == [(expected, PARTS[0][0], None, values, rank == 0) for rank in range(size)]


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("all_gather_json", [torch.zeros(2)], "that JSON can't hold exactly"),
        ("all_gather_json", [{"text": "x" * (1 << 20)}], "that is too large"),
        ("mean", ["a", 1], "something other than a sum and a weight"),
        ("mean", [torch.zeros(2), 1], "something other than a sum and a weight"),
        ("mean", [{0: 1.0}, {1: 1.0}], "sums and weights of different parts"),
        ("mean", [{0: 1.0}, 1.0], "sums and weights of different parts"),
    ],
)
def test_what_one_worker_passes_wrongly_is_refused_on_all(call: str, arguments: list[Any], message: str) -> None:
    def wrong(group: Group) -> Any:
        with mh.Engine(recipe_of(), group=group) as engine:
            given = arguments if group.rank == 1 else [2.0] * len(arguments)
            with pytest.raises(mh.ConfigError, match=message) as caught:
                getattr(engine, call)(*given)
            # The engine stays usable.
            return caught.value.where, engine.mean(group.rank, 1)

    assert run_threads(2, wrong) == [("worker 1", 0.5)] * 2


def test_a_part_of_two_workers_is_refused() -> None:
    def twice(group: Group) -> None:
        with mh.Engine(recipe_of(), group=group) as engine:
            with pytest.raises(mh.ConfigError, match="the part 4 from two workers"):
                engine.mean({4: 1.0}, {4: 1.0})
            with engine.evaluating(), pytest.raises(mh.ConfigError, match="inside evaluating"):
                engine.mean(1.0, 1.0)

    run_threads(2, twice)
