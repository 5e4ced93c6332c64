"""Many random faults in many short runs: each run must end with the digest of an undisturbed one.

    PYTHONPATH=tests .venv/bin/python tests/faults.py [--runs 40] [--seed 0] [--only SEED] [--hosts]

A run is one directory in which commands train one after the other until it is complete: each with another number of
workers, sharding and transport, and with a few faults:

- A worker raises, is killed, stopped, sent SIGTERM or sleeps while it starts, computes, sends gradients, updates or
  writes a checkpoint or snapshot.
- A launcher is killed or sent SIGTERM.
- The disk of the run directory, of its checkpoints or of the temporary folder is full, or /dev/shm is, for a while or
  until the command has ended.
- Symbolic links appear in the run directory and among the checkpoints.
- The reader of the output goes away.
- The clock of one host jumps: libfaketime fakes it.

Some commands are two launchers, as on two hosts; with --hosts all are two or three. --only runs the run of one seed
again. Faults that need root, user namespaces or libfaketime are skipped where these are missing, and this is printed.

No process and no file may be left after a command, no checkpoint that was reported as saved may be lost, nothing may be
written through a link, and a command that only a full disk has ended must say so. A run is reproducible from its seed,
except for the exact moments of its faults.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console
from rich.markup import escape

from manyhands.checkpoint.format import list_checkpoints
from manyhands.errors import ManyhandsError
from manyhands.listeners.run_directory import RunDirectory
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
from test_faults import MANYHANDS, SUPPORT, Run

STEPS, MICRO_BATCHES = 8, 4
KINDS = ("kill", "kill", "raise", "terminate", "stop", "stall")
PLACES = ("start", "forward", "backward", "update", "checkpoint", "snapshot")
SHARDINGS, TRANSPORTS = ("ddp", "zero1", "zero2", "zero3"), ("shared-memory", "distributed")
ENDS = (0, 1, 130, -signal.SIGKILL, -signal.SIGTERM)  # the last: SIGTERM before Python could handle it
JOINED_ENDS = (*ENDS, 2)  # of a joining host; 2: there is no run to join (any more)
SURROUNDINGS = ("full disk", "full shared memory", "link", "closed pipe", "clock")
LINKS = ("checkpoints/step-{step:08}", "checkpoints/link", "checkpoints/step-99999999", "link", "logs/worker-1.log")
JUMPS = (3.0, -3.0, 10.0, -10.0, 86400.0, -86400.0)  # the last two only on one host
SECONDS = 12.0  # within which most faults happen: a command takes about as long
COMMANDS = 12  # limit for a run: with more, it makes no progress


class Failed(Exception):
    """A run that broke a guarantee."""


@dataclass
class Command(Run):
    """A run's command of one launcher or, as on several hosts, of several. bytes_read: of its output; None: all."""

    bytes_read: int | None = None

    def open_output(self) -> IO[bytes]:
        if self.bytes_read is None:
            return super().open_output()
        return os.fdopen(impatient_reader(self.bytes_read, self.folder / "output"), "wb")


def command(folder: Path, workers: int, chance: random.Random) -> list[str]:
    """Return a command that continues the run with random options."""
    sharding, transport = chance.choice(SHARDINGS), chance.choice(TRANSPORTS)
    options = ["--workers", str(workers), "--sharding", sharding, "--transport", transport, "--checkpoint-every", "1"]
    options += ["--loader-workers", chance.choice(["0", "0", "1"])]
    options += ["--snapshot-every", chance.choice(["1", "1", "auto", "never"])]
    where = ["--run-dir", str(folder / "directory"), "--steps", str(STEPS), "--max-restarts", "2"]
    return [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *options, *where]


def faults(workers: int, chance: random.Random) -> str:
    """Return random faults for one command, which starts its workers up to three times; each fault happens once."""
    found = []
    for _ in range(chance.randint(1, 4)):
        place = chance.choice(PLACES)
        kind = chance.choice(KINDS)
        if place == "start":  # an exception there is final, and a worker may sleep there for as long as it likes
            kind = chance.choice(["kill", "terminate", "stop"])
        if place in ("checkpoint", "snapshot") and workers == 1 and kind == "stall":
            kind = "stop"  # between two steps a worker without peers has no time limit
        count = 0 if place == "start" else chance.randint(1, 2 * MICRO_BATCHES // workers)
        found.append(f"{kind}-once {place} {count} {chance.randrange(workers)}")
    return ";".join(found)


class Session:
    """One run: its folder, its random choices, and the faults that have happened. missing: kinds to leave out."""

    def __init__(self, folder: Path, seed: int, missing: Collection[str], *, hosts: bool) -> None:
        self.folder, self._chance, self._hosts = folder, random.Random(seed), hosts
        self.happened: Counter[str] = Counter()
        self._kinds = [kind for kind in SURROUNDINGS if kind not in missing]
        self._last_saved = 0
        self._disks = [folder / "directory", folder / "directory" / "checkpoints"]
        if "full disk" in self._kinds:
            for disk in self._disks:
                small_disk(disk, "8m")
        folder.mkdir(exist_ok=True)
        self._links = Links(folder / "decoy")

    def train(self) -> str:
        """Run commands until the run is complete; return its digest."""
        for number in range(COMMANDS):
            last = number == COMMANDS - 1  # without faults
            count = self._chance.choice([2, 2, 3]) if self._hosts or self._chance.random() < 1 / 6 else 1
            workers = self._chance.randint(1, MICRO_BATCHES // count)
            run, schedule = self._start(number, count, workers, calm=last)
            self._after(run, schedule)
            found = digest(self.folder) if run.process.returncode == 0 else None
            if found is not None:  # with a full disk, a run ends without a record
                return found
        raise Failed(f"the run is not complete after {COMMANDS} commands")

    def _start(self, number: int, count: int, workers: int, *, calm: bool) -> tuple[Command, Schedule]:
        """Run one command of `count` launchers and wait for its end."""
        chance, folder, schedule = self._chance, self.folder / str(number), Schedule()
        kinds = [] if calm else chance.sample(self._kinds, min(len(self._kinds), chance.choice([0, 1, 2, 3])))
        if "full disk" in kinds:
            small_disk(folder / "temporary", "8m")
            schedule.fill(chance.choice([*self._disks, folder / "temporary"]), "full disk", chance, SECONDS)
        if "full shared memory" in kinds:
            schedule.fill(SHARED_MEMORY, "full shared memory", chance, SECONDS)
        if "link" in kinds:
            for _ in range(3):
                path = self.folder / "directory" / chance.choice(LINKS).format(step=chance.randint(1, STEPS))
                schedule.add(chance.uniform(0, SECONDS), "link", partial(self._links.put, path, chance))
        bytes_read = chance.randint(0, 1500) if "closed pipe" in kinds else None
        fault = "" if calm or chance.random() < 0.2 else faults(count * workers, chance)
        clock, fast = FakeClock(self.folder / "clock"), chance.randrange(count) if "clock" in kinds else None
        environments = [clock.environment() if place == fast else {} for place in range(count)]
        first, join = self._commands(count, workers, forks=fast is None)
        run = Command(folder, first, fault, environments[0], bytes_read=bytes_read)
        launchers = [run.process, *(run.start(join, environment) for environment in environments[1:])]
        if fast is not None:
            schedule.jump(clock, chance.choice(JUMPS if count == 1 else JUMPS[:4]), chance, SECONDS)
        if not calm and chance.random() < (0.2 if count == 1 else 0.5):
            victim, number = chance.choice(launchers), chance.choice([signal.SIGKILL, signal.SIGTERM])
            schedule.add(chance.uniform(1, SECONDS * count), number.name, partial(victim.send_signal, number))
        if fast is not None and count > 1:  # hosts whose clocks differ may wait for each other for minutes
            schedule.add(60.0, "", partial(clock.jump, 0))
            for launcher in launchers:
                schedule.add(61.0, "", partial(launcher.send_signal, signal.SIGTERM))
        schedule.run(lambda: run.process.poll() is not None)
        if bytes_read is not None:
            schedule.happened.append("closed pipe")
        run.wait(120)
        for launcher in launchers:
            clock.forget(launcher.pid)
            if launcher is not run.process and launcher.wait() not in JOINED_ENDS:
                raise Failed(f"a joining launcher ended with {launcher.returncode}:\n{run.output}")
        return run, schedule

    def _commands(self, count: int, workers: int, *, forks: bool) -> tuple[list[str], list[str]]:
        """Return the commands of the first host, or the only one, and of the other hosts.

        forks: whether workers may fork loader processes. With libfaketime they may hang, also without Manyhands: it
        holds a lock while a thread asks for the time, and a process that is forked meanwhile waits for it forever.
        """
        first = command(self.folder, workers, self._chance)
        if not forks:
            first[first.index("--loader-workers") + 1] = "0"
        if count == 1:
            return first, []
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        options = first[len(MANYHANDS) + 1 :]
        for of_first_host in ("--snapshot-every", "--max-restarts"):
            place = options.index(of_first_host)
            del options[place : place + 2]
        return [*first, "--hosts", f"1:{count}", "--rendezvous", endpoint], [*MANYHANDS, "join", endpoint, *options]

    def _after(self, run: Command, schedule: Schedule) -> None:
        """Check that a command has ended well, has left nothing behind, and has lost no checkpoint."""
        for disk in (*self._disks, run.folder / "temporary", SHARED_MEMORY):
            if "full disk" in self._kinds:
                free(disk)
        marks = {path.name.rpartition("-")[2] for path in run.folder.glob("fault-time-*")}
        inner = [text.partition("-")[0] for number, text in enumerate(run.fault.split(";")) if str(number) in marks]
        self.happened.update([*(f"worker: {kind}" for kind in inner), *schedule.happened])
        self._links.remove()
        if left := run.left_behind() or self._links.damage():
            raise Failed(f"left behind: {left}")
        self._check_checkpoints()
        if "InvariantError" in run.output or "different collective calls" in run.output:
            raise Failed(run.output)
        code, kinds = run.process.returncode, set(schedule.happened)
        if code == -signal.SIGTERM and (run.folder / "fault-time").exists():
            raise Failed("the launcher did not handle SIGTERM while workers were running")
        if code not in (ENDS if not kinds & {"full disk", "link"} else JOINED_ENDS):
            raise Failed(f"ended with {code}:\n{run.output}")
        only_full = not inner and kinds and kinds <= {"full disk", "full shared memory"}
        if code and only_full and not any(text in run.output for text in NO_SPACE):
            raise Failed(f"a full disk has ended it with {code}, and the error does not say so:\n{run.output}")

    def _check_checkpoints(self) -> None:
        checkpoints = self.folder / "directory" / "checkpoints"
        found = [step for step, _ in list_checkpoints(checkpoints)]
        events = RunDirectory(self.folder / "directory").read_events()
        reported = [event["step"] for event in events if event["event"] == "saved"]
        saved, last = max([self._last_saved, *reported]), max(found, default=0)
        if last < saved:
            raise Failed(f"step {saved} was saved, and the last checkpoint is of step {last}")
        self._last_saved = last

    def delete(self) -> None:
        """Delete the run's files."""
        unmount_below(self.folder)
        shutil.rmtree(self.folder)


def digest(folder: Path) -> str | None:
    """Return the digest of a completed run."""
    events = RunDirectory(folder / "directory").read_events()
    return next((str(event["digest"]) for event in reversed(events) if event["event"] == "ended"), None)


def undisturbed(scratch: Path) -> str:
    """Return the digest of an undisturbed run."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    folder = scratch / "undisturbed"
    run = Run(folder / "0", command(folder, 1, random.Random(0)), "").wait(120)
    found = digest(folder)
    if found is None:
        raise SystemExit(run.output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the others use the following ones")
    parser.add_argument("--only", type=int, metavar="SEED", help="run only the run of this seed")
    parser.add_argument("--hosts", action="store_true", help="every command is two or three launchers")
    options = parser.parse_args()
    console, missing = Console(highlight=False), separate()
    for kind, reason in missing.items():
        console.print(f"skipped on this machine: {kind}: {reason}")
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    expected = undisturbed(scratch)
    total, bad = Counter[str](), []
    seeds = range(options.seed, options.seed + options.runs) if options.only is None else [options.only]
    for seed in seeds:
        folder, started = scratch / str(seed), time.monotonic()
        session = Session(folder, seed, missing, hosts=options.hosts)
        try:
            if (found := session.train()) != expected:
                raise Failed(f"its digest is {found}, not {expected}")
        except (Failed, ManyhandsError, pytest.fail.Exception) as error:
            bad.append(seed)
            console.print(f"[red]seed {seed} failed[/]: {escape(str(error))}\n  see {folder}-kept", markup=True)
            shutil.copytree(folder, f"{folder}-kept", symlinks=True)  # its disks end with this process
            continue
        finally:
            total += session.happened
        console.print(f"seed {seed}: {session.happened.total()} faults, {time.monotonic() - started:.0f} s")
        session.delete()
    console.print(f"{total.total()} faults in {len(seeds)} runs: {dict(sorted(total.items()))}")
    console.print(f"{len(bad)} runs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
