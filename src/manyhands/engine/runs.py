"""What the update does at a time: runs of elements that stay in a core's cache, or whole parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhands.engine.sums import RUN
from manyhands.engine.unit import Unit
from manyhands.layout import Range
from manyhands.optim.sliced import Slice


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
    grads: tuple[Tensor, ...]  # each slice's gradient, a view of `grad`
    groups: list[list[dict[str, Any]]]
    grad: Tensor  # [range.numel], where the state is; of one of the updater's buffers
    at_home: list[Tensor]  # what is let go after an update
