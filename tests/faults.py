"""Many random faults in many short runs: each run must end with the digest of an undisturbed one.

    .venv/bin/python tests/faults.py [--runs 40] [--seed 0] [--only SEED]

A run is one directory in which commands train one after the other until it is complete: each with another number of
workers, sharding and transport, and with a few faults. A worker raises, is killed, stopped, sent SIGTERM or sleeps
while it starts, computes, sends gradients, updates or writes a checkpoint or snapshot; or the launcher is killed.
Some commands are two launchers, as on two hosts, one of which is killed or sent SIGTERM at a random time. No process
and no file may be left after a command, and no checkpoint that was reported as saved may be lost. A run is
reproducible from its seed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from manyhands.checkpoint.format import list_checkpoints
from manyhands.errors import ManyhandsError
from manyhands.listeners.run_directory import RunDirectory
from test_faults import MANYHANDS, SUPPORT, Run

STEPS, MICRO_BATCHES = 8, 4
KINDS = ("kill", "kill", "raise", "terminate", "stop", "stall")
PLACES = ("start", "forward", "backward", "update", "checkpoint", "snapshot")
SHARDINGS, TRANSPORTS = ("ddp", "zero1", "zero2", "zero3"), ("shared-memory", "distributed")
ENDS = (1, 130, -signal.SIGKILL, -signal.SIGTERM)  # the last: SIGTERM before Python could handle it
JOINED_ENDS = (*ENDS, 0, 2)  # of a joining host; 2: there is no run to join (any more)
COMMANDS = 12  # limit for a run: with more, it makes no progress


class Failed(Exception):
    """A run that broke a guarantee."""


def command(folder: Path, workers: int, chance: random.Random) -> list[str]:
    """Return a command that continues the run with random options."""
    sharding, transport = chance.choice(SHARDINGS), chance.choice(TRANSPORTS)
    options = ["--workers", str(workers), "--sharding", sharding, "--transport", transport, "--checkpoint-every", "1"]
    options += ["--snapshot-every", chance.choice(["1", "1", "auto", "never"])]
    where = ["--run-dir", str(folder / "directory"), "--steps", str(STEPS), "--max-restarts", "2"]
    return [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *options, *where]


def faults(workers: int, chance: random.Random) -> str:
    """Return random faults for one command, which starts its workers up to three times; each fault happens once."""
    found = []
    for _ in range(chance.randint(2, 4)):
        place = chance.choice(PLACES)
        kind = chance.choice(KINDS)
        if place == "start":  # an exception there is final, and a worker may sleep there for as long as it likes
            kind = chance.choice(["kill", "terminate", "stop"])
        if place in ("checkpoint", "snapshot") and workers == 1 and kind == "stall":
            kind = "stop"  # between two steps a worker without peers has no time limit
        count = 0 if place == "start" else chance.randint(1, 2 * MICRO_BATCHES // workers)
        found.append(f"{kind}-once {place} {count} {chance.randrange(workers)}")
    return ";".join(found)


def check(folder: Path, run: Run, saved: int) -> int:
    """Check that a command left nothing behind and lost no checkpoint; return the last saved step."""
    if run.left_behind():
        raise Failed(f"left behind: {run.left_behind()}")
    found = [step for step, _ in list_checkpoints(folder / "directory" / "checkpoints")]
    events = RunDirectory(folder / "directory").read_events()
    reported = [event["step"] for event in events if event["event"] == "saved"]
    last = max(found, default=0)
    if last < max([saved, *reported]):
        raise Failed(f"step {max([saved, *reported])} was saved, and the last checkpoint is of step {last}")
    return last


def digest(folder: Path) -> str:
    """Return the digest of a completed run."""
    events = RunDirectory(folder / "directory").read_events()
    return next(str(event["digest"]) for event in reversed(events) if event["event"] == "ended")


def alone(folder: Path, number: int, chance: random.Random) -> tuple[Run, int]:
    """Run one command; return it and how often its launcher was killed or sent SIGTERM. The last has no faults."""
    last, workers = number == COMMANDS - 1, chance.randint(1, 4)
    run = Run(folder / str(number), command(folder, workers, chance), "" if last else faults(workers, chance))
    disturbed = not last and chance.random() < 0.2
    return run.wait(120) if not disturbed else disturb(run, run.process, chance.uniform(1, 12), chance), int(disturbed)


def together(folder: Path, number: int, chance: random.Random) -> tuple[Run, int]:
    """Run two launchers on this machine, as on two hosts, and disturb one of them; return the run and 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    workers = chance.randint(1, 2)
    alike = command(folder, workers, chance)
    first = [*alike, "--hosts", "1:2", "--rendezvous", endpoint]
    run = Run(folder / str(number), first, faults(2 * workers, chance) if chance.random() < 0.5 else "")
    options = alike[len(MANYHANDS) + 1 :]
    for of_first_host in ("--snapshot-every", "--max-restarts"):
        place = options.index(of_first_host)
        del options[place : place + 2]
    joined = run.start([*MANYHANDS, "join", endpoint, *options])
    disturb(run, chance.choice([run.process, joined]), chance.uniform(1, 25), chance)
    if joined.wait() not in JOINED_ENDS:
        raise Failed(f"the joining launcher ended with {joined.returncode}:\n{run.output}")
    return run, 1


def disturb(run: Run, launcher: subprocess.Popen[bytes], seconds: float, chance: random.Random) -> Run:
    """Kill a launcher of the run, or send it SIGTERM, after `seconds`; then wait for the run's end."""
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(seconds)
    launcher.send_signal(number)  # no effect if it has ended
    return run.wait(120)


def trained(folder: Path, seed: int) -> tuple[str, int]:
    """Run commands until the run is complete; return its digest and the number of faults."""
    chance, saved, count = random.Random(seed), 0, 0
    for number in range(COMMANDS):
        hosts = number < COMMANDS - 1 and chance.random() < 1 / 6
        run, disturbed = (together if hosts else alone)(folder, number, chance)
        count += disturbed + len(list(run.folder.glob("fault-time-*")))
        saved = check(folder, run, saved)
        if run.process.returncode == -signal.SIGTERM and (run.folder / "fault-time").exists():
            raise Failed("the launcher did not handle SIGTERM while workers were running")
        if run.process.returncode == 0:
            return digest(folder), count
        if "InvariantError" in run.output or run.process.returncode not in ENDS:
            raise Failed(f"ended with {run.process.returncode}:\n{run.output}")
    raise Failed(f"the run is not complete after {COMMANDS} commands")


def undisturbed(scratch: Path) -> str:
    """Return the digest of an undisturbed run."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    folder = scratch / "undisturbed"
    Run(folder / "0", command(folder, 1, random.Random(0)), "").wait(120)
    return digest(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the others use the following ones")
    options = parser.parse_args()
    console = Console(highlight=False)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    expected = undisturbed(scratch)
    total, bad = 0, []
    for seed in range(options.seed, options.seed + options.runs):
        folder, started = scratch / str(seed), time.monotonic()
        try:
            digest, count = trained(folder, seed)
            if digest != expected:
                raise Failed(f"its digest is {digest}, not {expected}")
        except (Failed, ManyhandsError, pytest.fail.Exception) as error:
            bad.append(seed)
            console.print(f"[red]seed {seed} failed[/]: {error}\n  see {folder}", markup=True)
            continue
        total += count
        console.print(f"seed {seed}: {count} faults, {time.monotonic() - started:.0f} s, {total} so far")
        shutil.rmtree(folder)
    console.print(f"{total} faults; {len(bad)} of {options.runs} runs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
