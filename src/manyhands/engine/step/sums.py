"""Ordered sums of tensors, and their scratch buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from manyhands.layout import Range
from manyhands.numerics.order import OrderedSum, Subtree
from manyhands.offload.allocator import Allocator

RUN = 1 << 19
"""Elements that one pass of the update handles at a time: small enough to stay in a core's cache."""

PASS = 1 << 16
"""Elements that a CPU adds at a time in a backward: with so few operations on them fewer are better."""


class Scratch:
    """fp32 buffers of a given size at `home`, used again and again (a fresh one costs page faults)."""

    def __init__(self, numel: int, allocator: Allocator) -> None:
        self.numel, self._allocator = numel, allocator
        self._free: list[Tensor] = []
        self._mine: dict[int, Tensor] = {}

    def take(self, numel: int) -> Tensor:
        """A buffer of at most `numel` elements, uninitialised, to be given back with `free`."""
        buffer = self._free.pop() if self._free else self._allocator.empty(self.numel, torch.float32)
        self._mine[buffer.data_ptr()] = buffer
        return buffer[:numel]

    def free(self, value: Tensor) -> None:
        """Take `value` back, if it's from here."""
        buffer = self._mine.pop(value.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def rest(self) -> None:
        """What is in use isn't wanted for a while."""
        for buffer in self._mine.values():
            self._allocator.evict(buffer)

    @property
    def num_bytes(self) -> int:
        """All that it holds."""
        return (len(self._free) + len(self._mine)) * self.numel * 4


class Adder:
    """left += right in fp32, of at most RUN elements. A bf16 `right` goes through a small fp32 buffer, which is twice
    as fast on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._widened = torch.empty(RUN, device=device)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return left.add_(right if right.dtype == torch.float32 else self._widened[: left.numel()].copy_(right))


class Passes:
    """What an ordered sum does with long tensors of one length, noted first and then done part by part: where several
    pieces are added at a time, a sum passes through memory once for all of them."""

    def __init__(self, adder: Adder, scratch: Scratch) -> None:
        self._adder, self._scratch = adder, scratch
        self._noted: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = []

    def sum(self, accumulate: int) -> OrderedSum[Tensor]:
        """A sum in buffers of `scratch`, whose values are there once the pass is `done`."""
        return OrderedSum(
            accumulate,
            own=lambda value: self._note(Tensor.copy_, self._scratch.take(value.numel()), value),
            add=partial(self._note, self._adder),
            free=self._scratch.free,
        )

    def _note(self, do: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        self._noted.append((do, left, right))
        return left

    def done(self) -> None:
        """Do all that was noted."""
        numel, on_cpu = max(((left.numel(), left.is_cpu) for _, left, _ in self._noted), default=(0, True))
        size = PASS if on_cpu else RUN
        for start in range(0, numel, size):
            for do, left, right in self._noted:
                do(left[start : start + size], right[start : start + size])
        self._noted.clear()


class ShardSum:
    """The sum of a step's gradients over one shard, [shard_numel].

    Pieces are borrowed. Those of earlier rounds are added at once; those of the last (`keep`) only when `total` passes
    over them, run by run, so that on one host nothing is ever copied for them.
    """

    def __init__(self, accumulate: int, adder: Adder, whole: Scratch, run: Scratch) -> None:
        self._adder, self._whole, self._run = adder, whole, run
        self._passes = Passes(adder, whole)
        self._sum = self._passes.sum(accumulate)
        self._kept: list[tuple[int | None, Tensor]] = []

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Add the next micro-batches' pieces now."""
        for piece in pieces:
            self._sum.add_micro_batch(piece)
        self._passes.done()

    def rest(self) -> None:
        """Nothing will be added for a while."""
        self._whole.rest()

    def keep(self, piece: Tensor, level: int | None = None) -> None:
        """Add a piece later: the next micro-batch's, or that of the next complete subtree of this level."""
        self._kept.append((level, piece))

    def total(self, run: Range, divisor: float, out: Tensor) -> None:
        """Write the total over elements [start, end) of the shard, divided, into `out`. Once for each element."""
        cut = slice(run.start, run.end)
        kept = [(level, piece[cut]) for level, piece in self._kept]
        # Pieces of fp32 are read where they are, two of them are added in one pass, and the first sum is made in `out`.
        in_place = {piece.data_ptr() for _, piece in kept if piece.dtype == torch.float32}
        places = [out]

        def place() -> Tensor:
            return places.pop() if places else self._run.take(out.numel())

        def own(value: Tensor) -> Tensor:
            return value if value.data_ptr() in in_place else place().copy_(value)

        def add(left: Tensor, right: Tensor) -> Tensor:
            return torch.add(left, right, out=place()) if left.data_ptr() in in_place else self._adder(left, right)

        def free(value: Tensor) -> None:
            places.append(out) if value is out else self._run.free(value)

        part = self._sum.part(lambda value: value[cut], own=own, add=add, free=free)
        for level, piece in kept:
            part.add_micro_batch(piece) if level is None else part.push(piece, level)
        total = part.fold()
        torch.div(total, divisor, out=out)
        self._run.free(total)

    def clear(self) -> None:
        """Drop everything, after all totals were taken or on abort."""
        self._sum.clear()
        self._kept.clear()


class LocalSums:
    """What is added before gradients are exchanged once a step: the maximal complete subtrees of a run.

    values: for each subtree its sum over this worker's part of a unit, complete once all micro-batches were added.
    """

    def __init__(self, subtrees: Sequence[Subtree], accumulate: int, adder: Adder, scratch: Scratch) -> None:
        self._subtrees, self._accumulate = subtrees, accumulate
        self._scratch, self._added = scratch, 0
        self._passes = Passes(adder, scratch)
        self._sum = self._passes.sum(accumulate)  # of the subtree that isn't complete
        self.values: list[Tensor] = []

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Add the pieces of the run's next micro-batches (borrowed)."""
        for piece in pieces:
            self._sum.add_micro_batch(piece)
            self._added += 1
            if self._added == self._accumulate << self._subtrees[len(self.values)].level:
                self.values.append(self._sum.fold())
                self._added = 0
        self._passes.done()

    def clear(self) -> None:
        """Give all buffers back."""
        for value in self.values:
            self._scratch.free(value)
        self._sum.clear()
        self.values.clear()
        self._added = 0
