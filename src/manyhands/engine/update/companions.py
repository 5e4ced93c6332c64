"""State of islands that is stored beside the master weights, in the same layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.engine.units.unit import Unit
from manyhands.islands import Islands
from manyhands.offload.allocator import Allocator
from manyhands.shard_layout import Range

OUTER, VELOCITY = "outer weights", "outer velocity"
"""The weights and the momentum that all islands share. They change in outer steps only."""

RESIDUAL, PUBLISHED = "codec residual", "published weights"
"""What the codec rounded away from an island's last change; and the island's weights at the end of its last round."""

KINDS = (OUTER, VELOCITY, RESIDUAL, PUBLISHED)
"""No optimizer has a state of these names."""


def kinds_for(islands: Islands | None, *, pretrained: bool) -> tuple[str, ...]:
    """Return the kinds that a recipe with these islands needs."""
    if islands is None:
        return ()
    needed = {
        OUTER: True,
        VELOCITY: islands.has_momentum(pretrained=pretrained),
        RESIDUAL: islands.has_error_feedback,
        PUBLISHED: islands.delay > 0,
    }
    return tuple(kind for kind in KINDS if needed[kind])


class Companions:
    """Tensors of some kinds for all elements whose master weights this worker holds, fp32. They begin as zeros."""

    def __init__(self, kinds: Sequence[str], units: Sequence[Unit], allocator: Allocator) -> None:
        self.kinds, self._allocator = tuple(kinds), allocator
        self._of_unit = {
            unit.name: {kind: allocator.empty(unit.held.numel, torch.float32) for kind in kinds} for unit in units
        }

    def of(self, unit: Unit, within: Range) -> dict[str, Tensor]:
        """Return the tensors of a part of the unit's `held` elements, by kind."""
        start, end = within.start - unit.held.start, within.end - unit.held.start
        return {kind: tensor[start:end] for kind, tensor in self._of_unit[unit.name].items()}

    def exchange(self, kind: str, unit: Unit, within: Range, master: Tensor, buffer: Tensor) -> None:
        """Exchange the values of master weights and of one kind. buffer: as long as the part; it is overwritten."""
        tensor = self.of(unit, within)[kind]
        buffer.copy_(master)
        master.copy_(tensor)
        tensor.copy_(buffer)

    def evict(self, unit: Unit, within: Range) -> None:
        """Evict a part to disk if it is stored there."""
        if self._allocator.on_disk:
            for tensor in self.of(unit, within).values():
                self._allocator.evict(tensor)
