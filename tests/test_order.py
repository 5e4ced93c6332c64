"""The order of sums is one expression for any number of workers, both ways of exchanging, and in parts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.config import Batch
from manyhands.engine.step.reduce import plan_rounds
from manyhands.numerics.ordered_sum import (
    OrderedSum,
    maximal_subtrees,
    micro_batch_of_round,
    num_rounds,
    run_of_virtual_workers,
)


def defined_sum(virtual_workers: int, accumulate: int) -> str:
    """Return the sum as an expression, written from the definition in the design and not from the code."""
    leaves = []
    for v in range(virtual_workers):
        expression = str(v * accumulate)
        for a in range(1, accumulate):
            expression = f"({expression}+{v * accumulate + a})"
        leaves.append(expression)

    def tree(items: Sequence[str]) -> str:
        if len(items) == 1:
            return items[0]
        half = len(items) // 2
        return f"({tree(items[:half])}+{tree(items[half:])})"

    blocks, start = [], 0
    while start < virtual_workers:  # complete trees, the largest first
        size = 1 << ((virtual_workers - start).bit_length() - 1)
        blocks.append(tree(leaves[start : start + size]))
        start += size
    total = blocks.pop()
    while blocks:  # the remaining subtrees merge from the right
        total = f"({blocks.pop()}+{total})"
    return total


def symbolic(accumulate: int) -> OrderedSum[str]:
    return OrderedSum(accumulate, own=lambda value: value, add=lambda left, right: f"({left}+{right})")


batches = st.builds(
    lambda virtual_workers, accumulate: Batch(
        global_size=virtual_workers * accumulate, micro_size=1, virtual_workers=virtual_workers
    ),
    st.integers(1, 96),
    st.integers(1, 4),
)
worker_counts = st.integers(1, 64)


def test_the_examples_of_the_definition() -> None:
    assert defined_sum(6, 1) == "(((0+1)+(2+3))+(4+5))"
    assert defined_sum(7, 1) == "(((0+1)+(2+3))+((4+5)+6))"
    assert defined_sum(2, 3) == "(((0+1)+2)+((3+4)+5))"


@given(batches, worker_counts)
def test_exchanging_every_micro_batch_gives_the_defined_sum(batch: Batch, workers: int) -> None:
    total = symbolic(batch.accumulate)
    for index in range(num_rounds(workers, batch.micro_batches)):
        for rank in range(workers):
            micro_batch = micro_batch_of_round(index, rank, workers, batch.micro_batches)
            if micro_batch is not None:
                total.add_micro_batch(str(micro_batch))
    assert total.fold() == defined_sum(batch.virtual_workers, batch.accumulate)


@given(batches, worker_counts)
def test_exchanging_every_step_gives_the_defined_sum(batch: Batch, workers: int) -> None:
    total = symbolic(batch.accumulate)
    for rank in range(workers):
        run = run_of_virtual_workers(rank, workers, batch.virtual_workers)
        for subtree in maximal_subtrees(run.start, run.stop):
            local = symbolic(batch.accumulate)
            for micro_batch in range(subtree.start * batch.accumulate, subtree.end * batch.accumulate):
                local.add_micro_batch(str(micro_batch))
            total.push(local.fold(), subtree.level)
    assert total.fold() == defined_sum(batch.virtual_workers, batch.accumulate)


@given(batches, worker_counts, st.integers(1, 5))
def test_every_micro_batch_is_computed_once(batch: Batch, workers: int, hosts: int) -> None:
    computed = []
    for host in range(hosts):
        run = run_of_virtual_workers(host, hosts, batch.virtual_workers)
        rounds = [plan_rounds(batch, run, rank, workers) for rank in range(workers)]
        computed += [this.micro_batch for mine in rounds for this in mine if this.micro_batch is not None]
        # All workers of a host have the same rounds, and agree on who contributes.
        for together in zip(*rounds, strict=True):
            assert len({this.contributors for this in together}) == 1
            assert [rank for rank, this in enumerate(together) if this.micro_batch is not None] == list(
                together[0].contributors
            )
    assert sorted(computed) == list(range(batch.micro_batches))


@given(st.integers(0, 200), st.integers(0, 64))
def test_maximal_subtrees_cover_a_run_and_are_few(start: int, length: int) -> None:
    trees = maximal_subtrees(start, start + length)
    covered = [index for tree in trees for index in range(tree.start, tree.end)]
    assert covered == list(range(start, start + length))
    assert all(tree.start % (1 << tree.level) == 0 for tree in trees)
    assert len(trees) <= 2 * max(1, length).bit_length()
    if length and length & (length - 1) == 0 and start % length == 0:
        assert len(trees) == 1


@given(batches, st.integers(0, 200))
@settings(max_examples=50)
def test_a_part_of_the_sum_continues_from_the_full_sums_state(batch: Batch, stop: int) -> None:
    whole = symbolic(batch.accumulate)
    stop = min(stop, batch.micro_batches)
    for micro_batch in range(stop):
        whole.add_micro_batch(str(micro_batch))
    part = whole.part(
        lambda value: value, lambda value: value, lambda left, right: f"({left}+{right})", lambda value: None
    )
    for micro_batch in range(stop, batch.micro_batches):
        part.add_micro_batch(str(micro_batch))
    assert part.fold() == defined_sum(batch.virtual_workers, batch.accumulate)


@given(batches)
def test_partial_sums_are_few_and_all_freed(batch: Batch) -> None:
    held, most = 0, 0

    def own(value: str) -> str:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return value

    def free(value: str) -> None:
        nonlocal held
        held -= 1

    total = OrderedSum(batch.accumulate, own=own, add=lambda left, right: f"({left}+{right})", free=free)
    for micro_batch in range(batch.micro_batches):
        total.add_micro_batch(str(micro_batch))
    free(total.fold())
    assert held == 0
    assert most <= batch.virtual_workers.bit_length() + 1


@pytest.mark.parametrize(("workers", "virtual_workers"), [(2, 8), (4, 8), (8, 8), (1, 8)])
def test_an_aligned_power_of_two_sends_one_subtree(workers: int, virtual_workers: int) -> None:
    for rank in range(workers):
        run = run_of_virtual_workers(rank, workers, virtual_workers)
        assert len(maximal_subtrees(run.start, run.stop)) == 1
