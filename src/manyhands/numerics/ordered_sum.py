"""The one order in which the gradients of a step are added, and `OrderedSum`, which adds values in this order.

A step has `V` virtual workers with `accumulate` micro-batches each. Micro-batch `i = v * accumulate + a` is the `a`-th
micro-batch of virtual worker `v`. The sum is *defined* as follows. In each virtual worker, micro-batches are added in
the order of `a`. Then the sums of the virtual workers are added by a binary-counter tree: equal-sized neighbours are
added as left + right, and the remaining subtrees are added from the right.

    V = 6:   ((0+1)+(2+3)) + (4+5)            V = 7:   ((0+1)+(2+3)) + ((4+5)+6)

The order decides the bits of every result, because floating-point addition isn't associative. It depends on the recipe
alone, never on the number of workers. This module has only pure functions of integers, and sums of any values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Subtree(NamedTuple):
    """A complete subtree of the sum: virtual workers [start, start + 2**level)."""

    start: int
    level: int

    @property
    def end(self) -> int:
        return self.start + (1 << self.level)


def maximal_subtrees(start: int, end: int) -> tuple[Subtree, ...]:
    """Divide virtual workers [start, end) into as few complete subtrees as possible. Return the subtrees in order.

    If the number of virtual workers is a power of two and divides `start`, there is one subtree. There are at most 2 *
    log2(end - start) + 1 subtrees.
    """
    subtrees = []
    while start < end:
        # The size of a subtree must divide its start, so the size is at most the lowest set bit of `start`.
        level = (start & -start).bit_length() - 1 if start else end.bit_length()
        while start + (1 << level) > end:
            level -= 1
        subtrees.append(Subtree(start, level))
        start += 1 << level
    return tuple(subtrees)


def run_of_virtual_workers(rank: int, workers: int, virtual_workers: int) -> range:
    """Return the contiguous virtual workers that `rank` computes if gradients are exchanged once per step."""
    return range(rank * virtual_workers // workers, (rank + 1) * virtual_workers // workers)


def micro_batch_of_round(round_index: int, rank: int, workers: int, micro_batches: int) -> int | None:
    """Return the micro-batch of `rank` in a round if gradients are exchanged every micro-batch, or None if it has
    none.
    """
    index = round_index * workers + rank
    return index if index < micro_batches else None


def num_rounds(workers: int, micro_batches: int) -> int:
    """Return the number of rounds in a step if gradients are exchanged every micro-batch."""
    return -(-micro_batches // workers)


class OrderedSum(Generic[T]):
    """The sum of a step's gradients, added in index order. It holds at most log2(V) + 2 partial sums.

    own(value): takes a value of the caller, and returns an equal value that the sum may store and overwrite.
    add(left, right): returns left + right, stored in `left`. It must not overwrite `right`, which may be a value of the
    caller.
    free(value): called with each owned value that the sum no longer needs.
    """

    def __init__(
        self,
        accumulate: int,
        *,
        own: Callable[[T], T],
        add: Callable[[T, T], T],
        free: Callable[[T], None] = lambda value: None,
    ) -> None:
        self.accumulate = accumulate
        self._own, self._add, self._free = own, add, free
        self._stack: list[tuple[int, T]] = []  # (level, partial sum); levels decrease from left to right
        self._current: T | None = None  # the partial sum of the virtual worker in progress
        self._in_current = 0

    def add_micro_batch(self, value: T) -> None:
        """Add the next micro-batch's gradient. It is not overwritten."""
        if self.accumulate == 1:
            self.push(value, 0)
            return
        self._current = self._own(value) if self._current is None else self._add(self._current, value)
        self._in_current += 1
        if self._in_current == self.accumulate:
            complete = self._current
            self._current, self._in_current = None, 0
            self._push_owned(complete, 0)

    def push(self, value: T, level: int) -> None:
        """Add the next complete subtree, of 2**level virtual workers. It is not overwritten."""
        if self._stack and self._stack[-1][0] == level:
            self._push_owned(self._add(self._stack.pop()[1], value), level + 1)
        else:
            self._stack.append((level, self._own(value)))

    def _push_owned(self, value: T, level: int) -> None:
        """Add a subtree that the sum may overwrite, and merge it with equal-sized neighbours to its left."""
        while self._stack and self._stack[-1][0] == level:
            left = self._add(self._stack.pop()[1], value)
            self._free(value)
            value, level = left, level + 1
        self._stack.append((level, value))

    def fold(self) -> T:
        """Return the total, which the caller owns from now on. The sum is empty afterwards."""
        total = self._stack.pop()[1]
        while self._stack:
            left = self._add(self._stack.pop()[1], total)
            self._free(total)
            total = left
        return total

    def part(
        self, select: Callable[[T], T], own: Callable[[T], T], add: Callable[[T, T], T], free: Callable[[T], None]
    ) -> OrderedSum[T]:
        """Return the same sum over a part of every value.

        select(value): returns the part, as a view that may be overwritten. own, add, free: as in the constructor.
        """
        part: OrderedSum[T] = OrderedSum(self.accumulate, own=own, add=add, free=free)
        part._stack = [(level, select(value)) for level, value in self._stack]
        part._current = None if self._current is None else select(self._current)
        part._in_current = self._in_current
        return part

    def clear(self) -> None:
        """Discard all values, and free those that `own` returned. Call it after the parts were folded, or on abort."""
        for _, value in self._stack:
            self._free(value)
        if self._current is not None:
            self._free(self._current)
        self._stack, self._current, self._in_current = [], None, 0
