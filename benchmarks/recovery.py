"""The cost of killed workers: our run compared with torchrun, DDP and torch.save, under the same kills.

    .venv/bin/python benchmarks/recovery.py [--steps 60] [--kills 3] [--every 20] [--rounds 1]

Both train the same GPT with two workers and write a checkpoint every 20 steps. When a run reaches a chosen step,
one of its workers is killed (SIGKILL), once for each of the chosen steps. The table shows the time to finish
undisturbed and with kills, the steps that were repeated, and whether the weights equal those of the undisturbed run.
Use a machine that does nothing else. A run that makes no step for a minute is stopped; its output is in
runs/recovery-KIND.log.

torchrun is measured twice. By default it keeps one store for all starts of the workers, with the addresses of killed
workers (https://github.com/pytorch/pytorch/issues/135712): a worker that starts first may find the old address of its
peer, and then the start fails or never ends. So the main peer has the setting that gives each start its own store.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import contenders

HERE = Path(__file__).resolve().parent
WORKER = HERE / "recovery_worker.py"
KINDS = {
    "manyhands": "Manyhands, zero2",
    "manyhands-checkpoints": "the same without snapshots",
    "ddp": "DDP, torch.save",
    "ddp-one-store": "the same, torchrun's defaults",
}
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a variable of torchrun, see the module's docstring
NO_CHANGE_SECONDS = 60.0


def command_of(kind: str, folder: Path, steps: int, every: int) -> list[str]:
    """The command that launches two workers."""
    script = [str(WORKER), kind, str(folder), str(steps), str(every)]
    if kind.startswith("ddp"):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "99"]
        return [sys.executable, *launcher, *script]
    return [sys.executable, "-m", "manyhands.cli.main", "run", "--workers", "2", "--max-restarts", "99", *script]


def steps_made(kind: str, folder: Path) -> tuple[int, int]:
    """The last completed step, and the number of repeated steps."""
    if kind.startswith("ddp"):
        path = folder / "steps"
        made = [int(line) for line in path.read_text().split()] if path.exists() else []
        return max(made, default=0), len(made) - len(set(made))
    metrics, events = folder / "run" / "metrics.jsonl", folder / "run" / "events.jsonl"
    made = metrics.read_text().count("\n") if metrics.exists() else 0
    recorded = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return made, sum(event.get("repeats", 0) for event in recorded)


def pid_of(folder: Path, rank: int) -> int | None:
    """The pid of the worker of that rank; None if it is not running."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            is_worker = str(WORKER).encode() in words and str(folder).encode() in words and b"-m" not in words
            if is_worker and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue  # it has ended
    return None


def run(kind: str, steps: int, every: int, kills: list[tuple[int, int]]) -> dict[str, Any]:
    """Train to the end. kills: (step, rank) in ascending order: the worker to kill when the step is first complete."""
    with tempfile.TemporaryDirectory(prefix="manyhands-recovery-") as name:
        folder, left, began = Path(name), list(kills), time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment |= OWN_STORE if kind == "ddp" else {}
        command = command_of(kind, folder, steps, every)
        with (
            (folder / "output").open("wb") as output,
            contenders.running(command, env=environment, stdout=output, stderr=output) as process,
        ):
            changed, known = began, (0, 0)
            while process.poll() is None:
                made = steps_made(kind, folder)
                if made != known:
                    changed, known = time.monotonic(), made
                if left and made[0] >= left[0][0]:
                    pid = pid_of(folder, left[0][1])
                    if pid is not None:
                        left.pop(0)
                        os.kill(pid, signal.SIGKILL)
                if time.monotonic() - changed > NO_CHANGE_SECONDS:
                    contenders.end(process)
                time.sleep(0.02)
        if process.returncode or left:
            (HERE.parent / "runs").mkdir(exist_ok=True)
            (HERE.parent / "runs" / f"recovery-{kind}.log").write_bytes((folder / "output").read_bytes())
            return {"seconds": float("nan"), "repeated": float("nan"), "digest": None}
        return {
            "seconds": time.monotonic() - began,
            "repeated": steps_made(kind, folder)[1],
            "digest": json.loads((folder / "digest.json").read_text()),
        }


def chosen(steps: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Choose steps and ranks for the kills: spread over the run, but not at round numbers."""
    chance = random.Random(seed)
    parts = [chance.uniform(0.35, 0.95) + number for number in range(count)]
    return [(int(part * steps / count), chance.randrange(2)) for part in parts]


def median(values: Iterable[float], digits: int = 1) -> str:
    """The median of the runs that ended."""
    ended = [value for value in values if not math.isnan(value)]
    return f"{statistics.median(ended):.{digits}f}" if ended else "-"


def show(console: Console, results: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]], kills: int) -> None:
    """Print the table. results: by kind, an undisturbed run and one with kills for each round."""
    table = Table()
    headings = ("", "undisturbed s", "with kills s", "s per kill", "steps repeated", "ended", "same weights")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for kind, pairs in results.items():
        ended = [pair for pair in pairs if pair[1]["digest"] is not None]
        same = all(one["digest"] == two["digest"] for one, two in ended)
        table.add_row(
            KINDS[kind],
            median(one["seconds"] for one, _ in pairs),
            median(two["seconds"] for _, two in pairs),
            median((two["seconds"] - one["seconds"]) / kills for one, two in pairs),
            median((two["repeated"] for _, two in pairs), 0),
            f"{len(ended)} of {len(pairs)}",
            ("yes" if same else "no") if ended else "-",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=1, help="each with different kills")
    options = parser.parse_args()
    contenders.stop_on_signals()
    console = Console(width=120, highlight=False)
    results: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        kills = chosen(options.steps, options.kills, number)
        console.print(f"round {number + 1}: worker {', '.join(f'{rank} after step {step}' for step, rank in kills)}")
        for kind in KINDS:
            undisturbed = run(kind, options.steps, options.every, [])
            disturbed = run(kind, options.steps, options.every, kills)
            results[kind].append((undisturbed, disturbed))
            console.print(f"{kind}: {undisturbed['seconds']:.1f} s, with kills {disturbed['seconds']:.1f} s")
    console.print(f"{options.steps} steps, {options.kills} kills, a checkpoint every {options.every} steps:")
    show(console, results, options.kills)


if __name__ == "__main__":
    main()
