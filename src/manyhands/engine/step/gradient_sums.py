"""Adds the gradients of micro-batches in their one order (numerics/ordered_sum.py), in reusable buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from manyhands.numerics.ordered_sum import OrderedSum, Subtree
from manyhands.offload.allocator import Allocator
from manyhands.shard_layout import Range

RUN = 1 << 19
"""The number of elements that the update processes at a time: few enough to stay in a core's cache.

It must be a multiple of BLOCK, because block norms are computed per run. Neither RUN nor PASS changes the bits.
"""

PASS = 1 << 16
"""The number of elements that a CPU adds at a time during backward.

Parts smaller than RUN are faster for these sums, which have few operations per element.
"""


class SumBuffers:
    """Reusable fp32 buffers of `numel` elements from an allocator. A new buffer would cost page faults."""

    def __init__(self, numel: int, allocator: Allocator) -> None:
        self.numel, self._allocator = numel, allocator
        self._free: list[Tensor] = []
        self._in_use: dict[int, Tensor] = {}  # by address

    def take(self, numel: int) -> Tensor:
        """Return an uninitialized buffer of `numel` elements, at most `self.numel`. Give it back with `free`."""
        buffer = self._free.pop() if self._free else self._allocator.empty(self.numel, torch.float32)
        self._in_use[buffer.data_ptr()] = buffer
        return buffer[:numel]

    def free(self, value: Tensor) -> None:
        """Take a buffer back. Does nothing if `value` isn't one of these buffers."""
        buffer = self._in_use.pop(value.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def evict(self) -> None:
        """Evict the buffers in use from memory to disk, if they are offloaded, because they will not be needed soon."""
        for buffer in self._in_use.values():
            self._allocator.evict(buffer)

    @property
    def num_bytes(self) -> int:
        """Return the size of all buffers in bytes, free or in use."""
        return (len(self._free) + len(self._in_use)) * self.numel * 4


class Adder:
    """Computes left += right in fp32 for at most RUN elements.

    A bf16 `right` is first copied to a small fp32 buffer, because this is twice as fast on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._widened = torch.empty(RUN, device=device)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return left.add_(right if right.dtype == torch.float32 else self._widened[: left.numel()].copy_(right))


class Passes:
    """Records the operations of an ordered sum over long tensors of one length, and runs them part by part.

    If several pieces are added at a time, the sum passes through memory only once for all of them.
    """

    def __init__(self, adder: Adder, buffers: SumBuffers) -> None:
        self._adder, self._buffers = adder, buffers
        self._recorded: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = []

    def sum(self, accumulate: int) -> OrderedSum[Tensor]:
        """Return a sum in `buffers`. Its values are valid after `run`."""
        return OrderedSum(
            accumulate,
            own=lambda value: self._record(Tensor.copy_, self._buffers.take(value.numel()), value),
            add=partial(self._record, self._adder),
            free=self._buffers.free,
        )

    def _record(self, operation: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        self._recorded.append((operation, left, right))
        return left

    def run(self) -> None:
        """Run all recorded operations in order on each part of the elements, one part after another."""
        numel, on_cpu = max(((left.numel(), left.is_cpu) for _, left, _ in self._recorded), default=(0, True))
        size = PASS if on_cpu else RUN
        # All operations are elementwise, so the size of the parts doesn't change the bits.
        for start in range(0, numel, size):
            for operation, left, right in self._recorded:
                operation(left[start : start + size], right[start : start + size])
        self._recorded.clear()


class ShardSum:
    """The sum of a step's gradients over one shard, [shard_numel].

    The pieces belong to the caller and are never overwritten. Pieces of all rounds but the last are added immediately
    (`add`). Pieces of the last round are only recorded (`defer`). `total` adds them later, a run of at most RUN
    elements at a time, and reads fp32 pieces where they are. So workers that share memory never copy these pieces.

    shard_buffers: buffers of a shard's length for partial sums. run_buffers: buffers of RUN elements for `total`.
    """

    def __init__(self, accumulate: int, adder: Adder, shard_buffers: SumBuffers, run_buffers: SumBuffers) -> None:
        self._adder, self._shard_buffers, self._run_buffers = adder, shard_buffers, run_buffers
        self._passes = Passes(adder, shard_buffers)
        self._sum = self._passes.sum(accumulate)
        self._deferred: list[tuple[int | None, Tensor]] = []  # level (None: a micro-batch) and piece

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Add the next micro-batches' pieces now."""
        for piece in pieces:
            self._sum.add_micro_batch(piece)
        self._passes.run()

    def evict(self) -> None:
        """Evict the partial sums to disk, if they are offloaded, because they will not be needed soon."""
        self._shard_buffers.evict()

    def defer(self, piece: Tensor, level: int | None = None) -> None:
        """Keep a piece that `total` will add: the next micro-batch's piece or, if `level` is given, the next complete
        subtree's.
        """
        self._deferred.append((level, piece))

    def total(self, run: Range, divisor: float, out: Tensor) -> None:
        """Write the total over the elements `run` of the shard, divided by `divisor`, into `out`.

        Call it only once for each element, because it overwrites the partial sums.
        """
        elements = slice(run.start, run.end)
        deferred = [(level, piece[elements]) for level, piece in self._deferred]
        # fp32 pieces are read in place. They must not be overwritten, so the sum of two pieces goes to another buffer,
        # at first to `out`. The order of addition is the same as in `self._sum`.
        in_place = {piece.data_ptr() for _, piece in deferred if piece.dtype == torch.float32}
        unused_out = [out]

        def buffer() -> Tensor:
            return unused_out.pop() if unused_out else self._run_buffers.take(out.numel())

        def own(value: Tensor) -> Tensor:
            return value if value.data_ptr() in in_place else buffer().copy_(value)

        def add(left: Tensor, right: Tensor) -> Tensor:
            return torch.add(left, right, out=buffer()) if left.data_ptr() in in_place else self._adder(left, right)

        def free(value: Tensor) -> None:
            unused_out.append(out) if value is out else self._run_buffers.free(value)

        part = self._sum.part(lambda value: value[elements], own=own, add=add, free=free)
        for level, piece in deferred:
            part.add_micro_batch(piece) if level is None else part.push(piece, level)
        total = part.fold()
        torch.div(total, divisor, out=out)
        self._run_buffers.free(total)

    def clear(self) -> None:
        """Discard everything. Call it after all totals were computed, or on abort."""
        self._sum.clear()
        self._deferred.clear()


class LocalSums:
    """The sums of the maximal complete subtrees of a run of virtual workers, computed before a step's exchange.

    Only complete subtrees can be added locally without changing the order of addition.
    values: each subtree's sum over this worker's part of a unit; complete once all micro-batches have been added.
    """

    def __init__(self, subtrees: Sequence[Subtree], accumulate: int, adder: Adder, buffers: SumBuffers) -> None:
        self._subtrees, self._accumulate = subtrees, accumulate
        self._buffers, self._added = buffers, 0
        self._passes = Passes(adder, buffers)
        self._sum = self._passes.sum(accumulate)  # the sum of the subtree in progress
        self.values: list[Tensor] = []

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Add the pieces of the run's next micro-batches. They are not overwritten."""
        for piece in pieces:
            self._sum.add_micro_batch(piece)
            self._added += 1
            if self._added == self._accumulate << self._subtrees[len(self.values)].level:
                self.values.append(self._sum.fold())
                self._added = 0
        self._passes.run()

    def clear(self) -> None:
        """Discard all values, and give their buffers back."""
        for value in self.values:
            self._buffers.free(value)
        self._sum.clear()
        self.values.clear()
        self._added = 0
