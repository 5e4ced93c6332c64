"""Finds near-duplicates by MinHash, and joins them into groups.

MinHash finds documents that share most of their shingles without comparing all pairs. A document is the set of its
shingles: runs of a few characters. If all shingles of two documents are hashed with the same random function, the
probability that the smallest hashes are equal is the Jaccard similarity s of the documents (Broder, "On the resemblance
and containment of documents", 1997). With `bands` groups of `rows` such minima each, two documents share a complete
band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter
3.4).

Documents that share a band are joined into groups, and one document of each group is kept. All steps are operations of
Dataset, so any number of workers, with bounded memory, gives the same result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.corpus.steps import Steps
from manyhands.errors import InvariantError
from manyhands.numerics.counters import derive
from manyhands.options import check_options, option, options
from manyhands.prepare.dataset import Dataset
from manyhands.prepare.records.aggregate import Aggregate

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SPACE = re.compile(r"\s+")

_BASE = np.uint64(0x9E3779B97F4A7C15)


@options
class MinHash:
    """The parameters of MinHash. It finds documents with a similarity of about (1 / bands)^(1 / rows) or more.

    Letter case and the amount of white space are ignored.
    """

    bands: int = option(default=16, at_least=1, at_most=256, help="The number of bands.")
    rows: int = option(default=8, at_least=1, at_most=64, help="The number of hashes in a band.")
    shingle: int = option(
        default=9,
        at_least=1,
        at_most=100,
        help="The number of characters of a shingle. 9 suits longer texts in any language (Leskovec et al., 3.2.2).",
    )

    def __post_init__(self) -> None:
        check_options(self, "duplicates.")

    def probability(self, similarity: float) -> float:
        """Return the probability that two documents of this Jaccard similarity share a band."""
        return 1 - float((1 - similarity**self.rows) ** self.bands)

    def signature(self, text: str) -> NDArray[np.uint64]:
        """Return the smallest hash of all shingles for each of bands x rows hash functions, as an array [bands, rows].

        The array is the same on every machine.
        """
        shingles = _mixed(_shingles(text, self.shingle))
        factors, offsets = _hash_functions(self.bands * self.rows)
        smallest = np.empty(len(factors), np.uint64)
        hashed = np.empty_like(shingles)  # this buffer is reused for each function, so it stays in the CPU cache
        for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            np.multiply(shingles, factor, out=hashed)  # multiply-shift (Dietzfelbinger et al., 1997), modulo 2**64
            np.add(hashed, offset, out=hashed)
            smallest[number] = hashed.min()
        return smallest.reshape(self.bands, self.rows)

    def band_keys(self, text: str) -> list[int]:
        """Return a number for each band. Two documents with equal bands have equal numbers."""
        return [
            int.from_bytes(hashlib.blake2b(band.tobytes(), digest_size=8, key=b"%d" % number).digest(), "big") >> 1
            for number, band in enumerate(self.signature(text))
        ]

    def __call__(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a record for each band of a document."""
        for key in self.band_keys(document["text"]):
            yield {"band": key, "id": document["id"]}


def jaccard(text: str, other: str, shingle: int = MinHash.shingle) -> float:
    """Return the exact Jaccard similarity of two texts: the number of shared shingles divided by the number of all
    shingles.
    """
    ours, theirs = (set(_shingles(one, shingle).tolist()) for one in (text, other))
    return len(ours & theirs) / len(ours | theirs)


def _shingles(text: str, size: int) -> NDArray[np.uint64]:
    """Return a number for each run of `size` characters: a polynomial modulo 2**64 whose coefficients are the
    characters.
    """
    plain = _SPACE.sub(" ", text.lower()).strip()
    characters = np.frombuffer(plain.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = max(1, len(characters) - size + 1)
    numbers = np.zeros(count, np.uint64)
    for offset in range(min(size, len(characters))):
        numbers *= _BASE
        numbers += characters[offset : offset + count]
    return numbers


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood, 2014), in which every output bit depends on every input
    bit.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=4)
def _hash_functions(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return odd factors and offsets of hash functions h(x) = factor * x + offset.

    The upper bits of h(x) are random.
    """
    factors = [derive(0, "minhash factor", number) * 2 + 1 for number in range(count)]
    offsets = [derive(0, "minhash offset", number) for number in range(count)]
    return np.array(factors, np.uint64), np.array(offsets, np.uint64)


_MAX_ROUNDS = 50
"""The maximum number of rounds.

It is never reached, because the rounds grow with the logarithm of the largest group.
"""


def near_duplicates(documents: Dataset, minhash: MinHash, steps: Steps) -> tuple[Dataset, int]:
    """Find near-duplicates. Return pairs (id of a duplicate, id of the document that is kept), and their number.

    The groups are the connected components of the relation "shares a band". The document with the smallest id is kept.
    """
    signed = steps.divided(documents, documents).flat_map(minhash)  # this takes most of the time
    bands = signed.group_by("band").aggregate(ids=Aggregate.collect(of="id"))
    edges, count = steps.cache("near-duplicates: pairs", bands.flat_map(_edges).distinct())
    return _components(edges, count, steps)


def without(documents: Dataset, dropped: Dataset) -> Dataset:
    """Return the documents whose id is not the first of a pair in `dropped`, ordered by id."""
    pairs = documents.join(dropped, "id", other_on=itemgetter(0), how="left")
    return pairs.filter(_is_alone).map(itemgetter(0))


def _edges(group: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Return edges from all documents of a band to the document with the smallest id."""
    ids = sorted(set(group["ids"]))
    return [(other, ids[0]) for other in ids[1:]]


def _components(edges: Dataset, count: int, steps: Steps) -> tuple[Dataset, int]:
    """Replace edges until each leads to the smallest id of its component.

    The function alternates large-star and small-star operations (Kiveris et al., "Connected Components in MapReduce and
    Beyond", 2014). The neighbours of a node must fit in memory.
    """
    previous = steps.digest("near-duplicates: pairs")
    for number in range(_MAX_ROUNDS):
        if not count:
            return edges, 0
        name = f"near-duplicates: groups, round {number + 1}"
        large = edges.flat_map(_both_ways).group_by(itemgetter(0)).aggregate(others=Aggregate.collect(of=itemgetter(1)))
        small = (
            large.flat_map(_large_star).group_by(itemgetter(0)).aggregate(others=Aggregate.collect(of=itemgetter(1)))
        )
        edges, count = steps.cache(name, small.flat_map(_small_star).distinct().sort_by())
        if steps.digest(name) == previous:
            return edges, count
        previous = steps.digest(name)
    raise InvariantError("the groups of near-duplicates do not converge", got=f"{_MAX_ROUNDS} rounds")


def _both_ways(edge: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [edge, (edge[1], edge[0])]


def _large_star(node: dict[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """Return edges from the greater neighbours to the smallest neighbour. The greater id comes first."""
    least = min(node["key"], *node["others"])
    return ((other, least) for other in node["others"] if other > node["key"])


def _small_star(node: dict[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """Return edges from the node and its smaller neighbours to the smallest of them."""
    least = min(node["others"])
    return ((other, least) for other in {node["key"], *node["others"]} if other != least)


def _is_alone(pair: tuple[Any, Any]) -> bool:
    return pair[1] is None
