"""Reduces gradients: decides when workers exchange them, and in which order they are added.

There are two ways, which compute the same sum:

- *Every micro-batch*: in round j the W workers compute micro-batches j*W .. j*W+W-1, and each owner adds the pieces in
  index order.
- *Every step*: the workers that share memory (all workers of a host, or a single worker) compute a contiguous run of
  virtual workers in the same way. Once per step, they exchange the sums of the run's complete subtrees with other
  hosts.

All workers send units in one fixed order, although gradients may arrive in any order. So no worker ever waits for a
message that another worker doesn't send. The unit that was built last is sent first, because backward usually completes
units in that order.
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
from manyhands.engine.step.gradient_sums import RUN, Adder, LocalSums, ShardSum, SumBuffers
from manyhands.engine.units.gradient_buffers import IN_FLIGHT
from manyhands.engine.units.unit import Event, Unit
from manyhands.numerics.ordered_sum import (
    Subtree,
    maximal_subtrees,
    micro_batch_of_round,
    num_rounds,
    run_of_virtual_workers,
)
from manyhands.offload.allocator import Allocator

MAX_WAIT_SECONDS = 1.0

POLL_SECONDS = 0.0002


class BoundedWait:
    """Waits for an all-to-all up to a time limit, because it may be unable to complete while this worker waits.

    seconds: the current limit. Each wait that reaches the limit reduces it to a tenth.
    """

    def __init__(self, recorder: Recorder, seconds: float = MAX_WAIT_SECONDS) -> None:
        self._recorder, self.seconds = recorder, seconds

    def completes(self, all_to_all: AllToAll) -> bool:
        """Wait for the all-to-all. Return False if it isn't complete within the limit."""
        start = time.monotonic()
        while not (complete := all_to_all.is_complete) and time.monotonic() < start + self.seconds:
            time.sleep(POLL_SECONDS)
        self._recorder.add_wait(time.monotonic() - start)
        if not complete:
            self.seconds /= 10
        return complete


class Levels(NamedTuple):
    """The groups of workers at the two levels of a reduction.

    intra_host: the workers whose gradients are added in each round.
    inter_host: the workers that exchange sums once a step; None if gradients are exchanged every micro-batch.
    """

    intra_host: Group
    inter_host: Group | None


def levels_of(group: Group, sharding: Sharding, batch: Batch) -> Levels:
    """Choose between the two ways of reducing gradients."""
    # Local sums take memory for complete units in fp32. So they are used only if workers store complete gradients
    # anyway or share memory, and only if every host has a virtual worker.
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
    """A round of a step.

    micro_batch: the micro-batch that this worker computes, or None.
    contributors: the ranks in `intra_host` that compute a micro-batch.
    """

    micro_batch: int | None
    contributors: range


def plan_rounds(batch: Batch, run: range, rank: int, workers: int) -> list[Round]:
    """Return the rounds of a step for worker `rank`, if `workers` workers compute the virtual workers `run`. Pure."""
    first, count = run.start * batch.accumulate, len(run) * batch.accumulate
    rounds = []
    for index in range(num_rounds(workers, count)):
        mine = micro_batch_of_round(index, rank, workers, count)
        contributors = range(min(workers, count - index * workers))
        rounds.append(Round(None if mine is None else first + mine, contributors))
    return rounds


class GradientReducer:
    """Sends this worker's gradients, and adds all workers' gradients for the shards that this worker owns.

    For each round, call `begin`, then `arrived` for each gradient, then `end`. After the last round, call
    `close_rounds` and `await_pieces`. This completes each unit's sum in `sums`. Call `release` before the next step.
    allocator: creates the buffers of the partial sums of shards.
    """

    def __init__(
        self, group: Group, units: Sequence[Unit], batch: Batch, sharding: Sharding, allocator: Allocator
    ) -> None:
        self._batch = batch
        intra_host, self._inter_host = levels_of(group, sharding, batch)
        # All workers send units in this order. Gradients may arrive in any order.
        self._order = list(reversed(units))
        # True if pieces are views of persistent gradient buffers, so that pieces in flight take no memory.
        self._views = intra_host.pieces_are_views and sharding.param is not SHARDED
        # Nothing overwrites the gradients of the last round before the next step. They stay in place, and the update
        # reads and adds them in one pass.
        self._defers_last_round = intra_host.pieces_are_views and self._inter_host is None
        # In a backward that unshards parameters, peers may be waiting for this worker to take part in an unexpected
        # unshard. They send no gradients meanwhile, so an unlimited wait for gradients could deadlock. When the limit
        # is reached, this worker continues with more all-to-alls in flight.
        self._bounded_wait = (
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
        adder, run = Adder(group.device), SumBuffers(RUN, memory)
        self.sums: dict[str, ShardSum] = {}
        self._local: dict[str, LocalSums] = {}
        self._unit_of: dict[str, Unit] = {}
        self._sum_buffers = [run]
        for unit in units:
            shard_buffers = SumBuffers(unit.layout.shard_numel, allocator)
            self._sum_buffers.append(shard_buffers)
            self.sums[unit.name] = ShardSum(batch.accumulate, adder, shard_buffers, run)
            self._unit_of.update({slot.name: unit for slot in unit.layout.slots})
            if self._inter_host is not None:
                buffers = SumBuffers(unit.layout.padded_numel // intra_host.size, memory)
                self._sum_buffers.append(buffers)
                self._local[unit.name] = LocalSums(
                    maximal_subtrees(mine.start, mine.stop), batch.accumulate, adder, buffers
                )
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Start a step. step: its number, for the tags of collective calls."""
        self._step, self._round = step, 0
        self.without_gradient = set(self._unit_of)  # in all micro-batches of this worker so far
        self.not_finite: tuple[int, str] | None = None  # micro-batch and parameter of the first such gradient
        self._complete: set[str] = set()
        self._next = 0  # index in `_order` of the first unit that has not been sent in this round
        self._in_flight: list[tuple[Unit, AllToAll]] = []
        self._last_round: list[tuple[Unit, AllToAll]] = []
        self._subtrees: list[AllToAll] = []

    def begin(self, index: int) -> None:
        """Start round `index`, before this worker computes in it."""
        self._round, self._next = index, 0
        self._complete.clear()
        if self.rounds[index].micro_batch is not None:
            for unit in self._order:
                unit.begin()

    def arrived(self, name: str, param: nn.Parameter) -> None:
        """Take a parameter's gradient, and send the units that are complete and next in order."""
        unit, grad = self._unit_of[name], param.grad
        if grad is None:
            return
        param.grad = None
        self.without_gradient.discard(name)
        if unit.take(name, grad):
            self._complete.add(unit.name)
            self._send_complete()

    def end(self) -> None:
        """Finish a round after backward. Parameters without a gradient contribute zeros, and all units are sent."""
        for unit in self._order:
            if self.rounds[self._round].micro_batch is not None:
                unit.complete()
            self._complete.add(unit.name)
            # Send the units one by one: a unit may need a slot of the ring that only the units before it can free.
            self._send_complete()
        if self._round == self._last and self._defers_last_round:
            self._last_round, self._in_flight = self._in_flight, []
        while self._in_flight:
            self._drain(*self._in_flight.pop(0))

    def _send_complete(self) -> None:
        """Send complete units, up to the first one in the fixed order that isn't complete."""
        this = self.rounds[self._round]
        while self._next < len(self._order) and self._order[self._next].name in self._complete:
            unit = self._order[self._next]
            self._next += 1
            if this.micro_batch is not None and self.not_finite is None:
                bad = unit.first_not_finite()
                self.not_finite = None if bad is None else (this.micro_batch, bad)
            tag = f"step {self._step}, round {self._round} / {unit.name} / grad"
            self._in_flight.append((unit, unit.send(this.contributors, tag)))
            while self._in_flight and self._should_drain():
                self._drain(*self._in_flight.pop(0))

    def _should_drain(self) -> bool:
        """Return True if the oldest pieces in flight should be added now, during a backward."""
        if self._views:  # Views take no memory: add them now only if they go into local sums and have arrived.
            return self._inter_host is not None and self._in_flight[0][1].is_complete
        return len(self._in_flight) > IN_FLIGHT and (
            self._bounded_wait is None or self._bounded_wait.completes(self._in_flight[0][1])
        )

    def _drain(self, unit: Unit, all_to_all: AllToAll) -> None:
        """Add the pieces of the oldest all-to-all and release it.

        All-to-alls must be released in the order of their creation.
        """
        into = self.sums[unit.name] if self._inter_host is None else self._local[unit.name]
        into.add(all_to_all.pieces())
        self.sums[unit.name].evict()
        all_to_all.release()
        unit.mark_reduced()

    def close_rounds(self) -> None:
        """Finish the rounds of a step: exchange the local sums, if there are any. Collective in that case."""
        if self._inter_host is None:
            return
        for unit in self._order:
            for level, piece in self._all_to_all_subtrees(unit, self._inter_host):
                self.sums[unit.name].defer(piece, level)

    def _all_to_all_subtrees(self, unit: Unit, inter_host: Group) -> list[tuple[int, torch.Tensor]]:
        """Exchange the sums of a unit's subtrees.

        Return (level, piece) for each, in the order of virtual workers. Collective.
        """
        size = inter_host.size
        subtrees = [maximal_subtrees(run.start, run.stop) for run in _runs(inter_host, self._batch)]
        mine = self._local[unit.name].values
        all_to_alls = []
        unit.life.on(Event.REDUCE)
        for slot in range(max(len(trees) for trees in subtrees)):
            contributors = [rank for rank in range(size) if slot < len(subtrees[rank])]
            # A subtree of a single micro-batch is sent in the gradients' dtype; sums are sent in fp32.
            leaves = self._batch.accumulate == 1 and all(subtrees[rank][slot].level == 0 for rank in contributors)
            dtype = unit.params.dtype if leaves else torch.float32
            value = mine[slot].to(dtype) if slot < len(mine) else torch.empty(0, dtype=dtype, device=inter_host.device)
            tag = f"step {self._step}, subtree {slot} / {unit.name} / grad"
            contribution = Contribution(value)
            all_to_alls.append(inter_host.all_to_all(contribution, 0, unit.layout.shard_numel, contributors, tag))
        pieces = [all_to_all.pieces() for all_to_all in all_to_alls]
        self._subtrees += all_to_alls
        unit.life.on(Event.REDUCED)
        found: list[tuple[Subtree, torch.Tensor]] = []
        for slot, in_slot in enumerate(pieces):
            contributors = [rank for rank in range(size) if slot < len(subtrees[rank])]
            found += [(subtrees[rank][slot], piece) for rank, piece in zip(contributors, in_slot, strict=True)]
        return [(subtree.level, piece) for subtree, piece in sorted(found, key=lambda item: item[0].start)]

    def await_pieces(self) -> None:
        """Wait for the last round's pieces, if they stay in place until the update reads them."""
        for unit, all_to_all in self._last_round:
            for piece in all_to_all.pieces():
                self.sums[unit.name].defer(piece)

    def release(self) -> None:
        """Free the sums' buffers and release their pieces, after the update has read the sums."""
        for shard_sum in self.sums.values():
            shard_sum.clear()
        for local in self._local.values():
            local.clear()
        # Release in the order of creation, because groups count releases; see `AllToAll`.
        for unit, all_to_all in self._last_round:
            all_to_all.release()
            unit.mark_reduced()
        for all_to_all in self._subtrees:
            all_to_all.release()
        self._last_round, self._subtrees = [], []

    def discard(self) -> None:
        """Discard this step's gradients on every worker without leaving collective calls unmatched."""
        self.await_pieces()  # pieces must not be released before they have arrived
        self.release()

    @property
    def num_buffer_bytes(self) -> int:
        """Return the size of the partial sums' buffers in bytes."""
        return sum(buffers.num_bytes for buffers in self._sum_buffers)


def _runs(inter_host: Group, batch: Batch) -> list[range]:
    """Return the virtual workers of each rank in `inter_host`."""
    return [run_of_virtual_workers(rank, inter_host.size, batch.virtual_workers) for rank in range(inter_host.size)]
