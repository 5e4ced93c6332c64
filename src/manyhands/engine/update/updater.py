"""The update: the gradient's norm, clipping, the optimizer's step, and the all-gather of the new parameters.

After it, engine/step_engine.py (`StepEngine._update`) advances the learning-rate schedules (optim/schedules.py).

The update makes one pass over runs of elements that stay in a core's cache. For each run of the shard, it reads and
adds the pieces of the gradients, divides and clips the sum, applies the optimizer, and writes the parameters. An
unsplittable parameter is a run of its own, of any length.

The update makes two passes in three cases only. Clipping needs the norm first. With replicated optimizer state, every
worker first needs the sums of all workers. Step hooks that run before the update may read sharded parameters, which
can't be unsharded before the sums are complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.average import Average
from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.engine.sharding import REPLICATED, SHARDED, Sharding
from manyhands.engine.step.gradient_sums import RUN
from manyhands.engine.step.reduce import GradientReducer
from manyhands.engine.units.params import ReplicatedParams
from manyhands.engine.units.unit import Unit
from manyhands.engine.update.average import WeightAverage
from manyhands.engine.update.companions import Companions
from manyhands.errors import NumericsError
from manyhands.numerics.digest import block_hashes, block_norms, total_norm
from manyhands.offload.allocator import Allocator
from manyhands.offload.process_memory import return_freed_memory
from manyhands.optim.sliced import Slice, SlicedOptimizer
from manyhands.shard_layout import BLOCK, Layout, Range


def runs_of(within: Range) -> Iterator[Range]:
    """Divide `within` into runs of at most RUN elements."""
    for start in range(within.start, within.end, RUN):
        yield Range(start, min(start + RUN, within.end))


def ranges_of(unit: Unit) -> list[Range]:
    """Return the ranges that the update processes one by one: runs, or unsplittable parameters with their padding."""
    if not unit.layout.unsplittable:
        return list(runs_of(unit.held))
    return [slot.padded for slot in unit.layout.slots if slot.padded.overlap(unit.held).numel]


@dataclass(frozen=True)
class Run:
    """A range of a unit that the update processes at a time. This worker holds all its elements.

    slices: the optimizer's views of the master weights in the range. groups: the param groups over these slices.
    """

    unit: Unit
    range: Range
    slices: tuple[Slice, ...]
    grads: tuple[Tensor, ...]  # each slice's gradient, a view of `grad`
    groups: list[list[dict[str, Any]]]
    grad: Tensor  # [range.numel], on the state's device; a view of one of the updater's buffers
    evictable: list[Tensor]  # tensors that are evicted to disk after an update


class Part(NamedTuple):
    """A part of a parameter: its elements [start, start + numel), which begin with a block.

    in_unit: the elements in the unit. master: the master weights, [numel]. companions: what islands store beside them,
    each [numel], by kind.
    """

    name: str
    start: int
    in_unit: Range
    master: Tensor
    companions: Mapping[str, Tensor]


class Allocators(NamedTuple):
    """Allocators of the state that outlives an update, and of sums of gradients.

    state: for master weights, optimizer state and parameters. sums: for sums of gradients.
    """

    state: Allocator
    sums: Allocator

    @classmethod
    def of(cls, state: Allocator, sharding: Sharding, device: torch.device) -> Allocators:
        """Return the allocators of an engine.

        state: the allocator that the strategy's offload requires. device: the group's device.
        """
        # If the model doesn't fit into memory, the sums of its gradients don't fit either.
        return cls(state, state if state.on_disk and sharding.param is SHARDED else Allocator(device))


class Updater:
    """Updates this worker's weights from the sums of a step's gradients, as the module's docstring describes.

    average: the average of the weights, which each update also updates if the recipe has one. companions: what islands
    store beside the weights.
    """

    def __init__(
        self,
        group: Group,
        units: Sequence[Unit],
        layout: Layout,
        sharding: Sharding,
        optimizer: SlicedOptimizer,
        allocators: Allocators,
        average: Average | None = None,
        companions: Sequence[str] = (),
    ) -> None:
        self._group, self._units, self._layout, self._optimizer = group, units, layout, optimizer
        self._allocator, self._sums_allocator = allocators
        self._replicated = sharding.optim is REPLICATED
        # The workers that share the work of writing parameters. With replicated optimizer state, every host computes
        # all parameters, so only the workers of one host share the work.
        writers = self._writers = group.intra_host if self._replicated else group
        self._written = {unit.name: unit.layout.part(writers.rank, writers.size) for unit in units}
        ranges = {unit.name: ranges_of(unit) for unit in units}
        longest = max((each.numel for several in ranges.values() for each in several), default=0)
        # A run's gradient is summed on the group's device and used on the state's device. If these differ, two buffers
        # are used in turn, so that one run's gradient is copied while another run's gradient is used.
        self._summed = torch.zeros(longest, device=group.device)
        is_copied = self._allocator.device != group.device
        pinned = Allocator(self._allocator.device, pinned=is_copied)
        self._grads = [pinned.empty(longest, torch.float32) for _ in range(2)] if is_copied else [self._summed]
        self._arrived: deque[torch.cuda.Event | None] = deque()
        self.average = WeightAverage(average, units, self._allocator)
        self.companions = Companions(companions, units, self._allocator)
        self._runs: dict[str, list[Run]] = {}
        numbers = count()
        for unit in units:
            self._runs[unit.name] = [self._run(unit, each, next(numbers)) for each in ranges[unit.name]]
        optimizer.drop_initial_state()
        self._numbers = [torch.tensor(layout.block_numbers(rank), dtype=torch.int64) for rank in range(group.size)]
        self._updated = False  # True after the first update
        self._full: dict[str, Tensor] = {}  # the step's gradient in fp32 by unit, if a second pass needs it
        blocks = {unit.name: unit.shard.numel // BLOCK for unit in units}
        self._norms = {name: torch.zeros(count, device=group.device) for name, count in blocks.items()}

    def _run(self, unit: Unit, within: Range, number: int) -> Run:
        """Create a run. number: the run's index among all runs. It decides which gradient buffer the run uses."""
        slices, grads, grad = [], [], self._grads[number % len(self._grads)][: within.numel]
        for piece in unit.layout.pieces(within):
            start = piece.in_unit.start - unit.held.start
            grad_start = piece.in_unit.start - within.start
            shape = self._optimizer.shape_of(piece.slot.name, piece.in_unit.numel)
            master = unit.master[start : start + piece.in_unit.numel].view(shape)
            average = self.average.of(unit, piece.in_unit)
            beside = self.companions.of(unit, piece.in_unit)
            slices.append(Slice(piece.slot.name, piece.in_param.start, master, average, beside))
            grads.append(grad[grad_start : grad_start + piece.in_unit.numel].view(shape))
        groups = self._optimizer.runs(slices)
        return Run(unit, within, tuple(slices), tuple(grads), groups, grad, self._evictable_weights(unit, within))

    def _evictable_weights(self, unit: Unit, within: Range) -> list[Tensor]:
        """Return the run's master weights and parameters that are evicted to disk between updates."""
        if not self._allocator.on_disk:
            return []
        master = _master_of(unit, within)
        if isinstance(unit.params, ReplicatedParams):
            return [] if _is_alias(master, unit.params.stored(within)) else [master]
        writes = self._writes(unit, within)
        stored = unit.params.stored(writes)
        return [master] if _is_alias(master, stored) else [master, stored]  # never evict the same pages twice

    @property
    def slices(self) -> Iterator[tuple[Slice, Range]]:
        """Yield each slice of this worker's master weights and optimizer state, with the part that this worker owns.

        The part is the range of the slice's elements that lies in this worker's shard. It is the full slice unless
        optimizer state is replicated.
        """
        for runs in self._runs.values():
            for run in runs:
                for piece, param_piece in zip(run.slices, run.unit.layout.pieces(run.range), strict=True):
                    in_unit = param_piece.in_unit
                    owned = in_unit.overlap(run.unit.shard)
                    yield piece, Range(owned.start - in_unit.start, owned.end - in_unit.start)

    def update(
        self,
        reducer: GradientReducer,
        weight: float,
        clip_norm: float | None,
        unused: set[str],
        step: int,
        before: Callable[[], None] | None = None,
    ) -> float:
        """Update this worker's weights, all-gather them, and release the sums. Collective.

        Return the gradient's norm before clipping.

        weight: the divisor of the sums. unused: parameters without a gradient in this step; they are not updated.
        step: the number of this step, counted from 1. before: called before any weight changes, when units may be
        unsharded.
        Raises NumericsError if the norm is not finite.
        """
        tag = f"step {step}"
        norm = scale = None
        if self._replicated or clip_norm is not None or before is not None:
            self._sum_first(reducer, weight, tag)
            norm = self._all_gather_norm(tag)
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))  # as in torch's clip_grad_norm_
        if before is not None:
            reducer.release()
            before()
        self._optimizer.begin_step([run.groups for runs in self._runs.values() for run in runs])
        self.average.begin_step(step)
        waits: list[Callable[[], None]] = []
        fetched: deque[Run] = deque()
        for unit in self._units:
            for run in self._runs[unit.name]:
                self._fetch(reducer, run, weight, scale)
                fetched.append(run)
                if len(fetched) == len(self._grads):
                    self._step(fetched.popleft(), unused)
            while fetched:
                self._step(fetched.popleft(), unused)
            reducer.sums[unit.name].evict()
            waits += self._all_gather(unit, tag)  # in flight while the next unit is updated
        if norm is None:
            norm = self._all_gather_norm(tag)
        for wait in waits:
            wait()
        reducer.release()
        self.average.end_step()
        self._optimizer.end_step(lambda mine: all_gather_json(self._group, mine, f"{tag} / optimizer / control"))
        if not self._updated:
            self._updated = True
            return_freed_memory()  # creating the optimizer's state has fragmented the heap
        return norm

    def _all_gather(self, unit: Unit, tag: str) -> list[Callable[[], None]]:
        """Start to all-gather the parameters if they are replicated. Return functions that wait for their arrival."""
        replicated = unit.params.replicated
        return [] if replicated is None else [self._writers.all_gather(replicated, f"{tag} / {unit.name} / param")]

    def _full_start(self, unit: Unit) -> int:
        """Return the index in the unit of the first element that the unit's `_full` holds."""
        return 0 if self._replicated else unit.shard.start

    def _total(self, reducer: GradientReducer, unit: Unit, within: Range, weight: float, out: Tensor) -> None:
        """Write the step's gradient over `within`, a part of the shard, to `out`, and store the norms of its blocks."""
        for run in runs_of(within):
            in_shard = Range(run.start - unit.shard.start, run.end - unit.shard.start)
            part = out[run.start - within.start : run.end - within.start]
            reducer.sums[unit.name].total(in_shard, weight, part)
            self._norms[unit.name][in_shard.start // BLOCK : in_shard.end // BLOCK] = block_norms(part)

    def _sum_first(self, reducer: GradientReducer, weight: float, tag: str) -> None:
        """Make the first of two passes: compute the step's gradient in `_full`. Collective if state is replicated."""
        for unit in self._units:
            if unit.name not in self._full:
                self._full[unit.name] = (
                    self._group.empty_replicated(unit.layout.padded_numel, torch.float32)
                    if self._replicated
                    else self._sums_allocator.empty(unit.shard.numel, torch.float32)
                )
            full = self._full[unit.name][unit.shard.start - self._full_start(unit) :][: unit.shard.numel]
            self._total(reducer, unit, unit.shard, weight, full)
            reducer.sums[unit.name].evict()
            if not self._replicated:
                self._sums_allocator.evict(full)
        if self._replicated:
            waits = [
                self._group.all_gather(self._full[unit.name], f"{tag} / {unit.name} / grad") for unit in self._units
            ]
            for wait in waits:
                wait()

    def _fetch(self, reducer: GradientReducer, run: Run, weight: float, scale: float | None) -> None:
        """Compute a run's gradient and start to copy it to the device of the optimizer's state."""
        for tensor in run.evictable:
            self._allocator.prefetch(tensor)
        self.average.prefetch(run.unit, run.range)
        summed = self._summed[: run.range.numel]
        if scale is None:
            self._total(reducer, run.unit, run.range, weight, summed)
        else:
            full = self._full[run.unit.name][run.range.start - self._full_start(run.unit) :][: run.range.numel]
            torch.mul(full, scale, out=summed)
            if not self._replicated:
                self._sums_allocator.evict(full)
        event = None
        if run.grad.device != summed.device:
            run.grad.copy_(summed, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._arrived.append(event)

    def _step(self, run: Run, unused: set[str]) -> None:
        """Wait for a run's gradient and update the run."""
        event = self._arrived.popleft()
        if event is not None:
            event.synchronize()
        for piece, grad in zip(run.slices, run.grads, strict=True):
            piece.master.grad = None if piece.name in unused else grad
        master = _master_of(run.unit, run.range)
        self.average.before_update(run.unit, run.range, master)
        self._optimizer.step(run.groups)
        self.average.after_update(run.unit, run.range, master, run.grad)  # the gradient is not needed any more
        self._finish(run)

    def _finish(self, run: Run) -> None:
        """Write the parameters from changed master weights, then evict the buffers that are stored on disk."""
        if self._allocator.on_disk:  # torch may have created new state tensors in memory
            state = [tensor for piece in run.slices for tensor in self._optimizer.offload_state(piece, self._allocator)]
            run.evictable[:] = [*self._evictable_weights(run.unit, run.range), *state]
        self._write(run)
        for tensor in run.evictable:
            self._allocator.evict(tensor)

    def refill(self, fill: Callable[[Slice], None]) -> None:
        """Call `fill` to set each slice's master weights and state, then update the parameters. Collective."""
        for runs in self._runs.values():
            for run in runs:
                for piece in run.slices:
                    fill(piece)
                self.average.evict(run.unit, run.range)
                self.companions.evict(run.unit, run.range)
                self._finish(run)
        self._all_gather_all("start")

    def exchange_with_average(self, tag: str, *, alone: bool = False) -> None:
        """Exchange the weights and their average, so that the model computes with the average. Collective.

        A second call restores both, bit for bit, because values are only copied. No step, save or load may come in
        between. alone: True if the peers don't take part, because the group has failed.
        """
        self._change(
            lambda run, master: self.average.exchange(run.unit, run.range, master, run.grad),
            f"{tag} / average",
            alone=alone,
        )

    def exchange_with(self, kind: str, tag: str) -> None:
        """Exchange the weights and their companions of a kind. Collective. See `exchange_with_average`."""

        def exchange(run: Run, master: Tensor) -> None:
            self.companions.exchange(kind, run.unit, run.range, master, run.grad)

        self._change(exchange, f"{tag} / {kind}")

    def change_weights(self, change: Callable[[Tensor, Mapping[str, Tensor]], None], tag: str) -> None:
        """Call `change(master weights, companions)` for each part that this worker holds, then update the parameters.
        Collective.

        `change` may also change the companions. Each part and companion is [numel], padding included.
        """
        self._change(lambda run, master: change(master, self.companions.of(run.unit, run.range)), tag)

    def _change(self, change: Callable[[Run, Tensor], None], tag: str, *, alone: bool = False) -> None:
        if not alone:
            self._group.barrier(f"{tag} / control")  # a peer may still read the parameters
        for runs in self._runs.values():
            for run in runs:
                change(run, _master_of(run.unit, run.range))
                self._write(run)
                self.companions.evict(run.unit, run.range)
                for tensor in self._evictable_weights(run.unit, run.range):
                    self._allocator.evict(tensor)
        if not alone:
            self._all_gather_all(tag)

    def parts(self, unit: Unit, within: Range) -> Iterator[Part]:
        """Yield the parameters' parts in a range of a unit that this worker holds. At the end, evict the companions."""
        for piece in unit.layout.pieces(within):
            companions = self.companions.of(unit, piece.in_unit)
            yield Part(
                piece.slot.name, piece.in_param.start, piece.in_unit, _master_of(unit, piece.in_unit), companions
            )
        self.companions.evict(unit, within)

    def _all_gather_all(self, tag: str) -> None:
        for unit in self._units:
            for wait in self._all_gather(unit, tag):
                wait()

    def _writes(self, unit: Unit, within: Range) -> Range:
        """Return the part of `within` in which this worker writes the parameters."""
        return within.overlap(self._written[unit.name])

    def _write(self, run: Run) -> None:
        """Copy master weights to the parameters, unless both are in the same memory."""
        unit, writes = run.unit, self._writes(run.unit, run.range)
        stored, master = unit.params.stored(writes), _master_of(unit, writes)
        if not _is_alias(master, stored):
            stored.copy_(master)

    def _all_gather_norm(self, tag: str) -> float:
        """Return the norm of the step's gradient. Collective. Raises NumericsError if it isn't finite."""
        norms = [self._norms[unit.name] for unit in self._units]
        norm = total_norm(self.in_block_order(norms, f"{tag} / norm / control"))
        if not norm < float("inf"):  # also true if it is NaN
            raise NumericsError(
                f"the sum of the step's gradients is not finite (norm {norm}), although every micro-batch's gradients "
                "are finite",
                where=tag,
                hint="lower the learning rate or scale the loss down, and resume from the last checkpoint; to continue "
                f"without this step: --skip-step {tag.rpartition(' ')[2]}",
            )
        return norm

    def hashes(self, tag: str) -> Tensor:
        """Return the hashes of all blocks of the master weights, [num_blocks] int64, in block order. Collective."""
        mine = [torch.empty(0, dtype=torch.int64)]  # a worker may own no block
        for unit in self._units:
            for run in runs_of(unit.shard):
                mine.append(block_hashes(_master_of(unit, run)).cpu())
                for tensor in self._evictable_weights(unit, run):
                    self._allocator.evict(tensor)
        return self.in_block_order(mine, f"{tag} / digest / control")

    def in_block_order(self, mine: Sequence[Tensor], tag: str) -> Tensor:
        """Return the values of all blocks of the model, ordered by block number, on the CPU. Collective.

        mine: the values of the blocks in this worker's shards, unit by unit.
        """
        joined = torch.cat([*mine]).cpu()
        # Pad to the same length on all workers, because they may own different numbers of blocks.
        padded = joined.new_zeros(max(len(numbers) for numbers in self._numbers))
        padded[: len(joined)] = joined
        ordered = joined.new_zeros(self._layout.num_blocks)
        for numbers, values in zip(self._numbers, self._group.all_gather_small(padded, tag), strict=True):
            ordered[numbers] = values[: len(numbers)]
        return ordered


def _master_of(unit: Unit, within: Range) -> Tensor:
    """Return the master weights of a part of the unit's `held` elements."""
    return unit.master[within.start - unit.held.start : within.end - unit.held.start]


def _is_alias(master: Tensor, stored: Tensor) -> bool:
    """Return True if parameters and master weights are in the same memory, which is possible in fp32; see
    assembly.py.
    """
    return master.data_ptr() == stored.data_ptr()
