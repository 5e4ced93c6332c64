"""The order of the samples: a bijection at every size, well mixed, the same for scalars and arrays."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.config import Batch
from manyhands.data.order import MAX_SIZE, Permutation, micro_batch_positions, sample_indices
from manyhands.errors import DataError
from manyhands.numerics.seeds import derive

keys = st.integers(0, 2**63 - 1)


@given(st.integers(1, 3000), keys)
def test_every_index_comes_once(size: int, key: int) -> None:
    indices = Permutation(size, key).take(np.arange(size))
    assert indices.dtype == np.int64
    assert sorted(indices.tolist()) == list(range(size))


@given(st.integers(1, MAX_SIZE), keys, st.data())
def test_one_at_a_time_is_the_same_as_many_and_large_sizes_work(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True))
    permutation = Permutation(size, key)
    assert len(permutation) == size
    indices = permutation.take(np.array(positions))
    assert indices.tolist() == [permutation[p] for p in positions]
    assert len(set(indices.tolist())) == len(positions)
    assert all(0 <= i < size for i in indices.tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_small_sizes_reach_every_permutation_equally_often(size: int) -> None:
    trials = 20 * math.factorial(size) + 400
    seen = Counter(tuple(Permutation(size, derive(1, i)).take(np.arange(size)).tolist()) for i in range(trials))
    expected = trials / math.factorial(size)
    assert len(seen) == math.factorial(size)
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    freedom = len(seen) - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom) + 1


@pytest.mark.parametrize("size", [16, 100, 4096, 10_007])
def test_neighbours_land_apart_and_positions_are_forgotten(size: int) -> None:
    moves, kept, gaps = [], 0, 0
    for key in range(40):
        indices = Permutation(size, key).take(np.arange(size))
        kept += int((indices == np.arange(size)).sum())
        gaps += int((np.diff(indices) == 1).sum())
        moves.append(float(np.corrcoef(np.arange(size), indices)[0, 1]))
    assert kept < 40 * 2.2  # a random permutation keeps one index in place on average
    assert gaps < 40 * 2.2
    assert abs(float(np.mean(moves))) < 6 / math.sqrt(40 * size)


def test_the_order_never_changes() -> None:
    """These numbers are part of the promise: changing one changes the bits of every run."""
    assert Permutation(10, 0).take(np.arange(10)).tolist() == [1, 5, 7, 2, 0, 3, 4, 6, 9, 8]
    assert Permutation(MAX_SIZE, 1)[12345] == 1_279_388_076_502_066_187
    assert sample_indices(7, 5, range(12)).tolist() == [2, 0, 4, 3, 1, 1, 3, 0, 2, 4, 0, 3]


def test_shapes_are_kept_and_positions_outside_are_refused() -> None:
    permutation = Permutation(6, 0)
    assert permutation.take(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation.take(np.array([], dtype=np.int64)).tolist() == []
    assert sorted(permutation[p] for p in range(len(permutation))) == list(range(6))
    for outside in (-1, 6):
        with pytest.raises(IndexError, match="permutation of 6"):
            permutation[outside]
        with pytest.raises(IndexError, match="permutation of 6"):
            permutation.take(np.array([0, outside]))
    for size in (0, -1, MAX_SIZE + 1):
        with pytest.raises(DataError):
            Permutation(size, 0)


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 200), st.integers(1, 120))
def test_a_run_sees_every_sample_once_an_epoch(seed: int, size: int, start: int, count: int) -> None:
    indices = sample_indices(seed, size, range(start, start + count))
    for position, index in zip(range(start, start + count), indices.tolist(), strict=True):
        assert index == Permutation(size, derive(seed, "order", position // size))[position % size]
    epoch = sample_indices(seed, size, range(start * size, (start + 1) * size))
    assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(sample_indices(seed, 20, range(e * 20, e * 20 + 20)).tolist()) for seed in (0, 1) for e in (0, 1)]
    assert len(set(epochs)) == 4


def test_empty_data_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        sample_indices(0, 0, [0])


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_micro_batches_tile_the_run(micro_size: int, micro_batches: int, step: int) -> None:
    batch = Batch(global_size=micro_size * micro_batches, micro_size=micro_size)
    positions = [p for i in range(micro_batches) for p in micro_batch_positions(step, i, batch)]
    assert positions == list(range(step * batch.global_size, (step + 1) * batch.global_size))
