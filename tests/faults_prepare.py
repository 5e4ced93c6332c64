"""Kills processes of many short jobs at random: each job must have the same output as without kills.

    PYTHONPATH=tests .venv/bin/python tests/faults_prepare.py [--kills 100] [--seed 0] [--engines pool ranks dask]

A job is one output folder. Commands write to it one after the other until the output is complete, each with a random
engine, number of workers and memory. Meanwhile, worker processes, the driver, a rank or Dask's workers get SIGKILL at
random moments. In the end every output file must have the same hash as in a job without kills, and no process of the
job and no other file may be left. A job's seed replays its choices, but not the exact moments of its kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from support.preparing import write_posts

SCRIPT = Path(__file__).resolve().parent / "support" / "preparing.py"
MARK = "PREPARE_FAULTS"
MAX_COMMANDS = 40  # a job that needs more makes no progress
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


def kill_one(folder: Path, drivers: list[subprocess.Popen[str]], cluster: Cluster | None, chance: random.Random) -> int:
    """Kill a random process of the job. Return the number of killed processes, 0 or 1."""
    marks = [f"{MARK}={folder}"] + ([f"{MARK}={cluster.folder}"] if cluster else [])
    computing = [pid for mark in marks for pid in processes(mark, MODULES["pool"])]
    driving = [driver.pid for driver in drivers if driver.poll() is None]
    others = processes(marks[-1], MODULES["dask"]) if cluster and chance.random() < 0.3 else []
    victims = others or chance.choice([computing, computing, driving]) or driving
    if not victims:
        return 0
    try:
        os.kill(chance.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def run_once(
    posts: Path, folder: Path, engine: str, cluster: Cluster | None, chance: random.Random
) -> tuple[bool, int]:
    """Run one command, or three ranks, and kill processes meanwhile. Return (output is complete, number of kills)."""
    environment = {**os.environ, MARK: str(folder), "TMPDIR": str(folder)}
    drivers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(posts), str(folder / "out"), json.dumps(how)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in command_options(engine, cluster, chance)
    ]
    kills = 0
    for _ in range(chance.randint(1, 4)):
        time.sleep(chance.uniform(0.1, 1.5))
        kills += kill_one(folder, drivers, cluster, chance)
        if cluster is not None:
            cluster.tend()  # a job waits for Dask's workers, but does not start any
    errors = [driver.communicate(timeout=180)[1] for driver in drivers]
    deadline = time.monotonic() + 10
    while processes(f"{MARK}={folder}"):
        if time.monotonic() > deadline:
            raise Failed("processes outlive their parent")
        time.sleep(0.02)
    for driver, text in zip(drivers, errors, strict=True):
        expected = driver.returncode in (0, -signal.SIGKILL) or "WorkerError" in text
        if not expected:
            raise Failed(f"a command ended with {driver.returncode}:\n{text}")
    return any(driver.returncode == 0 for driver in drivers), kills


def sha256s(folder: Path) -> dict[str, str]:
    """Hash all files except the events, which contain times."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith("_events")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def prepared(
    posts: Path, folder: Path, engines: list[str], cluster: Cluster | None, seed: int
) -> tuple[dict[str, str], int]:
    """Run commands until the output is complete. Return the hashes of its files, and the number of kills."""
    chance, total = random.Random(seed), 0
    folder.mkdir()
    for _ in range(MAX_COMMANDS):
        engine = chance.choice(engines)
        done, kills = run_once(posts, folder, engine, cluster if engine == "dask" else None, chance)
        total += kills
        if done:
            left = [path.name for path in folder.iterdir() if path.name != "out"]
            if left:
                raise Failed(f"left behind: {left}")
            return sha256s(folder / "out"), total
    raise Failed(f"the output is not complete after {MAX_COMMANDS} commands")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first job; each next job adds 1")
    parser.add_argument("--engines", nargs="+", default=["pool", "ranks", "dask"])
    options = parser.parse_args()
    console = Console(highlight=False)
    scratch = Path(tempfile.mkdtemp(prefix="faults-prepare-"))
    posts, total, bad, seed = scratch / "posts", 0, [], options.seed
    posts.mkdir()
    write_posts(posts)
    subprocess.run(
        [sys.executable, str(SCRIPT), str(posts), str(scratch / "undisturbed"), "1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    expected = sha256s(scratch / "undisturbed")
    cluster = Cluster(scratch / "dask") if "dask" in options.engines else None
    try:
        while total < options.kills:
            folder, started = scratch / str(seed), time.monotonic()
            try:
                found, kills = prepared(posts, folder, options.engines, cluster, seed)
                if found != expected:
                    raise Failed(f"the output differs from a job without kills: got {found}, expected {expected}")
                total += kills
                console.print(f"seed {seed}: {kills} kills, {time.monotonic() - started:.0f} s, {total} so far")
                shutil.rmtree(folder)
            except Failed as error:
                bad.append(seed)
                console.print(f"[red]seed {seed} failed[/]: {error}\n  see {folder}", markup=True)
                if len(bad) > 3:
                    break
            seed += 1
    finally:
        if cluster is not None:
            cluster.end()
    console.print(f"{total} kills; {len(bad)} of {seed - options.seed} jobs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
