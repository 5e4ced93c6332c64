"""Leases: live clusters share the islands evenly; those of lost clusters are taken; few islands move."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import ConfigError
from manyhands.rounds import leases as leases_module
from manyhands.rounds.assignment import Sightings, share_out
from manyhands.rounds.leases import Leases, Observer, new_cluster_id
from manyhands.rounds.store import RoundStore
from support.processes import started, suspend
from support.rounds import BEAT, LOST_AFTER, SETTLE, opened, s3_variables, share
from support.s3 import BUCKET, running

TIMES = {"beat": BEAT, "lost_after": LOST_AFTER, "settle": SETTLE}
CLUSTERS = [digit * 8 for digit in "0123456789"]


@st.composite
def situations(draw: st.DrawFn) -> tuple[set[str], dict[int, str], int]:
    """Live clusters, and holders, some of which may be lost."""
    count = draw(st.integers(1, 16))
    live = set(draw(st.lists(st.sampled_from(CLUSTERS), min_size=1, max_size=10, unique=True)))
    holders = draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from(CLUSTERS)))
    return live, holders, count


@given(situations())
def test_islands_are_shared_evenly_and_as_few_as_possible_move(found: tuple[set[str], dict[int, str], int]) -> None:
    live, holders, count = found
    shares = share_out(dict.fromkeys(live), holders, count)
    assert shares.keys() == set(range(count))
    sizes = Counter(dict.fromkeys(live, 0)) + Counter()
    sizes = Counter(shares.values())
    assert sizes.keys() <= live
    assert {sizes[name] for name in live} <= {count // len(live), math.ceil(count / len(live))}
    assert share_out(dict.fromkeys(sorted(live)), shares, count) == shares, "it settles"

    held = Counter(name for name in holders.values() if name in live)
    moved = sum(name in live and shares[island] != name for island, name in holders.items())
    least, more = divmod(count, len(live))
    choices = itertools.combinations(sorted(live), more)
    assert moved == min(sum(max(0, held[name] - least - (name in choice)) for name in live) for choice in choices)


@given(situations(), st.sets(st.integers(0, 15), min_size=1))
def test_fixed_islands_are_not_shared(found: tuple[set[str], dict[int, str], int], fixed: set[int]) -> None:
    live, holders, count = found
    first = min(live)
    kinds = dict.fromkeys(live) | {first: frozenset(fixed)}
    shares = share_out(kinds, holders, count)
    mine = {island for island, name in shares.items() if name == first}
    assert mine == {island for island in fixed if island < count}
    if len(live) > 1:
        others = Counter(shares[island] for island in range(count) if island not in mine)
        assert sum(others.values()) == count - len(mine)
        assert max(others.values(), default=0) <= math.ceil((count - len(mine)) / (len(live) - 1))
    else:
        assert shares.keys() == mine


@settings(max_examples=60)
@given(
    st.integers(1, 16), st.lists(st.sets(st.sampled_from(CLUSTERS), min_size=1), min_size=1, max_size=4), st.randoms()
)
def test_clusters_that_act_in_any_order_settle(count: int, phases: list[set[str]], order: object) -> None:
    """Each takes what is free and releases what it should not have, seeing the leases as they are at that time."""
    leases: dict[int, str] = {}
    for live in phases:
        for _ in range(3):
            for name in sorted(live, key=lambda _: order.random()):  # type: ignore[attr-defined]
                shares = share_out(dict.fromkeys(live), leases, count)
                leases = {island: held for island, held in leases.items() if held != name or shares[island] == name}
                for island, to in share_out(dict.fromkeys(live), leases, count).items():
                    if to == name and leases.get(island) not in live:
                        leases[island] = name
        assert leases.keys() == set(range(count))
        assert max(Counter(leases.values()).values()) <= math.ceil(count / len(live))
        assert set(leases.values()) <= live


def test_a_cluster_is_lost_only_if_its_counter_was_seen_unchanged_for_long_enough() -> None:
    sightings = Sightings(lost_after=60)
    for second in range(0, 60, 5):
        sightings.observe({"a": 1, "b": second}, 1000.0 + second)
    assert set(sightings.live()) == {"a", "b"}, "a fresh observer waits the full time"
    sightings.observe({"a": 1, "b": 99}, 1060.0)
    assert sightings.live() == ["b"]
    assert (sightings.seconds("a"), sightings.seconds("b")) == (60, 0)
    sightings.observe({"a": 2, "b": 99}, 1065.0)
    assert set(sightings.live()) == {"a", "b"}, "a returns"
    # Nobody saw the store for an hour, because of an outage or because the observer was stopped.
    sightings.observe({"a": 2, "b": 99}, 4665.0)
    assert (sightings.seconds("a"), sightings.seconds("b")) == (15, 20)
    sightings.observe({"b": 100}, 4670.0)
    assert sightings.live() == ["b"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    if not all(map(importlib.util.find_spec, ("s3fs", "moto"))):
        pytest.skip("s3fs and moto[server] aren't installed")
    with s3_variables(request.getfixturevalue("server")):
        yield f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


class Clusters:
    """Processes that share islands. held: what each said last that it holds."""

    def __init__(self, place: str, count: int, stack: ExitStack) -> None:
        self._place, self._count, self._stack = place, count, stack
        self.held: dict[str, set[int]] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._changed = threading.Condition()

    def start(self, cluster: str, fixed: list[int] | None = None) -> None:
        arguments = [self._place, cluster, str(self._count), json.dumps(fixed)]
        command = [sys.executable, "-W", "ignore", "-m", "support.rounds", "share", *arguments]
        process = self._stack.enter_context(
            started(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        )
        self.processes[cluster] = process
        threading.Thread(target=self._follow, args=(cluster, process), daemon=True).start()

    def end(self, cluster: str, *, kill: bool = False) -> None:
        process = self.processes[cluster]
        if kill:
            process.send_signal(signal.SIGKILL)
        else:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        process.wait(120)
        with self._changed:
            self.held.pop(cluster, None)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, 120), self.held

    def shared(self, *clusters: str) -> bool:
        """Whether these clusters hold all islands, each one once, and as many as each other."""
        held = [self.held.get(cluster, set()) for cluster in clusters]
        sizes = sorted(map(len, held))
        return sorted(itertools.chain(*held)) == list(range(self._count)) and sizes[-1] - sizes[0] <= 1

    def _follow(self, cluster: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            with self._changed:
                self.held[cluster] = set(json.loads(line))
                self._changed.notify_all()


def test_processes_share_islands_through_joins_kills_pauses_and_ends(place: str) -> None:
    first, second, third, fourth = CLUSTERS[:4]
    with ExitStack() as stack:
        clusters = Clusters(place, 5, stack)
        clusters.start(first)
        clusters.wait_for(lambda: clusters.shared(first))
        for cluster in (second, third, fourth):
            clusters.start(cluster)
        clusters.wait_for(lambda: clusters.shared(first, second, third, fourth))
        clusters.end(fourth)
        clusters.wait_for(lambda: clusters.shared(first, second, third))
        clusters.end(first, kill=True)
        clusters.wait_for(lambda: clusters.shared(second, third))
        suspend(clusters.processes[second])
        clusters.wait_for(lambda: clusters.shared(third))
        clusters.processes[second].send_signal(signal.SIGCONT)
        clusters.wait_for(lambda: clusters.shared(second, third))  # it gave up what was taken, and got a share back
        clusters.end(second)
        clusters.end(third)
    announced, leases = Observer(opened(place, count=5), 5).read()
    assert (set(announced), leases) in (({first}, {}), (set(), {})), (
        "at most the one that was killed, until it is forgotten"
    )


def test_two_clusters_with_the_same_fixed_island_are_told_so(tmp_path: Path) -> None:
    said: list[str] = []
    told = threading.Event()

    def report(text: str) -> None:
        said.append(text)
        told.set()

    one = Leases(opened(tmp_path), CLUSTERS[0], 4, fixed=[0, 2], **TIMES)
    with one:
        until(lambda: observed(tmp_path) == {0: CLUSTERS[0], 2: CLUSTERS[0]})
        with Leases(opened(tmp_path, report), CLUSTERS[1], 4, fixed=[2], **TIMES) as two:
            assert told.wait(120)
            assert "island 2 is also computed by cluster 00000000 on " in said[0]
            with Leases(opened(tmp_path), CLUSTERS[2], 4, **TIMES) as rest:
                until(lambda: share(rest) == {1, 3})
            assert (one.held(), two.held(), two.wanted()) == ({0, 2}, {2}, {2})
            two.release(2)
            assert two.held() == {2}
    assert len(said) == 1
    assert observed(tmp_path) == {}
    assert os.listdir(tmp_path / "clusters") == []


def observed(place: Path) -> dict[int, str]:
    return {island: lease.cluster for island, lease in Observer(opened(place), 4).read()[1].items()}


def until(condition: Callable[[], bool]) -> None:
    wait = threading.Event()
    for _ in range(6000):
        if condition():
            return
        wait.wait(0.02)
    raise AssertionError("it never became true")


def test_damaged_and_foreign_files_are_replaced_or_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "_FORGET", 1)
    said: list[str] = []
    store = opened(tmp_path, said.append)
    dead, mine = CLUSTERS[8], CLUSTERS[0]
    with Leases(store, dead, 4, **TIMES) as leases:
        until(lambda: share(leases) == {0, 1, 2, 3})
        kept = {path: path.read_bytes() for path in (*tmp_path.glob("clusters/*"), *tmp_path.glob("leases/*"))}
    for path, content in kept.items():
        path.write_bytes(content)  # as after a kill
    (tmp_path / "leases" / "island-1.json").write_text("[" * 10_000)
    (tmp_path / "leases" / "island-2.json").unlink()
    (tmp_path / "leases" / "island-2.json").symlink_to("/etc/passwd")
    (tmp_path / "leases" / "island-9.json").write_text("{}")
    (tmp_path / "leases" / ".island-1.json.1-0123456789ab.tmp").write_text("left by a kill")
    (tmp_path / "clusters" / "notes.txt").write_text("foreign")
    with Leases(store, mine, 4, **TIMES) as leases:
        assert leases.wait_observed(120)
        first = leases.holders()[0]
        assert first is not None
        assert (first.cluster, first.doing, first.is_lost) == (dead, "starting", False)
        leases.describe("round 12\x1b")
        until(lambda: share(leases) == {0, 1, 2, 3})
        until(lambda: (holder := leases.holders()[3]) is not None and holder.doing == "round 12\\x1b")
        until(lambda: sorted(os.listdir(tmp_path / "clusters")) == [f"{mine}.json", "notes.txt"])
        until(lambda: ".island-1.json.1-0123456789ab.tmp" not in os.listdir(tmp_path / "leases"))
        (tmp_path / "leases" / "island-3.json").unlink()  # somebody tidied up
        until(lambda: observed(tmp_path).get(3) == mine)
        assert leases.held() == {0, 1, 2, 3}
    assert sum("clusters/notes.txt" in text for text in said) == 1
    assert Path("/etc/passwd").exists()


class Overtaken(RoundStore):
    """A store in which cluster 1 writes each lease just after another cluster has written it."""

    def steady(self, what: str, call: Callable[[], Any]) -> Any:
        found = super().steady(what, call)
        if what.startswith("take leases/"):
            leases_module._write(self, what.removeprefix("take "), {"cluster": CLUSTERS[1], "taking": 7})
        return found


def test_the_last_writer_of_a_lease_wins(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        Leases(opened(tmp_path), CLUSTERS[1], 4, **TIMES) as winner,
        Leases(Overtaken(tmp_path, said.append), CLUSTERS[0], 4, **TIMES) as loser,
    ):
        assert winner.wait_observed(120)
        assert loser.wait_observed(120)
        assert not loser.take(0)
        assert loser.held() == set()
        assert winner.take(0)
        with loser._lock:
            loser._held.add(0)  # as if it had read its lease back before the other one wrote
        until(lambda: loser.held() == set())
        until(lambda: any("island 0 was taken by cluster 11111111 on" in text for text in said))
        assert winner.held() == {0}


def test_a_restart_is_the_same_cluster_and_a_copy_of_its_directory_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    cluster = new_cluster_id()
    for island in range(4):  # a killed process of this cluster held all islands
        leases_module._write(opened(tmp_path), f"leases/island-{island}.json", {"cluster": cluster, "taking": 1})
    with Leases(opened(tmp_path), CLUSTERS[1], 4, **TIMES) as other:
        assert other.wait_observed(120)
        with Leases(opened(tmp_path), cluster, 4, **TIMES) as again:
            # It releases two leases that this process has never taken.
            until(lambda: (again.wanted(), other.wanted()) == ({0, 1}, {2, 3}))
            until(lambda: (share(again), share(other)) == ({0, 1}, {2, 3}))
    assert os.listdir(tmp_path / "leases") == []
    with Leases(opened(tmp_path), cluster, 2, **TIMES) as leases:
        until(lambda: share(leases) == {0, 1})
        with Leases(opened(tmp_path, said.append), cluster, 2, **TIMES):
            until(lambda: any("another process uses this cluster's id" in text for text in said))


def test_a_failing_store_is_reported_once_and_the_thread_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    place, away = tmp_path / "store", tmp_path / "away"
    with Leases(opened(place, said.append), CLUSTERS[0], 2, **TIMES) as leases:
        until(lambda: share(leases) == {0, 1})
        place.rename(away)
        until(lambda: any("can't be renewed" in text for text in said))
        assert not place.exists()
        away.rename(place)
        until(lambda: any("are renewed again" in text for text in said))
        assert leases.held() == {0, 1}
    assert len(said) == 2
    (place / "leases").rmdir()
    (place / "leases").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is a link"):
        opened(place).check_mounted()
