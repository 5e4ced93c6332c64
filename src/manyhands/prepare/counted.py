"""Random words that are counted, not drawn: each is a function of (seed, purpose, partition, position)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from manyhands.numerics.counters import derive

if TYPE_CHECKING:
    from numpy.typing import NDArray


def words_at(seed: int, purpose: str, partition: int, start: int, count: int) -> NDArray[np.uint64]:
    """64 random bits for each of `count` records from position `start` of a partition: SplitMix64 of a derived key.

    Deterministic: the same words on every machine, however the partition is cut into chunks.
    """
    positions = np.arange(start, start + count, dtype=np.uint64)
    words = np.uint64(derive(seed, purpose, partition)) + positions * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
