"""Many random faults in many short data jobs: each job must have the same output as an undisturbed one.

    PYTHONPATH=tests .venv/bin/python tests/faults_prepare.py [--faults 100] [--seed 0] [--only SEED]
                                                              [--engines pool ranks dask]

A job is one output folder. Commands write to it one after the other until the output is complete, each with a random
engine, number of workers and memory. Meanwhile:

- Worker processes, the driver, a rank or Dask's workers get SIGKILL at random moments.
- The disk of the output or of the temporary folder is full, or /dev/shm is, for a while or until the command has ended.
- Symbolic links appear in the output folder, under the names of output files and others.
- The reader of the output goes away.
- The clock of one driver and its workers jumps: libfaketime fakes it.

After each command, no process of the job and no temporary file may be left, nothing may be written through a link, and
the output is absent or complete: then every output file must have the same hash as in an undisturbed job. A command
that fails must name the cause. --only runs the job of one seed again: the same choices, but not the exact moments of
the faults. Faults that need root, user namespaces or libfaketime are skipped where these are missing, and this is
printed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from support.disturbances import (
    NO_SPACE,
    SHARED_MEMORY,
    Links,
    Schedule,
    free,
    impatient_reader,
    separate,
    small_disk,
    unmount_below,
)
from support.fake_clock import FakeClock
from support.preparing import write_posts

SCRIPT = Path(__file__).resolve().parent / "support" / "preparing.py"
MARK = "PREPARE_FAULTS"
MAX_COMMANDS = 40  # a job that needs more makes no progress
SURROUNDINGS = ("full disk", "full shared memory", "link", "closed pipe", "clock")
LINKS = ("part-{part:05}.jsonl", "_manifest.json", "_events.jsonl", "link", ".manyhands", ".manyhands/link")
JUMPS = (3.0, -3.0, 10.0, -10.0, 86400.0, -86400.0)
SECONDS = 5.0  # within which most faults happen: a command takes about as long
ERRORS = ("WorkerError", "DataError", "ConfigError")  # the package's own errors
MODULES = {"pool": "manyhands.prepare.engines.worker", "dask": "distributed.cli.dask_worker"}


class Failed(Exception):
    """A job did not have the expected output, or left files or processes."""


def processes(mark: str, text: str = "") -> list[int]:
    """Return the processes whose environment contains `mark` and whose command contains `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes() and text.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass  # the process ended meanwhile, or belongs to another user
    return found


class Cluster:
    """A Dask scheduler and two workers on this machine. `tend` restarts killed workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._workers: list[Any] = [None, None]
        folder.mkdir()
        self._scheduler = self._start("dask_scheduler", "--port", "0", "--host", "127.0.0.1")
        while not (folder / "scheduler.json").exists():
            time.sleep(0.1)
        self.address = json.loads((folder / "scheduler.json").read_text())["address"].replace("tcp", "dask")
        self.tend()

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        file = str(self.folder / "scheduler.json")
        command = [sys.executable, "-m", f"distributed.cli.{name}", "--scheduler-file", file, "--no-dashboard"]
        with open(self.folder / "log", "ab") as log:
            environment = {**os.environ, MARK: str(self.folder)}
            return subprocess.Popen([*command, *options], cwd=self.folder, env=environment, stdout=log, stderr=log)

    def tend(self) -> None:
        """Start the workers that are not running."""
        for number, worker in enumerate(self._workers):
            if worker is None or worker.poll() is not None:
                self._workers[number] = self._start("dask_worker", "--no-nanny", "--nthreads", "2")

    def end(self) -> None:
        """Kill the workers and the scheduler."""
        for process in (*self._workers, self._scheduler):
            process.kill()
            process.wait()


def command_options(engine: str, cluster: Cluster | None, chance: random.Random) -> list[dict[str, Any]]:
    """Return the options of one command, or of one command per rank."""
    if engine == "dask" and cluster is not None:
        return [{"engine": cluster.address}]
    workers = chance.choice([1, 2, 3, 5])
    how: dict[str, Any] = {"workers": workers, "memory": chance.choice([f"{192 * workers}MiB", "4GiB"])}
    if engine == "pool":
        return [how]
    return [{**how, "workers": 1, "engine": f"rank {number} of 3"} for number in range(3)]


def kill_one(
    folder: Path, drivers: list[subprocess.Popen[bytes]], cluster: Cluster | None, chance: random.Random
) -> bool:
    """Kill a random process of the job. Return whether one was killed."""
    marks = [f"{MARK}={folder}"] + ([f"{MARK}={cluster.folder}"] if cluster else [])
    computing = [pid for mark in marks for pid in processes(mark, MODULES["pool"])]
    driving = [driver.pid for driver in drivers if driver.poll() is None]
    others = processes(marks[-1], MODULES["dask"]) if cluster and chance.random() < 0.3 else []
    victims = others or chance.choice([computing, computing, driving]) or driving
    if not victims:
        return False
    try:
        os.kill(chance.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def sha256s(folder: Path) -> dict[str, str]:
    """Hash all files except the events, which contain times."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith("_events")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Job:
    """One job: its folder, its random choices, and the faults that have happened. missing: kinds to leave out."""

    def __init__(self, posts: Path, folder: Path, seed: int, missing: Collection[str]) -> None:
        self.posts, self.folder, self._chance = posts, folder, random.Random(seed)
        self.happened: Counter[str] = Counter()
        self._kinds = [kind for kind in SURROUNDINGS if kind not in missing]
        self.output, self._temporary = folder / "disk" / "out", folder / "temporary"
        self._disks = [folder / "disk", self._temporary]
        for disk in self._disks:
            disk.mkdir(parents=True)
            if "full disk" in self._kinds:
                small_disk(disk, "32m")
        self._links = Links(folder / "decoy")

    def prepare(self, engines: list[str], cluster: Cluster | None) -> dict[str, str]:
        """Run commands until the output is complete. Return the hashes of its files."""
        for _ in range(MAX_COMMANDS):
            engine = self._chance.choice(engines)
            if self._run_once(engine, cluster if engine == "dask" else None):
                return sha256s(self.output)
        raise Failed(f"the output is not complete after {MAX_COMMANDS} commands")

    def _run_once(self, engine: str, cluster: Cluster | None) -> bool:
        """Run one command, or three ranks, and disturb it. Return True if the output is complete."""
        chance, log = self._chance, self.folder / "log"
        log.write_bytes(b"")
        options, schedule = command_options(engine, cluster, chance), Schedule()
        kinds = chance.sample(self._kinds, min(len(self._kinds), chance.choice([0, 1, 2, 3])))
        clock, fast = FakeClock(self.folder / "clock"), chance.randrange(len(options)) if "clock" in kinds else None
        bytes_read = chance.randint(0, 400) if "closed pipe" in kinds else None
        self._disturb(kinds, schedule)
        drivers = []
        for number, how in enumerate(options):
            output = (
                os.open(log, os.O_WRONLY | os.O_APPEND) if bytes_read is None else impatient_reader(bytes_read, log)
            )
            environment = os.environ | (clock.environment() if number == fast else {})
            drivers.append(self._start(how, environment, output))
        if fast is not None:
            schedule.jump(clock, chance.choice(JUMPS), chance, SECONDS)
        for _ in range(chance.randint(0, 3)):
            schedule.add(chance.uniform(0.3, SECONDS), "kill", partial(kill_one, self.folder, drivers, cluster, chance))
            if cluster is not None:
                schedule.add(SECONDS, "", cluster.tend)  # a job waits for Dask's workers, but does not start any
        schedule.run(lambda: all(driver.poll() is not None for driver in drivers))
        if bytes_read is not None:
            schedule.happened.append("closed pipe")
        if cluster is not None:
            cluster.tend()
        for driver in drivers:
            driver.wait(timeout=180)
            clock.forget(driver.pid)
        self.happened.update(schedule.happened)
        return self._check([driver.returncode for driver in drivers], schedule.happened, log.read_text())

    def _disturb(self, kinds: list[str], schedule: Schedule) -> None:
        """Plan the faults around a command."""
        chance = self._chance
        if "full disk" in kinds:
            schedule.fill(chance.choice(self._disks), "full disk", chance, SECONDS)
        if "full shared memory" in kinds:
            schedule.fill(SHARED_MEMORY, "full shared memory", chance, SECONDS)
        if "link" in kinds:
            for _ in range(3):
                path = self.output / chance.choice(LINKS).format(part=chance.randint(0, 1))
                schedule.add(chance.uniform(0, SECONDS), "link", partial(self._links.put, path, chance))

    def _start(self, how: dict[str, Any], environment: dict[str, str], output: int) -> subprocess.Popen[bytes]:
        """Start a driver, and close `output`."""
        mine = {MARK: str(self.folder), "TMPDIR": str(self._temporary)}
        command = [sys.executable, str(SCRIPT), str(self.posts), str(self.output), json.dumps(how)]
        try:
            return subprocess.Popen(command, env=environment | mine, stdout=output, stderr=output)
        finally:
            os.close(output)

    def _check(self, codes: list[int], happened: list[str], output: str) -> bool:
        """Check that a command has ended well and has left nothing behind. Return True if the output is complete."""
        deadline = time.monotonic() + 10
        while processes(f"{MARK}={self.folder}"):
            if time.monotonic() > deadline:
                raise Failed("processes outlive their parent")
            time.sleep(0.02)
        for disk in (*self._disks, SHARED_MEMORY):
            if "full disk" in self._kinds:
                free(disk)
        self._links.remove()
        left = [path.name for path in self._temporary.iterdir() if path.name != f"manyhands-{os.getuid()}"]
        if left := left or [path.name for path in self.folder.glob("disk/*") if path != self.output]:
            raise Failed(f"left behind: {left}")
        if damage := self._links.damage():
            raise Failed(damage)
        failed = [code for code in codes if code not in (0, -signal.SIGKILL)]
        if failed and "closed pipe" not in happened:
            if set(failed) - {1, 2} or not any(error in output for error in ERRORS):
                raise Failed(f"a command ended with {failed}, after {happened}:\n{output}")
            disks = {"full disk", "full shared memory"}
            if set(happened) <= disks and not any(text in output for text in NO_SPACE):
                raise Failed(f"a full disk has ended it, and the error does not say so:\n{output}")
        return 0 in codes

    def delete(self) -> None:
        """Delete the job's files."""
        unmount_below(self.folder)
        shutil.rmtree(self.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="stop after the job with this fault")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first job; each next job adds 1")
    parser.add_argument("--only", type=int, metavar="SEED", help="run only the job of this seed")
    parser.add_argument("--engines", nargs="+", default=["pool", "ranks", "dask"])
    options = parser.parse_args()
    console, missing = Console(highlight=False), separate()
    for kind, reason in missing.items():
        console.print(f"skipped on this machine: {kind}: {reason}")
    scratch = Path(tempfile.mkdtemp(prefix="faults-prepare-"))
    posts, total, bad = scratch / "posts", Counter[str](), list[int]()
    posts.mkdir()
    write_posts(posts)
    subprocess.run(
        [sys.executable, str(SCRIPT), str(posts), str(scratch / "undisturbed"), "1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    expected = sha256s(scratch / "undisturbed")
    cluster = Cluster(scratch / "dask") if "dask" in options.engines else None
    seeds = itertools.count(options.seed) if options.only is None else [options.only]
    count = 0
    try:
        for seed in seeds:
            if total.total() >= options.faults or len(bad) > 3:
                break
            folder, started, count = scratch / str(seed), time.monotonic(), count + 1
            job = Job(posts, folder, seed, missing)
            try:
                if (found := job.prepare(options.engines, cluster)) != expected:
                    raise Failed(f"the output differs from an undisturbed job: got {found}, expected {expected}")
                faults = job.happened.total()
                console.print(f"seed {seed}: {faults} faults, {time.monotonic() - started:.0f} s")
                job.delete()
            except (Failed, subprocess.TimeoutExpired) as error:
                bad.append(seed)
                console.print(f"[red]seed {seed} failed[/]: {escape(str(error))}\n  see {folder}-kept", markup=True)
                shutil.copytree(folder, f"{folder}-kept", symlinks=True)  # its disks end with this process
            total += job.happened
    finally:
        if cluster is not None:
            cluster.end()
    console.print(f"{total.total()} faults in {count} jobs: {dict(sorted(total.items()))}")
    console.print(f"{len(bad)} jobs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
