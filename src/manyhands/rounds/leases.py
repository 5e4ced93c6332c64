"""Leases: which cluster computes which island, by small files in the store.

    clusters/8d7f03ab.json    a cluster at work: a counter that it raises every few seconds, and what it does
    leases/island-3.json      the cluster that computes the island

A cluster is lost if its counter does not change for some time of the observer's own clock: no clocks are compared. A
lease of a lost cluster, or of one that has left, is free. Leases need not exclude each other strictly, because two
clusters that compute one island write the same file. But they settle on one holder soon: the last writer of a lease
wins, and a cluster that finds its lease taken by another live cluster gives the island up.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from manyhands.errors import ManyhandsError
from manyhands.formatting import printable
from manyhands.rounds.assignment import Fixed, Sightings, share_out
from manyhands.rounds.store import RoundStore, read_small
from manyhands.storage.atomic import is_temporary, write_atomic
from manyhands.storage.files import make_folder, names_in
from manyhands.storage.location import Address, Location, StoreError
from manyhands.storage.sealed import seal, unseal

BEAT_SECONDS, LOST_AFTER_SECONDS, SETTLE_SECONDS = 5.0, 60.0, 1.0

_CLUSTER = re.compile(r"([0-9a-f]{8,32})\.json")
_LEASE = re.compile(r"island-(0|[1-9]\d{0,5})\.json")

_MOST_CLUSTERS = 1000
"""The maximum number of clusters' files that are read."""

_MOST_TEXT = 500

_NOT_A_FILE = (errno.EPERM, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""The errors of `read_small` for a link that leads out of the folder, a FIFO, a folder, and so on."""

_T = TypeVar("_T")

_CLOSING_SECONDS = 10.0

_FORGET = 10
"""After this multiple of the time after which a cluster is lost, its file is deleted. A cluster that returns writes it
again."""


def new_cluster_id() -> str:
    """Return a random id for a cluster. Keep it in the run directory, so that a restart is the same cluster."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Holder:
    """The cluster that holds an island. host: where it runs. doing: what it does. seconds: since its counter was
    observed to change. is_lost: True if that is too long. All texts are printable.
    """

    cluster: str
    host: str
    doing: str
    seconds: float
    is_lost: bool


@dataclass(frozen=True)
class _Announcement:
    """The content of a cluster's file. session: random, of one process. beat: the counter."""

    session: str
    beat: int
    host: str
    doing: str
    fixed: list[int] | None

    @property
    def value(self) -> Hashable:
        return self.session, self.beat

    @property
    def fixed_set(self) -> Fixed:
        return None if self.fixed is None else frozenset(self.fixed)


@dataclass(frozen=True)
class _Lease:
    """The content of a lease. taking: how often the lease was taken, by anybody."""

    cluster: str
    taking: int


class Observer:
    """Observes clusters and leases in a store, and writes nothing. For one thread, or with a lock around its calls.

    islands: the number of islands. lost_after: seconds, see `Sightings`.
    """

    def __init__(self, store: RoundStore, islands: int, *, lost_after: float = LOST_AFTER_SECONDS) -> None:
        self._store, self._count = store, islands
        self._sightings, self._lost_after = Sightings(lost_after), lost_after
        self.clusters: dict[str, _Announcement] = {}
        self.leases: dict[int, _Lease] = {}

    def observe(self) -> None:
        """Read all files of clusters and leases once. Raises OSError.

        A damaged file, which a later beat or taking replaces, counts as missing.
        """
        self.record(time.monotonic(), *self.read())

    def read(self) -> tuple[dict[str, _Announcement], dict[int, _Lease]]:
        """Return all clusters by id, and all leases by island. Raises OSError."""
        root = self._store.location
        clusters, leases = {}, {}
        for match in self._matches(root, "leases", _LEASE):  # first, because clusters announce themselves first
            lease = _read(root, f"leases/{match[0]}", _lease)
            if lease is not None and int(match[1]) < self._count:
                leases[int(match[1])] = lease
        for match in self._matches(root, "clusters", _CLUSTER)[:_MOST_CLUSTERS]:
            found = _read(root, f"clusters/{match[0]}", _announcement)
            if found is not None:
                clusters[match[1]] = found
        return clusters, leases

    def record(self, now: float, clusters: dict[str, _Announcement], leases: dict[int, _Lease]) -> None:
        """Take over what `read` has returned. now: the monotonic clock before that call."""
        self.clusters, self.leases = clusters, leases
        self._sightings.observe({name: found.value for name, found in clusters.items()}, now)

    def live(self) -> set[str]:
        """Return the clusters whose counters have changed recently, or have not been observed for long enough."""
        return set(self._sightings.live())

    def long_lost(self) -> set[str]:
        """Return the clusters that have been lost for so long that their files may be deleted."""
        return {name for name in self.clusters if self._sightings.seconds(name) > _FORGET * self._lost_after}

    def holders(self) -> dict[int, Holder | None]:
        """Return who holds each island, as last observed. A cluster that has left holds nothing."""
        return {island: self._holder(island) for island in range(self._count)}

    def _holder(self, island: int) -> Holder | None:
        lease = self.leases.get(island)
        found = self.clusters.get(lease.cluster) if lease else None
        if lease is None or found is None:
            return None
        seconds, is_lost = self._sightings.seconds(lease.cluster), lease.cluster not in self.live()
        return Holder(lease.cluster, printable(found.host), printable(found.doing), seconds, is_lost)

    def _matches(self, root: Location, folder: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        place = root / folder
        names = place.files() if isinstance(place, Address) else names_in(place)
        for name in names:
            if not pattern.fullmatch(name) and not name.startswith("."):
                self._store.note_foreign(f"{folder}/{name}")
        return [match for match in map(pattern.fullmatch, names) if match]


class Leases:
    """The islands that this cluster computes. A context manager; a thread announces the cluster until `close`.

    cluster: the id of this cluster, from `new_cluster_id`. islands: their number. fixed: the islands that this cluster
    computes in any case, or None for a fair share. beat: seconds between two announcements. lost_after: seconds after
    which a cluster whose counter does not change is lost. settle: seconds after which a lease is read back.

    All methods may be called from any thread. Only `take` and `release` wait for the store; they raise what the methods
    of `RoundStore` raise. A failure of the store in the background is reported once, and tried again.
    """

    def __init__(
        self,
        store: RoundStore,
        cluster: str,
        islands: int,
        *,
        fixed: Collection[int] | None = None,
        beat: float = BEAT_SECONDS,
        lost_after: float = LOST_AFTER_SECONDS,
        settle: float = SETTLE_SECONDS,
    ) -> None:
        self._store, self._cluster, self._count, self._settle = store, cluster, islands, settle
        self._fixed: Fixed = None if fixed is None else frozenset(fixed)
        self._beat_seconds, self._beat, self._session = beat, 0, secrets.token_hex(8)
        self._doing, self._held, self._said = "starting", set(self._fixed or ()), set[str]()
        self._observer = Observer(store, islands, lost_after=lost_after)
        self._leftovers = Sightings(lost_after)
        self._lock, self._seen, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="leases", daemon=True)
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self, doing: str) -> None:
        """Set what this cluster does, for people: "round 12, island 3, step 361 of 390"."""
        self._doing = doing

    def held(self) -> set[int]:
        """Return the islands that this cluster holds now. Compute no others."""
        with self._lock:
            return set(self._held)

    def wanted(self) -> set[int]:
        """Return the islands that this cluster should hold, from what was observed last; none before that.

        Take those that it does not hold, and release those that it holds beyond them, after a round.
        """
        with self._lock:
            return self._wanted()

    def _wanted(self) -> set[int]:
        if self._fixed is not None:
            return set(self._fixed)
        if not self._seen.is_set():
            return set()
        live = {name: self._observer.clusters[name].fixed_set for name in self._observer.live()}
        live[self._cluster] = None
        holders = {island: lease.cluster for island, lease in self._observer.leases.items()}
        shares = share_out(live, holders, self._count)
        return {island for island, name in shares.items() if name == self._cluster}

    def holders(self) -> dict[int, Holder | None]:
        """Return who holds each island, as last observed."""
        with self._lock:
            return self._observer.holders()

    def wait_observed(self, timeout: float | None = None) -> bool:
        """Wait until the store has been observed once. Return False after `timeout` seconds."""
        return self._seen.wait(timeout)

    def take(self, island: int) -> bool:
        """Take the lease of an island, unless another live cluster holds it. Return whether this cluster holds it then.

        This waits until the lease has settled. A fixed island is held in any case.
        """
        with self._lock:
            if island in self._held:
                return True
            live = self._observer.live()
        lease = self._read_lease(island)
        if lease is not None and lease.cluster != self._cluster and lease.cluster in live:
            return False
        if lease is None or lease.cluster != self._cluster:
            self._write_lease(island, lease)
            self._closing.wait(self._settle)
            lease = self._read_lease(island)
        is_mine = lease is not None and lease.cluster == self._cluster
        if is_mine:
            with self._lock:
                self._held.add(island)
                self._observer.leases[island] = _Lease(self._cluster, 0)
        return is_mine

    def release(self, island: int) -> None:
        """Give the lease of an island up, so that another cluster takes it. A fixed island stays held."""
        if self._fixed is not None:
            return
        with self._lock:
            self._held.discard(island)
            self._observer.leases.pop(island, None)
        lease = self._read_lease(island)
        if lease is not None and lease.cluster == self._cluster:
            self._store.steady(f"delete the lease of island {island}", lambda: _delete(self._store, _name(island)))

    def close(self) -> None:
        """End the thread, and withdraw the announcement and the leases. Waits for a store that hangs 10 s at most."""
        self._closing.set()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        while True:
            with suppress(Exception):  # report is the caller's, and nothing here may end the run
                self._attempt(self._announce_and_observe)
            if self._closing.wait(self._beat_seconds):
                break
        with suppress(Exception):
            self._withdraw()

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (OSError, ManyhandsError) as error:
            if "outage" not in self._said:
                self._say(
                    "outage",
                    f"this cluster's leases can't be renewed, so others may take its islands: {error}; trying again",
                )
        else:
            if "outage" in self._said:
                self._said.discard("outage")
                self._store.report("this cluster's leases are renewed again")

    def _announce_and_observe(self) -> None:
        now = time.monotonic()
        clusters, leases = self._observer.read()
        before = clusters.get(self._cluster)
        if before is not None and before.session != self._session and self._beat:
            self._say(
                "twice", f"another process uses this cluster's id, {self._cluster}: was its run directory copied?"
            )
        self._beat += 1
        fixed = None if self._fixed is None else sorted(self._fixed)
        mine = _Announcement(self._session, self._beat, socket.gethostname(), self._doing[:_MOST_TEXT], fixed)
        _write(self._store, f"clusters/{self._cluster}.json", vars(mine))
        clusters[self._cluster] = mine
        mine_there = {island for island, lease in leases.items() if lease.cluster == self._cluster}
        with self._lock:
            self._observer.record(now, clusters, leases)
            self._seen.set()
            others = self._observer.live() - {self._cluster}
            taken = {island for island in self._held if island in leases and leases[island].cluster in others}
            if self._fixed is None:
                self._held -= taken
            missing = self._held - taken - mine_there
            unused = mine_there - self._held - self._wanted()
            forgotten = self._observer.long_lost() - {self._cluster}
        for island in sorted(taken):
            self._say_taken(island, leases[island].cluster, clusters)
        for island in missing:  # the lease was deleted, is damaged, or was taken by a cluster that is lost
            if island in self.held():
                _write(self._store, _name(island), vars(_next(self._cluster, leases.get(island))))
        for island in unused:  # of an earlier process of this cluster, or written again during its release
            if island not in self.held():
                _delete(self._store, _name(island))
        for name in forgotten:
            _delete(self._store, f"clusters/{name}.json")
        self._remove_leftovers(now)

    def _remove_leftovers(self, now: float) -> None:
        """Delete temporary files that killed clusters left, once they have been observed for some time."""
        root = self._store.location
        if isinstance(root, Path):
            folders = ("clusters", "leases")
            names = {f"{folder}/{name}" for folder in folders for name in names_in(root / folder) if is_temporary(name)}
            self._leftovers.observe(dict.fromkeys(names), now)
            for name in names - set(self._leftovers.live()):
                _delete(self._store, name)

    def _say_taken(self, island: int, other: str, clusters: dict[str, _Announcement]) -> None:
        host = printable(clusters[other].host)
        if self._fixed is not None:
            text = (
                f"island {island} is also computed by cluster {other} on {host}: the result is the same, time is wasted"
            )
        else:
            text = f"island {island} was taken by cluster {other} on {host}, and is given up here"
            self._said.discard(f"taken {island} {other}")
        self._say(f"taken {island} {other}", text)

    def _say(self, key: str, text: str) -> None:
        """Report a text, once for each key."""
        if key not in self._said:
            self._said.add(key)
            self._store.report(text)

    def _withdraw(self) -> None:
        """Delete this cluster's leases and its announcement. Raises OSError."""
        for island, lease in self._observer.read()[1].items():
            if lease.cluster == self._cluster:
                _delete(self._store, _name(island))
        _delete(self._store, f"clusters/{self._cluster}.json")

    def _read_lease(self, island: int) -> _Lease | None:
        name = _name(island)
        return self._store.steady(f"give {name}", lambda: _read(self._store.location, name, _lease))

    def _write_lease(self, island: int, before: _Lease | None) -> None:
        name, lease = _name(island), _next(self._cluster, before)
        self._store.steady(f"take {name}", lambda: _write(self._store, name, vars(lease)))


def _name(island: int) -> str:
    return f"leases/island-{island}.json"


def _next(cluster: str, before: _Lease | None) -> _Lease:
    return _Lease(cluster, before.taking + 1 if before else 1)


def _write(store: RoundStore, name: str, fields: dict[str, Any]) -> None:
    """Create or replace a small file. It is not synced, because it says nothing about the time after a crash."""
    store.check_mounted()
    place = store.location / name
    try:
        make_folder(place.parent)
        write_atomic(place, seal(fields), durable=False)
    except FileNotFoundError:
        raise StoreError(
            f"{place}: its folder or its temporary file was deleted", "check what else deletes files there"
        ) from None


def _delete(store: RoundStore, name: str) -> None:
    place = store.location / name
    with suppress(FileNotFoundError):
        place.unlink()


def _read(root: Location, name: str, parse: Callable[[dict[str, Any]], _T]) -> _T | None:
    """Return a small file's content, or None if it is missing, damaged or not a regular file. Raises OSError."""
    try:
        return parse(unseal(json.loads(read_small(root, name))))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    except OSError as error:
        if isinstance(root, Path) and error.errno in _NOT_A_FILE:
            return None
        raise


def _announcement(fields: dict[str, Any]) -> _Announcement:
    found = _Announcement(**fields)
    fixed = found.fixed if found.fixed is not None else []
    if not all(isinstance(text, str) and len(text) <= _MOST_TEXT for text in (found.session, found.host, found.doing)):
        raise ValueError("a text is too long, or none")
    if not isinstance(found.beat, int) or not all(isinstance(island, int) and island >= 0 for island in fixed):
        raise ValueError("a number is none")
    return found


def _lease(fields: dict[str, Any]) -> _Lease:
    found = _Lease(**fields)
    if not isinstance(found.taking, int) or not _CLUSTER.fullmatch(f"{found.cluster}.json"):
        raise ValueError("not a lease")
    return found
