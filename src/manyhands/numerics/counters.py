"""The counter-based random function from which all random numbers come.

Random numbers are computed from counters, not drawn from a stream: each is a function of (seed, purpose, partition,
position). So it doesn't matter which process computes them, or in which order. This module doesn't import torch, so
that data jobs start quickly.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DOMAIN = b"manyhands seed 1;"  # part of every seed: a change would change all results


def derive(seed: int, *counters: int | str) -> int:
    """Return the seed for one purpose: 63 bits of SHA-256 over the canonical encoding of `(seed, *counters)`.

    Integers and strings are distinguished (`1` isn't `"1"`), and no two different tuples have the same encoding. The
    number is the same on every machine and in every version of Python, numpy and torch.
    Raises TypeError for a counter that is neither an integer nor a string.
    """
    return deriving(*counters)(operator.index(seed))


def deriving(*counters: int | str) -> Callable[[int], int]:
    """Return a function of the seed that computes `derive(seed, *counters)`, with the counters already encoded."""
    encoded = bytearray()
    for counter in counters:
        if isinstance(counter, str):
            text = counter.encode()
            encoded += b"s%d:%b;" % (len(text), text)
        else:
            encoded += b"i%d;" % operator.index(counter)
    after = bytes(encoded)

    def derived(seed: int) -> int:
        digest = hashlib.sha256(b"%bi%d;%b" % (_DOMAIN, seed, after)).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    return derived


def words_at(seed: int, purpose: str, partition: int, start: int, count: int) -> NDArray[np.uint64]:
    """Return 64 random bits for each of `count` records starting at position `start` of a partition.

    SplitMix64 (Steele, Lea and Flood, 2014) computes the words from a derived key. The words are the same on every
    machine, and do not depend on how the partition is divided into chunks.
    """
    positions = np.arange(start, start + count, dtype=np.uint64)
    words = np.uint64(derive(seed, purpose, partition)) + positions * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
