"""Decisions about who computes which island, from what one cluster has observed. No input or output, no clock."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

Fixed = frozenset[int] | None
"""The islands that a cluster computes in any case, or None for a cluster that takes its share."""


def share_out(live: Mapping[str, Fixed], holders: Mapping[int, str], count: int) -> dict[int, str]:
    """Return which cluster should hold which of the `count` islands: island -> cluster.

    live: the clusters that are at work. holders: who holds which island now. An island that is fixed on a live cluster
    goes to it, to the first by name if there are several. The clusters without fixed islands share the other islands:
    each gets the same number, or one more. As few islands as possible move. If all clusters are fixed, nobody gets the
    other islands.

    The result depends on the arguments only. When all clusters hold what it says, the next call returns the same.
    """
    shares = {}
    for name in sorted(live, reverse=True):
        shares.update(dict.fromkeys((island for island in live[name] or () if island < count), name))
    free = [island for island in range(count) if island not in shares]
    takers = sorted(name for name, fixed in live.items() if fixed is None)
    if not takers:
        return shares
    kept: dict[str, list[int]] = {name: [island for island in free if holders.get(island) == name] for name in takers}
    least, more = divmod(len(free), len(takers))
    by_size = sorted(takers, key=lambda name: (-len(kept[name]), name))  # those that hold most may hold one more
    quotas = {name: least + (index < more) for index, name in enumerate(by_size)}
    kept = {name: islands[: quotas[name]] for name, islands in kept.items()}
    shares.update({island: name for name, islands in kept.items() for island in islands})
    places = [name for name in takers for _ in range(quotas[name] - len(kept[name]))]
    shares.update(zip((island for island in free if island not in shares), places, strict=True))
    return shares


@dataclass
class _Sighting:
    """The last value of a cluster's counter, and for how many seconds it has been observed unchanged."""

    value: Hashable
    seconds: float = 0.0


class Sightings:
    """For how long counters of clusters have not changed, on the clock of the observer alone.

    Only time in which the observer sees the store counts. Between two observations, at most a quarter of `lost_after`
    counts, because a longer gap may be an outage of the store, or a pause of this process, in which the other clusters
    could not be seen. So a cluster is lost only after at least four observations of the same value, and it has three
    quarters of `lost_after` to be seen again after an outage.
    """

    def __init__(self, lost_after: float) -> None:
        self._lost_after = lost_after
        self._sightings: dict[str, _Sighting] = {}
        self._last: float | None = None

    def observe(self, values: Mapping[str, Hashable], now: float) -> None:
        """Record the counters of all clusters, which were read after `now`. now: of the observer's monotonic clock."""
        gap = 0.0 if self._last is None else min(max(0.0, now - self._last), self._lost_after / 4)
        self._last = now
        seen = {}
        for name, value in values.items():
            before = self._sightings.get(name)
            is_same = before is not None and before.value == value
            seen[name] = _Sighting(value, before.seconds + gap if before is not None and is_same else 0.0)
        self._sightings = seen

    def seconds(self, name: str) -> float:
        """Return for how long the counter of a cluster has been observed unchanged."""
        return self._sightings[name].seconds

    def live(self) -> Collection[str]:
        """Return the clusters that are not lost."""
        return [name for name, sighting in self._sightings.items() if sighting.seconds < self._lost_after]
