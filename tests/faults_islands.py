"""Random faults in runs with islands on several clusters: every cluster must end with the undisturbed digest.

    PYTHONPATH=tests .venv/bin/python tests/faults_islands.py [--runs 60] [--seed 0] [--only SEED]

A run is a random recipe with islands, which one to three clusters train. They meet in a folder, or in an object store
(moto's server). Every cluster has its own workers, sharding and run directory, and computes fixed islands or its share.
Meanwhile, at random moments:

- A cluster is killed with SIGKILL, all processes at once, or sent SIGTERM. It starts again in its run directory, maybe
  with other workers, another sharding and other islands. Or it never comes back, or it starts late.
- A cluster is stopped with SIGSTOP for longer than the time after which it is lost.
- Two clusters compute the same island.
- The store is cut off, freezes or is slow, for one cluster or for all. A folder vanishes for a while, or its disk is
  full.

No process, temporary file, partial folder, lease or announcement may be left, except those of clusters that never came
back. --only runs the run of one seed again. A run is reproducible from its seed, except for the exact moments of its
faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from manyhands.storage.atomic import is_temporary
from manyhands.storage.location import Address
from support import s3
from support.disturbances import NO_SPACE, SHARED_MEMORY, free, separate, small_disk, unmount_below
from support.full_disk import fill
from support.island_clusters import Forks

LOST_AFTER, STEP_SECONDS = 2.0, 0.02
SECONDS = 9.0  # within which most faults happen
LIMIT_SECONDS = 120.0  # for a run
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")


class Failed(Exception):
    """A run that broke a guarantee."""


def random_islands(chance: random.Random) -> dict[str, Any]:
    """Return options of a random recipe's islands."""
    count, bits = chance.choice([2, 2, 3, 4]), chance.choice([32, 8, 4, 4, 2])
    every: Any = chance.choice([3, 4, 5, {"0": 3, "9": 5}])
    found = {"count": count, "bits": bits, "every": every, "delay": chance.choice([0, 0, 1, 2])}
    found["inner_state"] = chance.choice(["keep", "keep", "reset"])
    found["compress"] = chance.random() < 0.3
    if chance.random() < 0.6:
        found |= {"outer": "nesterov", "momentum_from": chance.choice([0, 6])}
    if chance.random() < 0.25:
        found["warm_steps"] = chance.choice([2, 4])
    return found


@dataclass
class Cluster:
    """A cluster of a run. islands: None if it takes its share. code: None while it runs, or before its start."""

    folder: Path
    workers: int
    sharding: str
    islands: list[int] | None
    checkpoint_every: int | None
    state_every: int
    network: s3.Network | None = None
    starts_at: float | None = 0.0  # seconds after the begin of the run; None: it isn't to be started
    is_lost: bool = False
    allowed: set[int] = field(default_factory=lambda: {0})
    pids: list[int] = field(default_factory=list)

    def spec(self, islands: dict[str, Any], muon: bool, at: str) -> dict[str, Any]:
        """Return what `support.island_clusters` needs."""
        given = {"islands_at": at, "islands": "auto" if self.islands is None else self.islands}
        own = {"run_dir": str(self.folder / "run"), "checkpoint_every": self.checkpoint_every}
        environment = {"CLUSTER": f"{self.folder}/", "TMPDIR": str(self.folder / "temporary")}
        if self.network is not None:
            environment["AWS_ENDPOINT_URL"] = self.network.url
        return {
            "islands": islands,
            "muon": muon,
            "workers": self.workers,
            "strategy": {
                "sharding": self.sharding,
                "islands_state_every": self.state_every,
                "islands_lost_after": LOST_AFTER,
            },
            "options": given | own,
            "environment": environment,
            "output": str(self.folder / "output"),
            "result": str(self.folder / "digest"),
        }

    def processes(self) -> list[int]:
        """Return its processes: those of its sessions, and those that inherit its environment."""
        mark, found = f"CLUSTER={self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, *_, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                is_mine = int(session) in self.pids or mark in (path / "environ").read_bytes()
                if is_mine and state != "Z":
                    found.append(int(path.name))
        return found

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all its processes."""
        while self.processes():
            self.signal(signal.SIGKILL)
            time.sleep(0.01)

    def left(self) -> list[int]:
        """Return the processes that are left some time after its end."""
        deadline = time.monotonic() + 10
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    @property
    def has_met(self) -> bool:
        """Return True once the cluster has opened the store."""
        return (self.folder / "run" / "islands" / "place").exists()

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""


class Run:
    """One run: its recipe, clusters and faults, from a seed."""

    def __init__(self, folder: Path, seed: int, forks: Forks, server: str, *, has_disks: bool) -> None:
        self._chance = chance = random.Random(seed)
        self.folder, self._forks = folder, forks
        self.islands, self.muon = random_islands(chance), chance.random() < 0.2
        self.happened: Counter[str] = Counter()
        self._stack, self._began = ExitStack(), 0.0
        self._is_on_s3 = chance.random() < 0.35
        self._disk = None if self._is_on_s3 or not has_disks else folder / "disk"
        self.store = (
            f"s3://{s3.BUCKET}/{seed}-{time.time_ns()}" if self._is_on_s3 else str((self._disk or folder) / "store")
        )
        self._server = server
        self._events: list[tuple[float, Callable[[], None]]] = []
        folder.mkdir()
        if self._disk is not None:
            small_disk(self._disk, "64m")
        self.clusters = [self._cluster(number, islands) for number, islands in enumerate(self._assigned())]

    def _assigned(self) -> list[list[int] | None]:
        """Return the islands of each cluster. All islands are computed by some cluster."""
        chance, count = self._chance, self.islands["count"]
        number = chance.choice([1, 2, 2, 2, 3, 3])
        found: list[list[int] | None] = [None] * number
        if chance.random() < 0.5 or "warm_steps" in self.islands:  # each island is on one cluster, some on two
            owners = [0, *(chance.randrange(number) for _ in range(count - 1))]
            found = [[island for island in range(count) if owners[island] == place] or None for place in range(number)]
            for islands in found:
                if islands is not None and chance.random() < 0.25:
                    self.happened["same island"] += 1
                    islands[:] = sorted({*islands, chance.randrange(count)})
        return found

    def _cluster(self, number: int, islands: list[int] | None) -> Cluster:
        chance, folder = self._chance, self.folder / f"cluster-{number}"
        (folder / "temporary").mkdir(parents=True)
        workers = 2 if chance.random() < 0.25 else 1
        every, state_every = chance.choice([None, None, 1, 7]), chance.choice([1, 2, 2, 4])
        network = self._stack.enter_context(s3.Network(self._server)) if self._is_on_s3 else None
        found = Cluster(folder, workers, chance.choice(SHARDINGS), islands, every, state_every, network)
        if number and chance.random() < 0.25:
            found.starts_at = chance.uniform(1, SECONDS)
            self.happened["late"] += 1
        return found

    def describe(self) -> str:
        """Describe the recipe and the clusters in one line."""
        options = ", ".join(f"{key} {value}" for key, value in self.islands.items() if value)
        clusters = "; ".join(
            f"{'auto' if each.islands is None else each.islands} by {each.workers} ({each.sharding})"
            for each in self.clusters
        )
        return f"{'S3' if self._is_on_s3 else 'folder'}, {options}{', muon' * self.muon} | {clusters}"

    # Faults

    def _plan(self) -> None:
        """Choose the faults."""
        chance = self._chance
        for cluster in self.clusters:
            for _ in range(chance.choice([0, 1, 1, 2, 3])):
                kind = chance.choice(["kill", "kill", "kill", "stop", "terminate", "gone"])
                self._add(chance.uniform(0.3, SECONDS), partial(self._hit, cluster, kind))
        kinds = (
            ["cut", "freeze", "slow"] if self._is_on_s3 else ["vanish", "vanish", *["full"] * (self._disk is not None)]
        )
        for _ in range(chance.choice([0, 0, 1, 1, 2])):
            start, seconds, kind = chance.uniform(0, SECONDS), chance.uniform(0.1, 4), chance.choice(kinds)
            victims = [chance.choice(self.clusters)] if chance.random() < 0.5 else self.clusters
            self._add(start, partial(self._disturb_store, kind, victims, seconds))

    def _add(self, seconds: float, action: Callable[[], None]) -> None:
        self._events.append((seconds, action))
        self._events.sort(key=lambda event: event[0])

    def _hit(self, cluster: Cluster, kind: str) -> None:
        """Kill, stop or terminate a cluster, if it is running."""
        now = time.monotonic() - self._began
        if cluster.starts_at is not None or cluster.is_lost or self._code(cluster) is not None:
            return
        if kind == "gone":
            if not self._can_be_lost(cluster):
                return
            cluster.is_lost = True
        self.happened[kind] += 1
        if kind == "stop":
            cluster.signal(signal.SIGSTOP)
            self._add(now + LOST_AFTER + self._chance.uniform(0.5, 3), partial(cluster.signal, signal.SIGCONT))
            return
        if kind == "terminate":
            cluster.allowed |= {130, -signal.SIGTERM}
            with suppress(ProcessLookupError):
                os.kill(cluster.pids[-1], signal.SIGTERM)
            return  # it is started again once it has ended
        cluster.kill()
        if kind == "kill":
            self._restart(cluster)

    def _can_be_lost(self, cluster: Cluster) -> bool:
        """Return True if other clusters can compute what a cluster computes."""
        others = [each for each in self.clusters if each is not cluster and not each.is_lost]
        makes_warm_steps = "warm_steps" in self.islands and 0 in (cluster.islands or ())
        return any(each.islands is None for each in others) and not makes_warm_steps

    def _restart(self, cluster: Cluster) -> None:
        """Start a cluster again soon, maybe with other options."""
        chance = self._chance
        if chance.random() < 0.4:
            cluster.workers, cluster.sharding = chance.choice([1, 1, 2]), chance.choice(SHARDINGS)
        if chance.random() < 0.3:
            self._change_islands(cluster)
        cluster.starts_at = time.monotonic() - self._began + chance.choice([0.1, 1.0, LOST_AFTER + 1])

    def _change_islands(self, cluster: Cluster) -> None:
        chance, count = self._chance, self.islands["count"]
        makes_warm_steps = "warm_steps" in self.islands and 0 in (cluster.islands or ())
        if makes_warm_steps:
            changed = sorted({*(cluster.islands or ()), chance.randrange(count)})
        elif self._can_be_lost(cluster):  # whatever it leaves, others compute
            changed = sorted({chance.randrange(count) for _ in range(2)})
        elif cluster.islands is not None:
            cluster.islands = None
            self.happened["other islands"] += 1
            return
        else:
            return
        if changed != cluster.islands:
            cluster.islands = changed
            self.happened["other islands"] += 1

    def _disturb_store(self, kind: str, victims: list[Cluster], seconds: float) -> None:
        end = time.monotonic() - self._began + seconds
        store = Path(self.store)
        if kind == "full" and self._disk is not None:
            fill(self._disk)
            for cluster in self.clusters:
                cluster.allowed.add(1)
            self._add(end, partial(free, self._disk))
        elif kind == "vanish":
            away = store.with_name("away")
            if not store.exists() or not all(each.is_lost or each.has_met for each in self.clusters):
                return  # a cluster that has never been there would take a missing folder for a new place
            store.rename(away)
            self._add(end, partial(_back, away, store))
        for network in [each.network for each in victims if each.network is not None]:
            if kind == "cut":
                network.cut()
                self._add(end, network.mended)
            elif kind == "freeze":
                network.freeze()
                self._add(end, network.thaw)
                self._add(end, network.thaw_new)
            else:
                network.delay = 0.1
                self._add(end, partial(setattr, network, "delay", 0.0))
        self.happened[kind] += 1

    # Course

    def _code(self, cluster: Cluster) -> int | None:
        return self._forks.code(cluster.pids[-1]) if cluster.pids else None

    def go(self) -> None:
        """Run all clusters to their end, with faults. Raises Failed."""
        expected = self._undisturbed()
        self._plan()
        self._began = time.monotonic()
        try:
            while len([True for cluster in self.clusters if self._advance(cluster)]) < len(self.clusters):
                now = time.monotonic() - self._began
                while self._events and self._events[0][0] <= now:
                    self._events.pop(0)[1]()
                if now > LIMIT_SECONDS:
                    raise Failed(f"not complete after {now:.0f} s{self._stacks()}")
                time.sleep(0.02)
            self._check(expected)
        finally:
            for cluster in self.clusters:
                cluster.kill()
            self._stack.close()

    def _undisturbed(self) -> str:
        """Return the digest of one cluster alone that computes all islands."""
        alone = Cluster(self.folder / "alone", 1, "ddp", None, None, 10)
        (alone.folder / "temporary").mkdir(parents=True)
        spec = alone.spec(self.islands, self.muon, "")
        spec["options"] = {"run_dir": str(alone.folder / "run")}
        spec["environment"]["STEP_SECONDS"] = "0"
        pid = self._forks.start(spec)
        while (code := self._forks.code(pid)) is None:
            time.sleep(0.02)
        if code:
            raise Failed(f"the undisturbed run ended with {code}:\n{alone.output}")
        return (alone.folder / "digest").read_text()

    def _advance(self, cluster: Cluster) -> bool:
        """Start a cluster if it is time, and return True once it has ended for good."""
        if cluster.is_lost:
            return True
        if cluster.starts_at is not None:
            if time.monotonic() - self._began >= cluster.starts_at:
                cluster.starts_at = None
                cluster.pids.append(self._forks.start(cluster.spec(self.islands, self.muon, self.store)))
            return False
        code = self._code(cluster)
        if code is None:
            return False
        if code == 0:
            return True
        if code not in cluster.allowed or (code == 1 and not any(text in cluster.output for text in NO_SPACE)):
            raise Failed(f"{cluster.folder.name} ended with {code}:\n{cluster.output[-4000:]}")
        if left := cluster.left():
            raise Failed(f"{cluster.folder.name} ended with {code}, and left processes {left}")
        self._restart(cluster)
        return False

    def _stacks(self) -> str:
        """Return the ends of the clusters' outputs, with the stacks of those that are running."""
        for cluster in self.clusters:
            cluster.signal(signal.SIGCONT)
            cluster.signal(signal.SIGUSR1)
        time.sleep(1.0)
        return "".join(f"\n--- {each.folder.name}:\n{each.output[-6000:]}" for each in self.clusters)

    # Checks

    def _check(self, expected: str) -> None:
        finished = [cluster for cluster in self.clusters if not cluster.is_lost]
        for cluster in finished:
            found = (cluster.folder / "digest").read_text()
            if found != expected:
                raise Failed(f"the digest of {cluster.folder.name} is {found}, not {expected}")
            if processes := cluster.left():
                raise Failed(f"{cluster.folder.name} has left processes: {processes}")
        while self._events:  # give the folder back
            self._events.pop(0)[1]()
        lost = [cluster for cluster in self.clusters if cluster.is_lost]
        left = [f"/dev/shm/{path.name}" for path in SHARED_MEMORY.iterdir() if self._disk or "manyhands" in path.name]
        left += [str(path) for each in finished for path in (each.folder / "run").rglob("*") if _is_left(path.name)]
        names = self._names()
        ids = {found for each in lost if (found := _id(each)) is not None}
        left += [name for name in names if any(map(_is_left, name.split("/"))) and not (lost and "states/" in name)]
        left += [name for name in names if name.startswith("clusters/") and Path(name).stem not in ids]
        left += [name for name in names if name.startswith("leases/") and not lost]
        if left:
            raise Failed(f"left behind: {left}")
        for cluster in finished:
            if "Traceback" in cluster.output or "InvariantError" in cluster.output:
                raise Failed(f"{cluster.folder.name} has printed a traceback:\n{cluster.output[-4000:]}")

    def _names(self) -> list[str]:
        """Return the names of all files in the store."""
        if not self._is_on_s3:
            return [str(path.relative_to(self.store)) for path in Path(self.store).rglob("*")]
        return Address(self.store).files()

    def delete(self) -> None:
        """Delete the run's files."""
        unmount_below(self.folder)
        shutil.rmtree(self.folder)


def _back(away: Path, store: Path) -> None:
    """Give the folder its name back. Nobody may have created another one meanwhile."""
    if not away.exists():
        return
    if store.exists():
        found = [str(path.relative_to(store)) for path in store.rglob("*")]
        raise Failed(f"the store was created anew while it was away, with {found}")
    away.rename(store)


def _is_left(name: str) -> bool:
    return is_temporary(name) or name.endswith((".partial", ".tmp"))


def _id(cluster: Cluster) -> str | None:
    """Return the id of a cluster's run, if it was recorded."""
    with suppress(OSError, ValueError):
        return str(json.loads((cluster.folder / "run" / "manifest.json").read_text())["id"])
    return None


@contextmanager
def _server() -> Iterator[str]:
    """Run moto's server, and let this process find it."""
    with s3.running() as url:
        os.environ.update({**s3.VARIABLES, "AWS_ENDPOINT_URL": url})
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the others use the following ones")
    parser.add_argument("--only", type=int, metavar="SEED", help="run only the run of this seed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console, missing = Console(highlight=False, soft_wrap=True), separate()
    if "full disk" in missing:
        console.print(f"skipped on this machine: full disk: {missing['full disk']}")
    scratch = Path(tempfile.mkdtemp(prefix="faults-islands-"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    total, bad = Counter[str](), []
    seeds = range(options.seed, options.seed + options.runs) if options.only is None else [options.only]
    with ExitStack() as stack:
        server, forks = stack.enter_context(_server()), Forks(STEP_SECONDS)
        stack.callback(forks.close)
        for seed in seeds:
            folder, started = scratch / str(seed), time.monotonic()
            run = Run(folder, seed, forks, server, has_disks="full disk" not in missing)
            try:
                run.go()
            except Failed as error:
                bad.append(seed)
                console.print(f"[red]seed {seed} failed[/]: {escape(str(error))}")
                console.print(f"  {escape(run.describe())}\n  see {folder}-kept; to repeat it: --only {seed}")
                shutil.copytree(folder, f"{folder}-kept", symlinks=True)  # its disk ends with this process
                continue
            finally:
                total += run.happened
            faults = ", ".join(f"{count} {kind}" for kind, count in sorted(run.happened.items())) or "no faults"
            console.print(f"seed {seed}: {faults}, {time.monotonic() - started:.0f} s ({escape(run.describe())})")
            run.delete()
    console.print(f"{total.total()} faults in {len(seeds)} runs: {dict(sorted(total.items()))}")
    console.print(f"{len(bad)} runs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
