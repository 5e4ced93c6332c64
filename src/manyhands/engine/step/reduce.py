"""Reduces gradients: what is exchanged when, and in which order it is added.

Waiting for an exchange that may not come as long as this worker waits for it.

From micro-batches' gradients to ordered sums of shards: what is exchanged when, and what is added in which order.
Two ways, the same sum. *Every micro-batch*: in round j the workers compute micro-batches j*W .. j*W+W-1, and each owner
adds the pieces in index order. *Every step*: those who share memory (a host's workers, or one alone) compute in that
way a contiguous run of virtual workers, and send the complete subtrees that their run covers to the others.

Units are exchanged in one fixed order on all workers (the last built first, as backward usually completes them), in
whatever order their gradients come: so no worker ever waits for a message that another doesn't send.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from manyhands.comm.group import AllToAll, Contribution, Group, Recorder
from manyhands.config import Batch
from manyhands.engine.sharding import SHARDED, Sharding
from manyhands.engine.step.sums import RUN, Adder, LocalSums, Scratch, ShardSum
from manyhands.engine.units.gradients import IN_FLIGHT
from manyhands.engine.units.unit import Event, Unit
from manyhands.numerics.order import Subtree, maximal_subtrees, micro_batch_of_round, num_rounds, run_of_virtual_workers
from manyhands.offload.allocator import Allocator

PATIENCE_SECONDS = 1.0

POLL_SECONDS = 0.0002


class BoundedWait:
    """Each time that waiting was in vain, a tenth of it from then on. seconds: that an exchange is awaited by now."""

    def __init__(self, recorder: Recorder, seconds: float = PATIENCE_SECONDS) -> None:
        self._recorder, self.seconds = recorder, seconds

    def completes(self, all_to_all: AllToAll) -> bool:
        """Whether it is complete soon."""
        began = time.monotonic()
        while not (complete := all_to_all.is_complete) and time.monotonic() < began + self.seconds:
            time.sleep(POLL_SECONDS)
        self._recorder.waited(time.monotonic() - began)
        if not complete:
            self.seconds /= 10
        return complete


class Levels(NamedTuple):
    """near: whose gradients are added in each round. far: who exchange the sums once a step (None: nobody)."""

    intra_host: Group
    inter_host: Group | None


def levels_of(group: Group, sharding: Sharding, batch: Batch) -> Levels:
    """Which way the gradients go. Sums of whole units are kept only where whole gradients are, or are shared."""
    inter_host = group.inter_host
    if (
        inter_host is None
        or inter_host.size > batch.virtual_workers
        or not (group.shares_memory or sharding.grad is not SHARDED)
    ):
        return Levels(group, None)
    return Levels(group.intra_host, inter_host)


@dataclass(frozen=True)
class Round:
    """micro_batch: what this worker computes (None: nothing); contributors: the ranks in `near` that compute one."""

    micro_batch: int | None
    contributors: range


def plan_rounds(batch: Batch, run: range, rank: int, workers: int) -> list[Round]:
    """The rounds of a step for one of those who compute the virtual workers of `run`, in order. Pure."""
    first, count = run.start * batch.accumulate, len(run) * batch.accumulate
    rounds = []
    for index in range(num_rounds(workers, count)):
        mine = micro_batch_of_round(index, rank, workers, count)
        contributors = range(min(workers, count - index * workers))
        rounds.append(Round(None if mine is None else first + mine, contributors))
    return rounds


class GradientReducer:
    """One worker's part in the sums of a step.

    For each round: `begin`, then the gradients as they come (`arrived`), then `end`. After the last one `close_rounds`;
    then each unit's sum (`sums`) is complete once `await_pieces` returned. `release` lets the next step begin.
    home: of the sums in flight.
    """

    def __init__(
        self, group: Group, units: Sequence[Unit], batch: Batch, sharding: Sharding, allocator: Allocator
    ) -> None:
        self._batch = batch
        intra_host, self._inter_host = levels_of(group, sharding, batch)
        self._order = list(reversed(units))
        self._views = (
            intra_host.pieces_are_views and sharding.param is not SHARDED
        )  # and the gradients stay where they are
        # What comes last in a step finds its place free until the next one begins, and the update adds it.
        self._keeps_last = intra_host.pieces_are_views and self._inter_host is None
        # In a backward that gathers parameters the others may wait for this worker meanwhile, to gather what it doesn't
        # expect, and don't send: then it goes on, with more exchanges under way.
        self._patience = (
            BoundedWait(group.recorder) if sharding.param is SHARDED and not group.pieces_are_views else None
        )
        mine = (
            range(batch.virtual_workers)
            if self._inter_host is None
            else _runs(self._inter_host, batch)[self._inter_host.rank]
        )
        self.rounds = plan_rounds(batch, mine, intra_host.rank, intra_host.size)
        self._last = len(self.rounds) - 1
        memory = Allocator(group.device)
        adder, run = Adder(group.device), Scratch(RUN, memory)
        self.sums: dict[str, ShardSum] = {}
        self._local: dict[str, LocalSums] = {}
        self._unit_of: dict[str, Unit] = {}
        self._scratches = [run]
        for unit in units:
            whole = Scratch(unit.layout.shard_numel, allocator)
            self._scratches.append(whole)
            self.sums[unit.name] = ShardSum(batch.accumulate, adder, whole, run)
            self._unit_of.update({slot.name: unit for slot in unit.layout.slots})
            if self._inter_host is not None:
                scratch = Scratch(unit.layout.padded_numel // intra_host.size, memory)
                self._scratches.append(scratch)
                self._local[unit.name] = LocalSums(
                    maximal_subtrees(mine.start, mine.stop), batch.accumulate, adder, scratch
                )
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Before a step's first round."""
        self._step, self._round = step, 0
        self.without_gradient = set(self._unit_of)  # in every micro-batch of this worker so far
        self.not_finite: tuple[int, str] | None = None  # the first micro-batch and parameter
        self._complete: set[str] = set()
        self._next = 0  # the first unit, in the fixed order, that is not yet sent in this round
        self._in_flight: list[tuple[Unit, AllToAll]] = []
        self._last_round: list[tuple[Unit, AllToAll]] = []
        self._subtrees: list[AllToAll] = []

    def begin(self, index: int) -> None:
        """Before this worker computes in round `index`."""
        self._round, self._next = index, 0
        self._complete.clear()
        if self.rounds[index].micro_batch is not None:
            for unit in self._order:
                unit.begin()

    def arrived(self, name: str, param: nn.Parameter) -> None:
        """A parameter's gradient is there: take it, and send what has become complete."""
        unit, grad = self._unit_of[name], param.grad
        if grad is None:
            return
        param.grad = None
        self.without_gradient.discard(name)
        if unit.take(name, grad):
            self._complete.add(unit.name)
            self._send_complete()

    def end(self) -> None:
        """After backward: what got no gradient contributes zeros, and everything left is sent."""
        for unit in self._order:
            if self.rounds[self._round].micro_batch is not None:
                unit.complete()
            self._complete.add(unit.name)
            self._send_complete()  # one by one, so that zeros find a place when it's their turn
        if self._round == self._last and self._keeps_last:
            self._last_round, self._in_flight = self._in_flight, []
        while self._in_flight:
            self._drain(*self._in_flight.pop(0))

    def _send_complete(self) -> None:
        this = self.rounds[self._round]
        while self._next < len(self._order) and self._order[self._next].name in self._complete:
            unit = self._order[self._next]
            self._next += 1
            if this.micro_batch is not None and self.not_finite is None:
                bad = unit.first_not_finite()
                self.not_finite = None if bad is None else (this.micro_batch, bad)
            tag = f"step {self._step}, round {self._round} / {unit.name} / grad"
            self._in_flight.append((unit, unit.send(this.contributors, tag)))
            while self._in_flight and self._shall_drain():
                self._drain(*self._in_flight.pop(0))

    def _shall_drain(self) -> bool:
        """Whether to add the oldest pieces now, in the midst of a backward."""
        if self._views:  # they cost no memory: only if there's something to gain, and nobody to wait for
            return self._inter_host is not None and self._in_flight[0][1].is_complete
        return len(self._in_flight) > IN_FLIGHT and (
            self._patience is None or self._patience.completes(self._in_flight[0][1])
        )

    def _drain(self, unit: Unit, all_to_all: AllToAll) -> None:
        into = self.sums[unit.name] if self._inter_host is None else self._local[unit.name]
        into.add(all_to_all.pieces())
        self.sums[unit.name].rest()
        all_to_all.release()
        unit.sent()

    def close_rounds(self) -> None:
        """After the last round: send the local sums, if that is the way."""
        if self._inter_host is None:
            return
        for unit in self._order:
            for level, piece in self._all_to_all_subtrees(unit, self._inter_host):
                self.sums[unit.name].keep(piece, level)

    def _all_to_all_subtrees(self, unit: Unit, inter_host: Group) -> list[tuple[int, torch.Tensor]]:
        """(level, piece of my shard) of everyone's subtrees, in the order of the virtual workers."""
        size = inter_host.size
        subtrees = [maximal_subtrees(run.start, run.stop) for run in _runs(inter_host, self._batch)]
        mine = self._local[unit.name].values
        under_way = []
        unit.life.on(Event.REDUCE)
        for slot in range(max(len(trees) for trees in subtrees)):
            contributors = [rank for rank in range(size) if slot < len(subtrees[rank])]
            # A lone micro-batch travels as it is, in its own dtype; sums travel in fp32.
            leaves = self._batch.accumulate == 1 and all(subtrees[rank][slot].level == 0 for rank in contributors)
            dtype = unit.params.dtype if leaves else torch.float32
            value = mine[slot].to(dtype) if slot < len(mine) else torch.empty(0, dtype=dtype, device=inter_host.device)
            tag = f"step {self._step}, subtree {slot} / {unit.name} / grad"
            under_way.append(inter_host.all_to_all(Contribution(value), 0, unit.layout.shard_numel, contributors, tag))
        pieces = [all_to_all.pieces() for all_to_all in under_way]
        self._subtrees += under_way
        unit.life.on(Event.REDUCED)
        found: list[tuple[Subtree, torch.Tensor]] = []
        for slot, in_slot in enumerate(pieces):
            contributors = [rank for rank in range(size) if slot < len(subtrees[rank])]
            found += [(subtrees[rank][slot], piece) for rank, piece in zip(contributors, in_slot, strict=True)]
        return [(subtree.level, piece) for subtree, piece in sorted(found, key=lambda item: item[0].start)]

    def await_pieces(self) -> None:
        """Wait for the last round's pieces, where they are views that were left in place."""
        for unit, all_to_all in self._last_round:
            for piece in all_to_all.pieces():
                self.sums[unit.name].keep(piece)

    def release(self) -> None:
        """The sums were used: give back everything that they held."""
        for shard_sum in self.sums.values():
            shard_sum.clear()
        for local in self._local.values():
            local.clear()
        for unit, all_to_all in self._last_round:
            all_to_all.release()
            unit.sent()
        for all_to_all in self._subtrees:
            all_to_all.release()
        self._last_round, self._subtrees = [], []

    def drop(self) -> None:
        """All workers give up this step alike: drop its gradients, leaving the group in order."""
        self.await_pieces()
        self.release()

    @property
    def scratch_bytes(self) -> int:
        """What the sums in flight have taken so far."""
        return sum(scratch.num_bytes for scratch in self._scratches)


def _runs(inter_host: Group, batch: Batch) -> list[range]:
    """The virtual workers of each rank in `far`."""
    return [run_of_virtual_workers(rank, inter_host.size, batch.virtual_workers) for rank in range(inter_host.size)]
