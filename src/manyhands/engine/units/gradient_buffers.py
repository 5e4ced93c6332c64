"""The buffers in which a unit's gradients are collected and sent. step/gradient_sums.py adds received gradients.

- *Persistent*: one buffer that exists as long as the engine. In shared memory, peers read it in place.
- *Transient*: a buffer that exists from the unit's first gradient until all of its gradients have been sent. Peers get
  copies.
- *Ring*: a few shared buffers that all units use in turn. A buffer is reused once all workers have read it, so workers
  that share memory don't store a full model's gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.shard_layout import UnitLayout

IN_FLIGHT = 2
"""The maximum number of all-to-alls of gradients in flight at a time, if each needs its own buffer."""

RING_SLOTS = IN_FLIGHT + 1
"""The number of slots: one more than the all-to-alls in flight, so that the next unit can collect its gradients
meanwhile.
"""


class Gradients(ABC):
    """A unit's gradients of a micro-batch. Call `begin`, `buffer` any number of times, `send`, then `mark_read`.

    group: the workers whose gradients are added in each round.
    numel: the unit's padded_numel.
    """

    def __init__(self, group: Group, numel: int) -> None:
        self._group, self._numel, self.device = group, numel, group.device
        self._part_numel = numel // group.size
        self.all_to_all: AllToAll | None = None  # the most recent, if it may still read the buffer

    def begin(self) -> None:
        """Prepare for a micro-batch: if it will overwrite the previous gradients, wait until peers have read them."""
        if self.all_to_all is not None:
            self.all_to_all.wait_reusable()
            self.all_to_all = None

    @abstractmethod
    def buffer(self) -> Tensor:
        """Return the buffer for this worker's gradients, [padded_numel]."""

    @abstractmethod
    def send(self, contributors: range, tag: str) -> AllToAll:
        """Start the all-to-all of the gradients. Collective."""

    def mark_read(self) -> None:  # noqa: B027  (optional: a persistent buffer isn't freed)
        """Record that this worker has read all pieces that it received in the all-to-all, and has released them."""


class PersistentGradients(Gradients):
    """Gradients in elements [start, start + numel) of `contribution`, which all units of a dtype share."""

    def __init__(self, group: Group, numel: int, contribution: Contribution, start: int) -> None:
        super().__init__(group, numel)
        self._contribution, self._start = contribution, start

    def buffer(self) -> Tensor:
        return self._contribution.local[self._start : self._start + self._numel]

    def send(self, contributors: range, tag: str) -> AllToAll:
        self.all_to_all = self._group.all_to_all(self._contribution, self._start, self._part_numel, contributors, tag)
        return self.all_to_all


class TransientGradients(Gradients):
    """Gradients in a buffer that is created for the first gradient and freed when all have been sent."""

    def __init__(self, group: Group, numel: int, dtype: torch.dtype) -> None:
        super().__init__(group, numel)
        self._dtype = dtype
        self._contribution: Contribution | None = None

    def _mine(self) -> Contribution:
        if self._contribution is None:
            self._contribution = self._group.empty_contribution(self._numel, self._dtype)
        return self._contribution

    def buffer(self) -> Tensor:
        return self._mine().local

    def send(self, contributors: range, tag: str) -> AllToAll:
        self.all_to_all = self._group.all_to_all(self._mine(), 0, self._part_numel, contributors, tag)
        return self.all_to_all

    def mark_read(self) -> None:
        self.begin()
        self._mine().free()
        self._contribution = None


class Ring:
    """Buffers that the units of one dtype use in turn. The constructor is collective.

    Every unit is sent once per round, in a fixed order. Send n uses slot n modulo the number of slots, on all workers.
    numel: the number of elements of the largest unit. units: the number of units.
    """

    def __init__(self, group: Group, numel: int, dtype: torch.dtype, units: int) -> None:
        self.slots = [group.empty_contribution(numel, dtype) for _ in range(min(RING_SLOTS, units))]
        self._units = units
        self._sends = 0  # number of sends so far
        self._last_send: list[AllToAll | None] = [None for _ in self.slots]
        # True if a unit of this worker collects gradients in the slot, or if this worker has yet to read peers'
        # gradients from it.
        self._occupied = [False for _ in self.slots]

    def next_send_of(self, position: int) -> int:
        """Return the number of a unit's next send. position: the unit's position in the round's order of sends."""
        first = self._sends - self._sends % self._units
        return first + position if first + position >= self._sends else first + self._units + position

    def take(self, number: int) -> Tensor | None:
        """Return the slot for send `number`, or None if this is not the next send and the slot is not free.

        For the next send, wait until the slot is free. This can't deadlock: peers that still hold the slot are behind
        this worker, and have received everything that they need from this worker.
        """
        if number == self._sends:
            return self.wait_for(number)
        slot = number % len(self.slots)
        last = self._last_send[slot]
        too_early = number - self._sends >= len(self.slots)  # an earlier send will use the same slot
        if self._occupied[slot] or too_early or not (last is None or last.is_reusable):
            return None
        self._occupied[slot] = True
        return self.slots[slot].local

    def wait_for(self, number: int) -> Tensor:
        """Wait until all workers have read the slot of the next send, and return it."""
        slot = number % len(self.slots)
        last = self._last_send[slot]
        if last is not None:
            last.wait_reusable()
        self._occupied[slot] = True
        return self.slots[slot].local

    def mark_sent(self, number: int, all_to_all: AllToAll) -> None:
        """Record that this send has started."""
        slot = number % len(self.slots)
        self._last_send[slot], self._occupied[slot] = all_to_all, True
        self._sends = number + 1

    def mark_read(self, number: int) -> None:
        """Record that this worker has read all pieces of this send."""
        self._occupied[number % len(self.slots)] = False


class RingGradients(Gradients):
    """Gradients in a slot of a ring.

    If they arrive before the unit's turn and its slot isn't free, they are collected in a separate buffer, and copied
    to the slot when they are sent.
    """

    def __init__(self, group: Group, layout: UnitLayout, dtype: torch.dtype, ring: Ring, position: int) -> None:
        super().__init__(group, layout.padded_numel)
        self._gaps, self._dtype, self._ring, self._position = layout.gaps, dtype, ring, position
        self._number = -1  # number of the unit's current send
        self._buffer: Tensor | None = None
        self._in_ring = False

    def begin(self) -> None:
        self._buffer, self._in_ring = None, False

    def buffer(self) -> Tensor:
        if self._buffer is None:
            self._number = self._ring.next_send_of(self._position)
            slot = self._ring.take(self._number)
            self._in_ring = slot is not None
            if slot is None:
                slot = torch.empty(self._numel, dtype=self._dtype, device=self._group.device)
            # Zero the padding: norms and sums cover it, and the slot may hold another unit's gradients.
            for gap in self._gaps:
                slot[gap.start : gap.end].zero_()
            self._buffer = slot
        return self._buffer[: self._numel]

    def send(self, contributors: range, tag: str) -> AllToAll:
        self._number = self._ring.next_send_of(self._position)
        slot = self._ring.slots[self._number % len(self._ring.slots)]
        if self._buffer is not None and not self._in_ring:
            self._ring.wait_for(self._number)[: self._numel].copy_(self._buffer[: self._numel])
        self.all_to_all = self._group.all_to_all(slot, 0, self._part_numel, contributors, tag)
        self._ring.mark_sent(self._number, self.all_to_all)
        self._buffer = None
        return self.all_to_all

    def mark_read(self) -> None:
        self._ring.mark_read(self._number)
