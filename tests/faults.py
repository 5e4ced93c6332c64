"""Many random faults over many short runs: each run must end in the digest that it would have had undisturbed.

    .venv/bin/python tests/faults.py [--runs 40] [--seed 0] [--only SEED]

A run is one directory that commands train in, one after the other, until it's done: each with another number of
workers, sharding and group, and with a few faults. A worker raises, is killed, stopped, asked to stop or sleeps, as it
starts, computes, exchanges, updates or writes a checkpoint; or the launcher is killed. Some commands are two launchers,
as on two hosts, of which one is killed or asked to stop at any moment. After each command no process of it may be left,
nor a file; what was said to be saved may not be lost. A run's seed replays it.
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
PLACES = ("start", "forward", "exchange", "update", "checkpoint", "snapshot")
SHARDINGS, GROUPS = ("ddp", "zero1", "zero2", "zero3"), ("shared-memory", "distributed")
ENDS = (1, 130, -signal.SIGKILL, -signal.SIGTERM)  # the last: asked to stop before Python was ready to hear it
JOINED_ENDS = (*ENDS, 0, 2)  # of who joins: 2, if there is nothing to join (any more)
COMMANDS = 12  # for a run: more means that it doesn't come to an end


class Failed(Exception):
    """A run that broke the promise."""


def command(folder: Path, workers: int, chance: random.Random) -> list[str]:
    """Train on, in some way."""
    sharding, group = chance.choice(SHARDINGS), chance.choice(GROUPS)
    options = ["--workers", str(workers), "--sharding", sharding, "--transport", group, "--checkpoint-every", "1"]
    options += ["--snapshot-every", chance.choice(["1", "1", "auto", "never"])]
    where = ["--run-dir", str(folder / "directory"), "--steps", str(STEPS), "--max-restarts", "2"]
    return [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *options, *where]


def faults(workers: int, chance: random.Random) -> str:
    """For one command, which starts its workers up to three times; each fault happens once."""
    found = []
    for _ in range(chance.randint(2, 4)):
        place = chance.choice(PLACES)
        kind = chance.choice(KINDS)
        if place == "start":  # what a recipe raises as it's imported is for a person to mend; it may sleep there, too
            kind = chance.choice(["kill", "terminate", "stop"])
        if place in ("checkpoint", "snapshot") and workers == 1 and kind == "stall":
            kind = "stop"  # between two steps a worker without peers may take its time
        count = 0 if place == "start" else chance.randint(1, 2 * MICRO_BATCHES // workers)
        found.append(f"{kind}-once {place} {count} {chance.randrange(workers)}")
    return ";".join(found)


def check(folder: Path, run: Run, saved: int) -> int:
    """After a command: what it may not have left, and may not have lost. How many steps are saved."""
    if run.left_behind():
        raise Failed(f"left behind: {run.left_behind()}")
    found = [step for step, _ in list_checkpoints(folder / "directory" / "checkpoints")]
    told = [event["step"] for event in RunDirectory(folder / "directory").read_events() if event["event"] == "saved"]
    last = max(found, default=0)
    if last < max([saved, *told]):
        raise Failed(f"step {max([saved, *told])} was saved, and the last checkpoint is of step {last}")
    return last


def digest(folder: Path) -> str:
    """Of a run that has come to its end."""
    told = RunDirectory(folder / "directory").read_events()
    return next(str(event["digest"]) for event in reversed(told) if event["event"] == "ended")


def alone(folder: Path, number: int, chance: random.Random) -> tuple[Run, int]:
    """One command, and how often its launcher was killed or asked to stop: the last one never, nor its workers."""
    last, workers = number == COMMANDS - 1, chance.randint(1, 4)
    run = Run(folder / str(number), command(folder, workers, chance), "" if last else faults(workers, chance))
    disturbed = not last and chance.random() < 0.2
    return run.wait(120) if not disturbed else disturb(run, run.process, chance.uniform(1, 12), chance), int(disturbed)


def together(folder: Path, number: int, chance: random.Random) -> tuple[Run, int]:
    """Two launchers on this machine, each as on a host of its own; either may be lost."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    workers = chance.randint(1, 2)
    first = [*command(folder, workers, chance), "--hosts", "1:2", "--rendezvous", endpoint]
    run = Run(folder / str(number), first, faults(2 * workers, chance) if chance.random() < 0.5 else "")
    joined = run.start([*MANYHANDS, "join", endpoint, "--workers", str(workers)])
    disturb(run, chance.choice([run.process, joined]), chance.uniform(1, 25), chance)
    if joined.wait() not in JOINED_ENDS:
        raise Failed(f"who joined ended with {joined.returncode}:\n{run.output}")
    return run, 1


def disturb(run: Run, launcher: subprocess.Popen[bytes], seconds: float, chance: random.Random) -> Run:
    """Kill that launcher of the run after so many seconds, or ask it to stop; then await the run's end."""
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(seconds)
    launcher.send_signal(number)  # does nothing if it has ended
    return run.wait(120)


def trained(folder: Path, seed: int) -> tuple[str, int]:
    """Train to the end, whatever happens; the digest, and how many faults there were."""
    chance, saved, count = random.Random(seed), 0, 0
    for number in range(COMMANDS):
        hosts = number < COMMANDS - 1 and chance.random() < 1 / 6
        run, disturbed = (together if hosts else alone)(folder, number, chance)
        count += disturbed + len(list(run.folder.glob("fault-time-*")))
        saved = check(folder, run, saved)
        if run.process.returncode == -signal.SIGTERM and (run.folder / "fault-time").exists():
            raise Failed("the launcher didn't listen to SIGTERM while workers were there")
        if run.process.returncode == 0:
            return digest(folder), count
        if "InvariantError" in run.output or run.process.returncode not in ENDS:
            raise Failed(f"ended with {run.process.returncode}:\n{run.output}")
    raise Failed("it didn't come to an end")


def undisturbed(scratch: Path) -> str:
    """The digest of a run that nothing happens to."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    folder = scratch / "undisturbed"
    Run(folder / "0", command(folder, 1, random.Random(0)), "").wait(120)
    return digest(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others follow")
    options = parser.parse_args()
    console = Console(highlight=False)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    expected = undisturbed(scratch)
    total, bad = 0, []
    for seed in range(options.seed, options.seed + options.runs):
        folder, began = scratch / str(seed), time.monotonic()
        try:
            digest, count = trained(folder, seed)
            if digest != expected:
                raise Failed(f"its digest is {digest}, not {expected}")
        except (Failed, ManyhandsError, pytest.fail.Exception) as error:
            bad.append(seed)
            console.print(f"[red]seed {seed} failed[/]: {error}\n  see {folder}", markup=True)
            continue
        total += count
        console.print(f"seed {seed}: {count} faults, {time.monotonic() - began:.0f} s, {total} so far")
        shutil.rmtree(folder)
    console.print(f"{total} faults; {len(bad)} of {options.runs} runs failed: {bad}")
    if not bad:
        shutil.rmtree(scratch)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
