"""Sums over tensors: in the defined order, to the bit, without changing the borrowed pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyhands.engine.step.gradient_sums import Adder, ShardSum, SumBuffers
from manyhands.numerics.ordered_sum import OrderedSum
from manyhands.offload.allocator import Allocator
from manyhands.shard_layout import Range

NUMEL, RUN, DIVISOR = 48, 16, 3.0


def reference_sum(pieces: list[Tensor], accumulate: int) -> Tensor:
    """Add in the same order, with a new tensor for every result."""
    total: OrderedSum[Tensor] = OrderedSum(accumulate, own=Tensor.float, add=lambda left, right: left + right.float())
    for piece in pieces:
        total.add_micro_batch(piece)
    return total.fold() / DIVISOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("virtual_workers", [1, 2, 3, 4, 5, 7, 8])
def test_a_shards_sum_is_the_defined_one_and_does_not_change_its_pieces(
    virtual_workers: int, accumulate: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyhands.engine.step.gradient_sums.PASS", 20)
    generator = torch.Generator().manual_seed(virtual_workers)
    pieces = [torch.randn(NUMEL, generator=generator).to(dtype) for _ in range(virtual_workers * accumulate)]
    allocator = Allocator(torch.device("cpu"))
    for early in range(len(pieces) + 1):  # pieces that are added in earlier rounds; the others are added in the update
        given = [piece.clone() for piece in pieces]
        run = SumBuffers(RUN, allocator)
        sums = ShardSum(accumulate, Adder(allocator.device), SumBuffers(NUMEL, allocator), run)
        for workers in (given[: early // 2], given[early // 2 : early]):
            sums.add(workers)
        for piece in given[early:]:
            sums.defer(piece)
        out = torch.full((NUMEL,), float("nan"))
        for start in range(0, NUMEL, RUN):
            sums.total(Range(start, start + RUN), DIVISOR, out[start : start + RUN])
        assert torch.equal(out, reference_sum(pieces, accumulate))
        assert all(torch.equal(piece, before) for piece, before in zip(given, pieces, strict=True))
        sums.clear()


def test_the_output_buffer_is_reused_for_later_partial_sums() -> None:
    allocator = Allocator(torch.device("cpu"))
    run = SumBuffers(RUN, allocator)
    sums = ShardSum(1, Adder(allocator.device), SumBuffers(RUN, allocator), run)
    for number in range(10):  # two rounds of five workers; the sum of 7 and 8 is added to the sum of the pieces before
        piece = torch.full((RUN,), float(number), dtype=torch.bfloat16)
        sums.add([piece]) if number < 5 else sums.defer(piece)
    out = torch.empty(RUN)
    sums.total(Range(0, RUN), 1.0, out)
    assert (out.unique().tolist(), run.num_bytes) == ([45.0], 0)


def test_pieces_of_fp32_are_read_in_place_and_two_are_added_in_the_output_buffer() -> None:
    allocator = Allocator(torch.device("cpu"))
    for count, buffers in ((1, 0), (2, 0), (3, 0), (4, 1), (8, 2)):
        run = SumBuffers(RUN, allocator)
        sums = ShardSum(1, Adder(allocator.device), SumBuffers(NUMEL, allocator), run)
        for _ in range(count):
            sums.defer(torch.ones(RUN))
        sums.total(Range(0, RUN), 1.0, torch.empty(RUN))
        assert run.num_bytes == buffers * RUN * 4
