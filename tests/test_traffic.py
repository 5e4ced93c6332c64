"""What a step moves and holds is what the design says, counted and not guessed."""

from __future__ import annotations

import pytest
import torch

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.numerics.order import num_rounds
from support.models import gpt_recipe
from support.threads import run_threads


def one_step(group: Group, recipe: mh.Recipe, sharding: str) -> tuple[mh.StepMetrics, int, int, int]:
    """A second step's metrics, the elements of all units, those of my shards, and the bytes of sums in flight."""
    with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
        for batch in engine.batches(2):
            metrics = engine.step(batch)
        padded = sum(unit.layout.padded_numel for unit in engine.units)
        shard = sum(unit.layout.shard_numel for unit in engine.units)
        return metrics, padded, shard, engine._reducer.scratch_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_gradients_move_once_to_their_owners_and_parameters_not_at_all_on_one_host(
    workers: int, precision: str
) -> None:
    recipe = gpt_recipe(precision)
    item = 2 if precision == "bf16" else 4
    rounds = num_rounds(workers, recipe.batch.micro_batches)
    for rank, (metrics, _, shard, _) in enumerate(run_threads(workers, lambda group: one_step(group, recipe, "zero2"))):
        read = 0  # pieces of others: a worker's own piece doesn't move
        for index in range(rounds):
            contributors = min(workers, recipe.batch.micro_batches - index * workers)
            read += contributors - (rank < contributors)
        assert metrics.bytes_moved["grad"] == read * shard * item
        assert metrics.bytes_moved["param"] == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_sums_in_flight_are_a_few_shards(workers: int) -> None:
    recipe = gpt_recipe("bf16")
    most = recipe.batch.virtual_workers.bit_length() + 1  # partial sums of the tree, and the one being added to
    for _, _, shard, scratch_bytes in run_threads(workers, lambda group: one_step(group, recipe, "zero2")):
        runs = scratch_bytes - 4 * shard * most
        assert runs <= 4 * (1 << 18) * (most + 1)


def test_a_shard_is_a_worker_th_of_the_model() -> None:
    recipe = gpt_recipe("bf16")
    for workers in (1, 2, 4):
        for _, padded, shard, _ in run_threads(workers, lambda group: one_step(group, recipe, "zero2")):
            assert shard * workers == padded


def test_optimizer_state_is_sharded_as_the_stage_says() -> None:
    recipe = gpt_recipe("fp32")
    held: dict[str, list[int]] = {}

    def count(group: Group, sharding: str) -> int:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
            for batch in engine.batches(1):
                engine.step(batch)
            return sum(
                value.numel()
                for piece, _ in engine.updater.slices
                for value in engine.optimizer.state_of(piece).values()
                if isinstance(value, torch.Tensor) and value.dim()
            )

    for sharding in ("ddp", "zero1", "zero2", "zero3"):
        held[sharding] = run_threads(3, lambda group, sharding=sharding: count(group, sharding))  # type: ignore[misc]
    parameters = sum(param.numel() for param in recipe.model().parameters())
    assert held["ddp"] == [2 * parameters] * 3
    for sharding in ("zero1", "zero2", "zero3"):
        assert sum(held[sharding]) == 2 * parameters
        assert max(held[sharding]) < parameters


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
def test_what_travels_over_torch_distributed_goes_through_the_same_buffers_in_every_step(sharding: str) -> None:
    held = []
    with mh.Engine(gpt_recipe("bf16"), mh.Strategy(sharding=sharding, transport="distributed")) as engine:
        for batch in engine.batches(4):
            engine.step(batch)
            held.append(engine.group._pool.num_bytes)  # type: ignore[attr-defined]
    assert held[0] > 0
    assert held[1:] == held[1:2] * 3
