"""The bytes that a step moves and holds are counted, and are those of the design."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.engine.units.params import ReplicatedParams
from manyhands.numerics.ordered_sum import num_rounds
from manyhands.shard_layout import Range
from support.models import GPT_UNITS, gpt_recipe
from support.threads import run_threads


def one_step(group: Group, recipe: mh.Recipe, sharding: str) -> tuple[mh.StepMetrics, int, int, int]:
    """Return a second step's metrics, the elements of all units and of the worker's shards, and partial sums' bytes."""
    with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
        for batch in engine.batches(2):
            metrics = engine.step(batch)
        padded = sum(unit.layout.padded_numel for unit in engine.units)
        shard = sum(unit.layout.shard_numel for unit in engine.units)
        return metrics, padded, shard, engine._reducer.num_buffer_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_gradients_move_once_to_their_owners_and_parameters_not_at_all_on_one_host(
    workers: int, precision: str
) -> None:
    recipe = gpt_recipe(precision)
    item = 2 if precision == "bf16" else 4
    rounds = num_rounds(workers, recipe.batch.micro_batches)
    for rank, (metrics, _, shard, _) in enumerate(run_threads(workers, lambda group: one_step(group, recipe, "zero2"))):
        read = 0  # pieces of peers: a worker's own piece doesn't move
        for index in range(rounds):
            contributors = min(workers, recipe.batch.micro_batches - index * workers)
            read += contributors - (rank < contributors)
        assert metrics.bytes_moved["grad"] == read * shard * item
        assert metrics.bytes_moved["param"] == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_partial_sums_take_the_memory_of_a_few_shards(workers: int) -> None:
    recipe = gpt_recipe("bf16")
    most = recipe.batch.virtual_workers.bit_length() + 1  # partial sums of the tree, and the one being added to
    for _, _, shard, num_buffer_bytes in run_threads(workers, lambda group: one_step(group, recipe, "zero2")):
        runs = num_buffer_bytes - 4 * shard * most
        assert runs <= 4 * (1 << 18) * (most + 1)


def test_a_shard_is_an_equal_part_of_the_model() -> None:
    recipe = gpt_recipe("bf16")
    for workers in (1, 2, 4):
        for _, padded, shard, _ in run_threads(workers, lambda group: one_step(group, recipe, "zero2")):
            assert shard * workers == padded


def test_optimizer_state_has_the_placement_of_the_sharding() -> None:
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
def test_transfers_over_torch_distributed_reuse_their_buffers_in_every_step(sharding: str) -> None:
    held = []
    with mh.Engine(gpt_recipe("bf16"), mh.Strategy(sharding=sharding, transport="distributed")) as engine:
        for batch in engine.batches(4):
            engine.step(batch)
            held.append(engine.group._pool.num_bytes)  # type: ignore[attr-defined]
    assert held[0] > 0
    assert held[1:] == held[1:2] * 3


@pytest.mark.parametrize(
    ("sharding", "clip_norm", "passes"),
    [("zero1", None, 1), ("zero2", None, 1), ("zero3", None, 1), ("zero2", 0.5, 2), ("ddp", None, 2), ("ddp", 0.5, 2)],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_update_makes_one_pass_and_a_second_one_only_where_needed(
    workers: int, sharding: str, clip_norm: float | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping needs the norm first, and replicated optimizer state all sums. The sums are read once in either case."""
    monkeypatch.setattr("manyhands.engine.update.updater.RUN", 4096)

    def work(group: Group) -> None:
        events: list[tuple[str, Range] | None] = []  # of a step: elements of a sum that are read; None: an update
        strategy = mh.Strategy(sharding=sharding, units=GPT_UNITS)
        with mh.Engine(gpt_recipe(clip_norm=clip_norm), strategy, group=group) as engine:

            def recorded(name: str, total: Any) -> Any:
                return lambda run, *given: (events.append((name, run)), total(run, *given))[1]

            for name, shard_sum in engine._reducer.sums.items():
                shard_sum.total = recorded(name, shard_sum.total)  # type: ignore[method-assign]
            step = engine.optimizer.step
            engine.optimizer.step = lambda run: (events.append(None), step(run))[1]  # type: ignore[method-assign]
            for batch in engine.batches(2):
                events.clear()
                engine.step(batch)
                read = [event for event in events if event is not None]
                for unit in engine.units:
                    mine = sorted((run.start, run.end) for name, run in read if name == unit.name)
                    assert [start for start, _ in mine] == [0, *(end for _, end in mine)][: len(mine)]
                    assert sum(end - start for start, end in mine) == unit.shard.numel
                assert len(read) > len(engine.units)
                if passes == 1:  # each run of elements is updated before the next one is summed
                    assert all((event is None) == bool(index % 2) for index, event in enumerate(events))
                else:
                    assert None not in events[: len(read)]

    run_threads(workers, work)


class SelfCopies(TorchDispatchMode):
    """Counts the elements that are copied onto themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() == args[1].data_ptr():
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("precision", "workers", "options"),
    [
        ("fp32", 1, {}),
        ("fp32", 2, {}),
        ("fp32", 1, {"transport": "distributed"}),
        ("fp32", 1, {"offload": "disk"}),
        ("bf16", 1, {}),
    ],
    ids=["one worker", "shared memory", "distributed", "disk", "bf16"],
)
def test_parameters_of_fp32_are_their_own_master_weights(
    precision: str, workers: int, options: dict[str, Any], sharding: str, tmp_path: Path
) -> None:
    """Except for ddp in shared memory: there, all workers have one copy of the parameters and each its own masters."""
    same = precision == "fp32" and (sharding != "ddp" or workers == 1)

    def work(group: Group | None) -> None:
        strategy = mh.Strategy(sharding=sharding, units=GPT_UNITS, scratch=str(tmp_path), **options)
        with mh.Engine(gpt_recipe(precision), strategy, group=group) as engine:
            for batch in engine.batches(2):
                with SelfCopies() as copies:
                    engine.step(batch)
                assert copies.numel == 0
            params = dict(engine.model.named_parameters())
            for unit in engine.units:
                stored = unit.params.stored(unit.held)
                assert (unit.master.data_ptr() == stored.data_ptr()) is same or not unit.held.numel
                assert unit.master.dtype == torch.float32
            always = [unit for unit in engine.units if isinstance(unit.params, ReplicatedParams)]
            whole = {slot.name for unit in always for slot in unit.layout.slots}
            for piece, _ in engine.updater.slices:
                if piece.name in whole:
                    place = params[piece.name].data_ptr() + piece.start * params[piece.name].element_size()
                    assert (piece.master.data_ptr() == place) is same

    if options.get("transport") == "distributed":
        work(None)
    else:
        run_threads(workers, work)
