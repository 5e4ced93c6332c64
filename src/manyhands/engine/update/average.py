"""Maintains an average of the weights, run by run, in the same layout as the master weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.average import Average
from manyhands.engine.units.unit import Unit
from manyhands.offload.allocator import Allocator
from manyhands.shard_layout import Range


class WeightAverage:
    """The average of the weights on this worker. It covers all elements whose master weights the worker holds.

    An update moves the average towards the weights: average += rate * (weights - average). The subtraction, the product
    and the sum are each rounded separately. torch's `lerp` and `add(alpha=...)` compute some elements with fused
    operations and others without, so their bits would depend on the sharding.

    rule: the recipe's average; None if there is none, in which case all methods do nothing.
    count: the number of weights in the average. It is 0 before the average has begun.
    """

    def __init__(self, rule: Average | None, units: Sequence[Unit], allocator: Allocator) -> None:
        self._rule, self._allocator = rule, allocator
        averaged = units if rule is not None else ()
        self._of_unit = {unit.name: allocator.empty(unit.held.numel, torch.float32) for unit in averaged}
        self.count = 0
        self._begins = False
        self._rate: float | None = None  # None: this step does not update the average

    @property
    def has_begun(self) -> bool:
        """Return True if there is an average that differs from the weights."""
        return self.count > 0

    def of(self, unit: Unit, within: Range) -> Tensor | None:
        """Return the average of a part of the unit's `held` elements, or None if the recipe has no average."""
        average = self._of_unit.get(unit.name)
        return None if average is None else average[within.start - unit.held.start : within.end - unit.held.start]

    def begin_step(self, step: int) -> None:
        """Decide whether a step begins or updates the average, and at which rate. step: its number, counted from 1."""
        if self._rule is not None:
            self._begins = not self.count and step > self._rule.start
            self.count += self._begins
            self._rate = self._rule.rate(self.count) if self._rule.is_due(step) else None

    def end_step(self) -> None:
        """Count the weights that the step has added."""
        self.count += self._rate is not None
        self._begins, self._rate = False, None

    def prefetch(self, unit: Unit, within: Range) -> None:
        """Start to read this part from disk if this step will update it."""
        average = self.of(unit, within)
        if average is not None and self._rate is not None and not self._begins:
            self._allocator.prefetch(average)

    def before_update(self, unit: Unit, within: Range, master: Tensor) -> None:
        """Begin the average of a part of a unit with its weights before the step, if this step begins it."""
        average = self.of(unit, within)
        if average is not None and self._begins:
            average.copy_(master)

    def after_update(self, unit: Unit, within: Range, master: Tensor, buffer: Tensor) -> None:
        """Update the average of a part of a unit, if the step is due.

        buffer: as long as the part; it is overwritten.
        """
        average = self.of(unit, within)
        if average is not None and self._rate is not None:
            torch.sub(master, average, out=buffer)
            average.add_(buffer.mul_(self._rate))
        self.evict(unit, within)

    def exchange(self, unit: Unit, within: Range, master: Tensor, buffer: Tensor) -> None:
        """Exchange the values of master weights and average. buffer: as long as the part; it is overwritten."""
        average = self.of(unit, within)
        if average is not None:
            buffer.copy_(master)
            master.copy_(average)
            average.copy_(buffer)
        self.evict(unit, within)

    def evict(self, unit: Unit, within: Range) -> None:
        """Evict a part to disk if it is stored there. Before the average begins, no part has been used."""
        average = self.of(unit, within)
        if average is not None and self.count and self._allocator.on_disk:
            self._allocator.evict(average)
