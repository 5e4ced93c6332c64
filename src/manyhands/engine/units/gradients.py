"""The buffers in which a unit's gradients are collected and from which they are sent.

Kept: one buffer for as long as the engine lives; others read it in place. Passing: a buffer of its own from the first
gradient until they have left; others get copies. Ring: a place in a few buffers that all units use in turn, each
again once everyone has read it; so workers that share memory need not keep a model's gradients either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.layout import UnitLayout

IN_FLIGHT = 2
"""Exchanges of gradients under way at a time, where each has a buffer of its own."""

RING_SLOTS = IN_FLIGHT + 1
"""One more, so that there is a place for what comes next while as many as that are under way."""


class Gradients(ABC):
    """A unit's gradients of a micro-batch: `begin`, `place` as often as wanted, `send`, `sent`.

    group: the workers whose gradients are added in each round.
    """

    def __init__(self, group: Group, numel: int) -> None:
        self._group, self._numel, self.device = group, numel, group.device
        self._part_numel = numel // group.size
        self.all_to_all: AllToAll | None = None  # the last one

    def begin(self) -> None:
        """A micro-batch begins: wait until the others have read what was given last, if its place is needed."""
        if self.all_to_all is not None:
            self.all_to_all.wait_reusable()
            self.all_to_all = None

    @abstractmethod
    def place(self) -> Tensor:
        """Where this worker's gradients go, [padded_numel]."""

    @abstractmethod
    def send(self, contributors: range, tag: str) -> AllToAll:
        """Begin to exchange them. Collective."""

    def sent(self) -> None:  # noqa: B027  (where the place stays)
        """The exchange is over on this worker."""


class KeptGradients(Gradients):
    """In `contribution` from `start` on."""

    def __init__(self, group: Group, numel: int, contribution: Contribution, start: int) -> None:
        super().__init__(group, numel)
        self._contribution, self._start = contribution, start

    def place(self) -> Tensor:
        return self._contribution.local[self._start : self._start + self._numel]

    def send(self, contributors: range, tag: str) -> AllToAll:
        self.all_to_all = self._group.all_to_all(self._contribution, self._start, self._part_numel, contributors, tag)
        return self.all_to_all


class PassingGradients(Gradients):
    """In a buffer that comes with the first gradient and goes when they have left."""

    def __init__(self, group: Group, numel: int, dtype: torch.dtype) -> None:
        super().__init__(group, numel)
        self._dtype = dtype
        self._contribution: Contribution | None = None

    def _mine(self) -> Contribution:
        if self._contribution is None:
            self._contribution = self._group.empty_contribution(self._numel, self._dtype)
        return self._contribution

    def place(self) -> Tensor:
        return self._mine().local

    def send(self, contributors: range, tag: str) -> AllToAll:
        self.all_to_all = self._group.all_to_all(self._mine(), 0, self._part_numel, contributors, tag)
        return self.all_to_all

    def sent(self) -> None:
        self.begin()
        self._mine().free()
        self._contribution = None


class Ring:
    """The buffers that the units of one dtype use in turn. Making one is collective.

    Every unit is sent once a round, in one order; the n-th send uses buffer n modulo their number, on all workers.
    """

    def __init__(self, group: Group, numel: int, dtype: torch.dtype, units: int) -> None:
        self.slots = [group.empty_contribution(numel, dtype) for _ in range(min(RING_SLOTS, units))]
        self._units = units
        self._sends = 0  # so far
        self._used: list[AllToAll | None] = [None for _ in self.slots]
        self._taken = [False for _ in self.slots]  # a unit of mine collects there, or I haven't read the others' yet

    def number_of(self, position: int) -> int:
        """The number of the next send of the unit that comes `position`-th in each round."""
        first = self._sends - self._sends % self._units
        return first + position if first + position >= self._sends else first + self._units + position

    def take(self, number: int) -> Tensor | None:
        """The place of that send: of the next one as soon as it is free, of a later one if it is free by now.

        Waiting for the next one's place is waiting for others that are behind, and need nothing of this worker to come
        on: it has sent all that they read before they send what is still missing here.
        """
        if number == self._sends:
            return self.wait_for(number)
        slot = number % len(self.slots)
        last = self._used[slot]
        if self._taken[slot] or number - self._sends >= len(self.slots) or not (last is None or last.is_reusable):
            return None
        self._taken[slot] = True
        return self.slots[slot].local

    def wait_for(self, number: int) -> Tensor:
        """The place of the next send, as soon as everyone has read what was there."""
        slot = number % len(self.slots)
        last = self._used[slot]
        if last is not None:
            last.wait_reusable()
        self._taken[slot] = True
        return self.slots[slot].local

    def sends(self, number: int, all_to_all: AllToAll) -> None:
        """The send of that number has begun."""
        slot = number % len(self.slots)
        self._used[slot], self._taken[slot] = all_to_all, True
        self._sends = number + 1

    def read(self, number: int) -> None:
        """I have read everyone's pieces of that send."""
        self._taken[number % len(self.slots)] = False


class RingGradients(Gradients):
    """In a ring's buffer; if gradients come before it's the unit's turn, and that one isn't free, in one of its own."""

    def __init__(self, group: Group, layout: UnitLayout, dtype: torch.dtype, ring: Ring, position: int) -> None:
        super().__init__(group, layout.padded_numel)
        self._gaps, self._dtype, self._ring, self._position = layout.gaps, dtype, ring, position
        self._number = -1
        self._place: Tensor | None = None
        self._in_ring = False

    def begin(self) -> None:
        self._place, self._in_ring = None, False

    def place(self) -> Tensor:
        if self._place is None:
            self._number = self._ring.number_of(self._position)
            slot = self._ring.take(self._number)
            self._in_ring = slot is not None
            if slot is None:
                slot = torch.empty(self._numel, dtype=self._dtype, device=self._group.device)
            for gap in self._gaps:  # another unit's gradients were there
                slot[gap.start : gap.end].zero_()
            self._place = slot
        return self._place[: self._numel]

    def send(self, contributors: range, tag: str) -> AllToAll:
        self._number = self._ring.number_of(self._position)
        slot = self._ring.slots[self._number % len(self._ring.slots)]
        if self._place is not None and not self._in_ring:
            self._ring.wait_for(self._number)[: self._numel].copy_(self._place[: self._numel])
        self.all_to_all = self._group.all_to_all(slot, 0, self._part_numel, contributors, tag)
        self._ring.sends(self._number, self.all_to_all)
        self._place = None
        return self.all_to_all

    def sent(self) -> None:
        self._ring.read(self._number)
