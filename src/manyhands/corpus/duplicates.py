"""Near-duplicates: documents that share a band are joined to groups, of which one document stays.

All by Dataset's own operations, so with any number of workers, in bounded memory, and to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from manyhands.corpus.minhash import MinHash
from manyhands.corpus.steps import Steps
from manyhands.errors import InvariantError
from manyhands.prepare.aggregate import Aggregate
from manyhands.prepare.dataset import Dataset

_MOST_ROUNDS = 50  # rounds grow with the logarithm of the largest group: this is never reached


def near_duplicates(documents: Dataset, minhash: MinHash, steps: Steps) -> tuple[Dataset, int]:
    """Pairs (id, id of the one that stays), for each document of a group but the one with the least id; how many.

    The groups are the connected components of "shares a band".
    """
    bands = documents.flat_map(minhash).group_by("band").aggregate(ids=Aggregate.collect(of="id"))
    edges, count = steps.keep("near-duplicates: pairs", bands.flat_map(_edges).distinct())
    return _components(edges, count, steps)


def without(documents: Dataset, dropped: Dataset) -> Dataset:
    """The documents whose id isn't the first one of a pair in `dropped`, in the order of their ids."""
    pairs = documents.join(dropped, "id", other_on=itemgetter(0), how="left")
    return pairs.filter(_is_alone).map(itemgetter(0))


def _edges(group: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """From all documents of a band to the one with the least id."""
    ids = sorted(set(group["ids"]))
    return [(other, ids[0]) for other in ids[1:]]


def _components(edges: Dataset, count: int, steps: Steps) -> tuple[Dataset, int]:
    """Edges until each leads to the least id of its component: alternating large-star and small-star (Kiveris et al.,
    "Connected Components in MapReduce and Beyond", 2014). A node's neighbours must fit in memory."""
    known = steps.digest("near-duplicates: pairs")
    for number in range(_MOST_ROUNDS):
        if not count:
            return edges, 0
        name = f"near-duplicates: groups, round {number + 1}"
        large = edges.flat_map(_both_ways).group_by(itemgetter(0)).aggregate(others=Aggregate.collect(of=itemgetter(1)))
        small = (
            large.flat_map(_large_star).group_by(itemgetter(0)).aggregate(others=Aggregate.collect(of=itemgetter(1)))
        )
        edges, count = steps.keep(name, small.flat_map(_small_star).distinct().sort_by())
        if steps.digest(name) == known:
            return edges, count
        known = steps.digest(name)
    raise InvariantError("the groups of near-duplicates don't come to rest", got=f"{_MOST_ROUNDS} rounds")


def _both_ways(edge: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [edge, (edge[1], edge[0])]


def _large_star(node: dict[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """Greater neighbours are led to the least one; the greater id comes first."""
    least = min(node["key"], *node["others"])
    return ((other, least) for other in node["others"] if other > node["key"])


def _small_star(node: dict[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """The node and its lesser neighbours are led to the least one."""
    least = min(node["others"])
    return ((other, least) for other in {node["key"], *node["others"]} if other != least)


def _is_alone(pair: tuple[Any, Any]) -> bool:
    return pair[1] is None
