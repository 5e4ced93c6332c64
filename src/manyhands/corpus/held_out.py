"""Chooses the documents that are held out for validation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from manyhands.prepare.dataset import Dataset
from manyhands.prepare.options import JobOptions

_DRAWS = 1 << 63


def drawn(seed: int, document: dict[str, Any]) -> int:
    """Return a pseudorandom number below 2**63 that depends on the seed and the document's id only.

    So neither the workers nor the other documents matter, and equal documents get equal numbers.
    """
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(document["id"], digest_size=8, key=key, person=b"validation").digest()) >> 1


@dataclass(frozen=True)
class _Drawn:
    seed: int

    def __call__(self, document: dict[str, Any]) -> int:
        return drawn(self.seed, document)


@dataclass(frozen=True)
class _IsPart:
    """A function that returns True for the documents that are held out, or for the others."""

    seed: int
    below: int
    held_out: bool

    def __call__(self, document: dict[str, Any]) -> bool:
        return (drawn(self.seed, document) < self.below) == self.held_out


def bound_of_fraction(fraction: float) -> int:
    """Return the limit below which this fraction of all numbers lies."""
    return round(fraction * _DRAWS)


def bound_of_number(documents: Dataset, number: int, seed: int, options: JobOptions) -> int:
    """Return the limit below which `number` documents lie, or a few more if some documents are equal."""
    return int(documents.map(_Drawn(seed)).sort_by().take(number, **options)[-1]) + 1


def divide(documents: Dataset, below: int, seed: int) -> tuple[Dataset, Dataset]:
    """Return the documents to train on, and those that are held out: the ones that draw a number below `below`."""
    return documents.filter(_IsPart(seed, below, False)), documents.filter(_IsPart(seed, below, True))
