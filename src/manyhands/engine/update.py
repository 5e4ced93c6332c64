"""The update: from the sums of a step's gradients to new weights, in one pass over runs of elements that stay in cache.

For each run of the shard: read the pieces, add, divide, clip, optimizer, write the parameters. A parameter that its
optimizer must see whole is a run of its own, however long. Two passes only where they are needed: to clip (the norm
comes first), and where every worker holds all optimizer state (it needs everyone's sums first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.comm.group import Group
from manyhands.engine.memory import give_back_memory
from manyhands.engine.reducer import Reducer
from manyhands.engine.sums import RUN
from manyhands.engine.unit import Unit
from manyhands.errors import NumericsError
from manyhands.layout import BLOCK, Layout, Range
from manyhands.numerics.blocks import block_hashes, block_norms, total_norm
from manyhands.optim.sliced import Slice, SlicedOptimizer
from manyhands.sharding.stage import REPLICATED, Stage


def runs_of(within: Range) -> Iterator[Range]:
    """`within` cut into runs of at most RUN elements."""
    for start in range(within.start, within.end, RUN):
        yield Range(start, min(start + RUN, within.end))


def ranges_of(unit: Unit) -> list[Range]:
    """What one pass of the update handles at a time: runs of elements, or whole parameters with their padding."""
    if not unit.layout.uncut:
        return list(runs_of(unit.held))
    return [slot.padded for slot in unit.layout.slots if slot.padded.overlap(unit.held).numel]


@dataclass(frozen=True)
class Run:
    """One pass: elements `range` of the unit (all held here), its slices, and the optimizer's groups over them."""

    unit: Unit
    range: Range
    slices: tuple[Slice, ...]
    grads: tuple[Tensor, ...]  # each slice's gradient, a view of the updater's one run of gradient
    groups: list[list[dict[str, Any]]]


class Updater:
    """See the module."""

    def __init__(
        self, group: Group, units: Sequence[Unit], layout: Layout, stage: Stage, optimizer: SlicedOptimizer
    ) -> None:
        self._group, self._units, self._layout, self._optimizer = group, units, layout, optimizer
        self._replicated = stage.optim is REPLICATED
        ranges = {unit.name: ranges_of(unit) for unit in units}
        longest = max((each.numel for several in ranges.values() for each in several), default=0)
        self._grad = torch.zeros(longest, device=group.device)
        self._runs = {unit.name: [self._run(unit, each) for each in ranges[unit.name]] for unit in units}
        self._numbers = [torch.tensor(layout.block_numbers(rank), dtype=torch.int64) for rank in range(group.size)]
        self._has_state = False  # before the first update
        self._full: dict[str, Tensor] = {}  # the step's gradient in fp32, where a second pass needs it
        self._norms: dict[str, Tensor] = {
            unit.name: torch.zeros(unit.shard.numel // BLOCK, device=group.device) for unit in units
        }

    def _run(self, unit: Unit, within: Range) -> Run:
        slices, grads = [], []
        for piece in unit.layout.pieces(within):
            start = piece.in_unit.start - unit.held.start
            grad_start = piece.in_unit.start - within.start
            shape = self._optimizer.shape_of(piece.slot.name, piece.in_unit.numel)
            master = unit.master[start : start + piece.in_unit.numel].view(shape)
            slices.append(Slice(piece.slot.name, piece.in_param.start, master))
            grads.append(self._grad[grad_start : grad_start + piece.in_unit.numel].view(shape))
        return Run(unit, within, tuple(slices), tuple(grads), self._optimizer.runs(slices))

    @property
    def slices(self) -> Iterator[tuple[Slice, Range]]:
        """All slices whose master weights and optimizer state this worker holds, and the elements of each (counted in
        the slice) that lie in its shard: all of them, unless every worker holds everything."""
        for runs in self._runs.values():
            for run in runs:
                for piece, whole in zip(run.slices, run.unit.layout.pieces(run.range), strict=True):
                    owned = whole.in_unit.overlap(run.unit.shard)
                    yield piece, Range(owned.start - whole.in_unit.start, owned.end - whole.in_unit.start)

    def update(self, reducer: Reducer, weight: float, clip_norm: float | None, unused: set[str], tag: str) -> float:
        """Update this worker's weights and publish them; the gradient's norm before clipping. Collective.

        unused: parameters without a gradient in the whole step; they're left alone.
        """
        self._optimizer.refresh([run.groups for runs in self._runs.values() for run in runs])
        norm = scale = None
        if self._replicated or clip_norm is not None:
            self._sum_first(reducer, weight, tag)
            norm = self._gather_norm(tag)
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        waits: list[Callable[[], None]] = []
        for unit in self._units:
            for run in self._runs[unit.name]:
                grad = self._grad[: run.range.numel]
                if scale is None:
                    self._total(reducer, unit, run.range, weight, grad)
                else:
                    full = self._full[unit.name][run.range.start - self._full_start(unit) :]
                    torch.mul(full[: run.range.numel], scale, out=grad)
                self._step(run, unused)
            if self._publishes:  # while the next unit is updated
                waits.append(self._group.publish(unit.params, f"{tag} / {unit.name} / param"))
        if norm is None:
            norm = self._gather_norm(tag)
        for wait in waits:
            wait()
        if not self._has_state:
            self._has_state = True
            give_back_memory()  # torch has made the optimizer's state, and left holes
        return norm

    @property
    def _publishes(self) -> bool:
        return not self._replicated or self._group.shares_memory

    def _full_start(self, unit: Unit) -> int:
        return 0 if self._replicated else unit.shard.start

    def _total(self, reducer: Reducer, unit: Unit, within: Range, weight: float, out: Tensor) -> None:
        """The step's gradient over `within`, which lies in the shard, and the norms of its blocks."""
        for run in runs_of(within):
            in_shard = Range(run.start - unit.shard.start, run.end - unit.shard.start)
            part = out[run.start - within.start : run.end - within.start]
            reducer.sums[unit.name].total(in_shard, weight, part)
            self._norms[unit.name][in_shard.start // BLOCK : in_shard.end // BLOCK] = block_norms(part)

    def _sum_first(self, reducer: Reducer, weight: float, tag: str) -> None:
        for unit in self._units:
            if unit.name not in self._full:
                self._full[unit.name] = (
                    self._group.empty_replicated(unit.layout.padded_numel, torch.float32)
                    if self._replicated
                    else torch.zeros(unit.shard.numel, device=self._group.device)
                )
            full = self._full[unit.name][unit.shard.start - self._full_start(unit) :]
            self._total(reducer, unit, unit.shard, weight, full[: unit.shard.numel])
        if self._replicated:
            waits = [self._group.publish(self._full[unit.name], f"{tag} / {unit.name} / grad") for unit in self._units]
            for wait in waits:
                wait()

    def _step(self, run: Run, unused: set[str]) -> None:
        for piece, grad in zip(run.slices, run.grads, strict=True):
            piece.master.grad = None if piece.name in unused else grad
        self._optimizer.step(run.groups)
        self._write(run)

    def refresh_params(self) -> None:
        """Make the parameters what the master weights are (after loading them). Collective."""
        for runs in self._runs.values():
            for run in runs:
                self._write(run)
        for unit in self._units:
            if self._publishes:
                self._group.publish(unit.params, f"start / {unit.name} / param")()

    def _write(self, run: Run) -> None:
        unit = run.unit
        writes = run.range.overlap(unit.shard) if self._group.shares_memory else run.range
        if writes.numel and not is_view_of(unit.master, unit.params):
            master = unit.master[writes.start - unit.held.start : writes.end - unit.held.start]
            unit.params[writes.start : writes.end].copy_(master)

    def _gather_norm(self, tag: str) -> float:
        norm = total_norm(
            self._in_block_order([self._norms[unit.name] for unit in self._units], f"{tag} / norm / control")
        )
        if not norm < float("inf"):
            raise NumericsError(
                f"the sum of the step's gradients is not finite, though each micro-batch's is (norm {norm})",
                where=tag,
                hint="lower the learning rate or scale the loss, and go on from the last checkpoint",
            )
        return norm

    def hashes(self, tag: str) -> Tensor:
        """The hashes of all blocks of the master weights, [num_blocks] int64, in block order. Collective."""
        mine = [torch.empty(0, dtype=torch.int64, device=self._group.device)]  # a worker may own no block
        for unit in self._units:
            for run in runs_of(unit.shard):
                mine.append(block_hashes(unit.master[run.start - unit.held.start : run.end - unit.held.start]))
        return self._in_block_order(mine, f"{tag} / digest / control")

    def _in_block_order(self, mine: Sequence[Tensor], tag: str) -> Tensor:
        """Values of my shards' blocks, unit by unit -> those of all blocks of the model, on CPU, by number."""
        joined = torch.cat([*mine]).cpu()
        padded = joined.new_zeros(max(len(numbers) for numbers in self._numbers))
        padded[: len(joined)] = joined
        ordered = joined.new_zeros(self._layout.num_blocks)
        for numbers, values in zip(self._numbers, self._group.gather(padded, tag), strict=True):
            ordered[numbers] = values[: len(numbers)]
        return ordered


def is_view_of(view: Tensor, base: Tensor) -> bool:
    """Whether both share one storage."""
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
