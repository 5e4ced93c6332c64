"""Clips and applies the optimizer run by run, and gathers the new parameters.

What the update does at a time: runs of elements that stay in a core's cache, or whole parameters.

The update: from the sums of a step's gradients to new weights, in one pass over runs of elements that stay in cache.
For each run of the shard: read the pieces, add, divide, clip, optimizer, write the parameters. A parameter that its
optimizer must see whole is a run of its own, however long. Two passes only where they are needed: to clip (the norm
comes first), and where every worker holds all optimizer state (it needs everyone's sums first).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.comm.group import Group
from manyhands.engine.sharding import REPLICATED, Sharding
from manyhands.engine.step.reduce import GradientReducer
from manyhands.engine.step.sums import RUN
from manyhands.engine.units.params import ReplicatedParams
from manyhands.engine.units.unit import Unit
from manyhands.errors import NumericsError
from manyhands.layout import BLOCK, Layout, Range
from manyhands.numerics.digest import block_hashes, block_norms, total_norm
from manyhands.offload.allocator import Allocator
from manyhands.offload.process_memory import return_freed_memory
from manyhands.optim.sliced import Slice, SlicedOptimizer


def runs_of(within: Range) -> Iterator[Range]:
    """`within` cut into runs of at most RUN elements."""
    for start in range(within.start, within.end, RUN):
        yield Range(start, min(start + RUN, within.end))


def ranges_of(unit: Unit) -> list[Range]:
    """What one pass of the update handles at a time: runs of elements, or whole parameters with their padding."""
    if not unit.layout.unsplittable:
        return list(runs_of(unit.held))
    return [slot.padded for slot in unit.layout.slots if slot.padded.overlap(unit.held).numel]


@dataclass(frozen=True)
class Run:
    """One pass: elements `range` of the unit (all held here), its slices, and the optimizer's groups over them."""

    unit: Unit
    range: Range
    slices: tuple[Slice, ...]
    grads: tuple[Tensor, ...]  # each slice's gradient, a view of `grad`
    groups: list[list[dict[str, Any]]]
    grad: Tensor  # [range.numel], where the state is; of one of the updater's buffers
    evictable: list[Tensor]  # what is let go after an update


class Allocators(NamedTuple):
    """Where things are between two updates. state: master weights, optimizer state, parameters; sums: gradients."""

    state: Allocator
    sums: Allocator


class Updater:
    """See the module."""

    def __init__(
        self,
        group: Group,
        units: Sequence[Unit],
        layout: Layout,
        sharding: Sharding,
        optimizer: SlicedOptimizer,
        homes: Allocators,
    ) -> None:
        self._group, self._units, self._layout, self._optimizer = group, units, layout, optimizer
        self._allocator, self._sums_allocator = homes
        self._replicated = sharding.optim is REPLICATED
        # Who share the work of writing parameters; others don't need them, or have the same ones.
        writers = self._writers = group.intra_host if self._replicated else group
        self._written = {unit.name: unit.layout.part(writers.rank, writers.size) for unit in units}
        ranges = {unit.name: ranges_of(unit) for unit in units}
        longest = max((each.numel for several in ranges.values() for each in several), default=0)
        # A run's gradient, where it's summed, and where the state is. If that is elsewhere, one travels while another
        # one is used.
        self._summed = torch.zeros(longest, device=group.device)
        travels = self._allocator.device != group.device
        pinned = Allocator(self._allocator.device, pinned=travels)
        self._grads = [pinned.empty(longest, torch.float32) for _ in range(2)] if travels else [self._summed]
        self._arrived: deque[torch.cuda.Event | None] = deque()
        self._runs: dict[str, list[Run]] = {}
        numbers = count()
        for unit in units:
            self._runs[unit.name] = [self._run(unit, each, next(numbers)) for each in ranges[unit.name]]
        self._numbers = [torch.tensor(layout.block_numbers(rank), dtype=torch.int64) for rank in range(group.size)]
        self._updated = False  # before the first update
        self._full: dict[str, Tensor] = {}  # the step's gradient in fp32, where a second pass needs it
        blocks = {unit.name: unit.shard.numel // BLOCK for unit in units}
        self._norms = {name: torch.zeros(count, device=group.device) for name, count in blocks.items()}

    def _run(self, unit: Unit, within: Range, number: int) -> Run:
        slices, grads, grad = [], [], self._grads[number % len(self._grads)][: within.numel]
        for piece in unit.layout.pieces(within):
            start = piece.in_unit.start - unit.held.start
            grad_start = piece.in_unit.start - within.start
            shape = self._optimizer.shape_of(piece.slot.name, piece.in_unit.numel)
            master = unit.master[start : start + piece.in_unit.numel].view(shape)
            slices.append(Slice(piece.slot.name, piece.in_param.start, master))
            grads.append(grad[grad_start : grad_start + piece.in_unit.numel].view(shape))
        groups = self._optimizer.runs(slices)
        return Run(unit, within, tuple(slices), tuple(grads), groups, grad, self._evictable_weights(unit, within))

    def _evictable_weights(self, unit: Unit, within: Range) -> list[Tensor]:
        """The master weights and parameters of a run, where they leave the memory between updates."""
        if not self._allocator.on_disk:
            return []
        master = unit.master[within.start - unit.held.start : within.end - unit.held.start]
        if isinstance(unit.params, ReplicatedParams):
            return [] if _same_place(master, unit.params.kept(within)) else [master]
        writes = self._writes(unit, within)
        kept = unit.params.kept(writes)
        return [master] if _same_place(master, kept) else [master, kept]

    @property
    def slices(self) -> Iterator[tuple[Slice, Range]]:
        """All slices whose master weights and optimizer state this worker holds, and the elements of each (counted in
        the slice) that lie in its shard: all of them, unless every worker holds everything."""
        for runs in self._runs.values():
            for run in runs:
                for piece, whole in zip(run.slices, run.unit.layout.pieces(run.range), strict=True):
                    owned = whole.in_unit.overlap(run.unit.shard)
                    yield piece, Range(owned.start - whole.in_unit.start, owned.end - whole.in_unit.start)

    def update(
        self, reducer: GradientReducer, weight: float, clip_norm: float | None, unused: set[str], tag: str
    ) -> float:
        """Update this worker's weights and publish them; the gradient's norm before clipping. Collective.

        unused: parameters without a gradient in the whole step; they're left alone.
        """
        self._optimizer.refresh([run.groups for runs in self._runs.values() for run in runs])
        norm = scale = None
        if self._replicated or clip_norm is not None:
            self._sum_first(reducer, weight, tag)
            norm = self._all_gather_norm(tag)
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        waits: list[Callable[[], None]] = []
        coming: deque[Run] = deque()
        for unit in self._units:
            for run in self._runs[unit.name]:
                self._fetch(reducer, run, weight, scale)
                coming.append(run)
                if len(coming) == len(self._grads):
                    self._step(coming.popleft(), unused)
            while coming:
                self._step(coming.popleft(), unused)
            reducer.sums[unit.name].rest()
            waits += self._all_gather(unit, tag)  # while the next unit is updated
        if norm is None:
            norm = self._all_gather_norm(tag)
        for wait in waits:
            wait()
        if not self._updated:
            self._updated = True
            return_freed_memory()  # torch has made the optimizer's state, and left holes
        return norm

    def _all_gather(self, unit: Unit, tag: str) -> list[Callable[[], None]]:
        """Begin to give everyone my shard of what stays whole, or is one copy for all; what waits for theirs."""
        whole = unit.params.replicated
        return [] if whole is None else [self._writers.all_gather(whole, f"{tag} / {unit.name} / param")]

    def _full_start(self, unit: Unit) -> int:
        return 0 if self._replicated else unit.shard.start

    def _total(self, reducer: GradientReducer, unit: Unit, within: Range, weight: float, out: Tensor) -> None:
        """The step's gradient over `within`, which lies in the shard, and the norms of its blocks."""
        for run in runs_of(within):
            in_shard = Range(run.start - unit.shard.start, run.end - unit.shard.start)
            part = out[run.start - within.start : run.end - within.start]
            reducer.sums[unit.name].total(in_shard, weight, part)
            self._norms[unit.name][in_shard.start // BLOCK : in_shard.end // BLOCK] = block_norms(part)

    def _sum_first(self, reducer: GradientReducer, weight: float, tag: str) -> None:
        for unit in self._units:
            if unit.name not in self._full:
                self._full[unit.name] = (
                    self._group.empty_replicated(unit.layout.padded_numel, torch.float32)
                    if self._replicated
                    else self._sums_allocator.empty(unit.shard.numel, torch.float32)
                )
            full = self._full[unit.name][unit.shard.start - self._full_start(unit) :][: unit.shard.numel]
            self._total(reducer, unit, unit.shard, weight, full)
            reducer.sums[unit.name].rest()
            if not self._replicated:
                self._sums_allocator.evict(full)
        if self._replicated:
            waits = [
                self._group.all_gather(self._full[unit.name], f"{tag} / {unit.name} / grad") for unit in self._units
            ]
            for wait in waits:
                wait()

    def _fetch(self, reducer: GradientReducer, run: Run, weight: float, scale: float | None) -> None:
        """Begin to bring a run's gradient to its state."""
        for tensor in run.evictable:
            self._allocator.prefetch(tensor)
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
        """Update a run, as soon as its gradient is there."""
        event = self._arrived.popleft()
        if event is not None:
            event.synchronize()
        for piece, grad in zip(run.slices, run.grads, strict=True):
            piece.master.grad = None if piece.name in unused else grad
        self._optimizer.step(run.groups)
        self._finish(run)

    def _finish(self, run: Run) -> None:
        """Its master weights or state have changed: write the parameters, and let all of it go to where it's to be."""
        if self._allocator.on_disk:  # torch makes state when it wants to, in memory
            state = [tensor for piece in run.slices for tensor in self._optimizer.settle(piece, self._allocator)]
            run.evictable[:] = [*self._evictable_weights(run.unit, run.range), *state]
        self._write(run)
        for tensor in run.evictable:
            self._allocator.evict(tensor)

    def refill(self, fill: Callable[[Slice], None]) -> None:
        """Let `fill` give every slice its master weights and state, then make the parameters what these are.
        Collective."""
        for runs in self._runs.values():
            for run in runs:
                for piece in run.slices:
                    fill(piece)
                self._finish(run)
        for unit in self._units:
            for wait in self._all_gather(unit, "start"):
                wait()

    def _writes(self, unit: Unit, within: Range) -> Range:
        """The elements whose parameters this worker writes."""
        return within.overlap(self._written[unit.name])

    def _write(self, run: Run) -> None:
        unit, writes = run.unit, self._writes(run.unit, run.range)
        kept = unit.params.kept(writes)
        master = unit.master[writes.start - unit.held.start : writes.end - unit.held.start]
        if not _same_place(master, kept):
            kept.copy_(master)

    def _all_gather_norm(self, tag: str) -> float:
        norms = [self._norms[unit.name] for unit in self._units]
        norm = total_norm(self._in_block_order(norms, f"{tag} / norm / control"))
        if not norm < float("inf"):
            raise NumericsError(
                f"the sum of the step's gradients is not finite, though each micro-batch's is (norm {norm})",
                where=tag,
                hint="lower the learning rate or scale the loss, and go on from the last checkpoint",
            )
        return norm

    def hashes(self, tag: str) -> Tensor:
        """The hashes of all blocks of the master weights, [num_blocks] int64, in block order. Collective."""
        mine = [torch.empty(0, dtype=torch.int64)]  # a worker may own no block
        for unit in self._units:
            for run in runs_of(unit.shard):
                master = unit.master[run.start - unit.held.start : run.end - unit.held.start]
                mine.append(block_hashes(master).cpu())
                for tensor in self._evictable_weights(unit, run):
                    self._allocator.evict(tensor)
        return self._in_block_order(mine, f"{tag} / digest / control")

    def _in_block_order(self, mine: Sequence[Tensor], tag: str) -> Tensor:
        """Values of my shards' blocks, unit by unit -> those of all blocks of the model, on CPU, by number."""
        joined = torch.cat([*mine]).cpu()
        padded = joined.new_zeros(max(len(numbers) for numbers in self._numbers))
        padded[: len(joined)] = joined
        ordered = joined.new_zeros(self._layout.num_blocks)
        for numbers, values in zip(self._numbers, self._group.all_gather_small(padded, tag), strict=True):
            ordered[numbers] = values[: len(numbers)]
        return ordered


def _same_place(master: Tensor, kept: Tensor) -> bool:
    """Whether the parameters of a range are its master weights."""
    return master.data_ptr() == kept.data_ptr()
