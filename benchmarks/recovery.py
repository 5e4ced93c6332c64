"""What killed workers cost: our run, and torchrun's with DDP and torch.save, under the same kills.

    .venv/bin/python benchmarks/recovery.py [--steps 60] [--kills 3] [--every 20] [--rounds 1]

Both train the same GPT with two workers and write a checkpoint every so many steps. When a run has come to a chosen
step, one of its workers is killed (SIGKILL), once for each of the chosen steps. Told are the time to finish undisturbed
and disturbed, the steps that were made again, and whether the weights are those of the undisturbed run. Use a machine
that does nothing else. What makes no step for three minutes is given up (nan), and what it said is in
runs/recovery-KIND.log.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WORKER = HERE / "recovery_worker.py"
KINDS = {
    "manyhands": "Manyhands, zero2",
    "manyhands-checkpoints": "the same without snapshots",
    "ddp": "DDP, torch.save",
}
NO_CHANGE_SECONDS = 180.0


def command_of(kind: str, folder: Path, steps: int, every: int) -> list[str]:
    """A whole launch of two workers."""
    script = [str(WORKER), kind, str(folder), str(steps), str(every)]
    if kind == "ddp":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "99"]
        return [sys.executable, *launcher, *script]
    return [sys.executable, "-m", "manyhands.cli.main", "run", "--workers", "2", "--max-restarts", "99", *script]


def steps_made(kind: str, folder: Path) -> tuple[int, int]:
    """The last step that was made, and how many were made again."""
    if kind == "ddp":
        path = folder / "steps"
        made = [int(line) for line in path.read_text().split()] if path.exists() else []
        return max(made, default=0), len(made) - len(set(made))
    metrics, events = folder / "run" / "metrics.jsonl", folder / "run" / "events.jsonl"
    made = metrics.read_text().count("\n") if metrics.exists() else 0
    told = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return made, sum(event.get("repeats", 0) for event in told)


def pid_of(folder: Path, rank: int) -> int | None:
    """The worker of that rank, if it's there."""
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
    """Train to the end. kills: (step, rank), rising: who is killed once that step is made for the first time."""
    with tempfile.TemporaryDirectory(prefix="manyhands-recovery-") as name:
        folder, left, began = Path(name), list(kills), time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                command_of(kind, folder, steps, every), env=environment, stdout=output, stderr=output
            )
            changed, known = began, 0
            while process.poll() is None:
                made, _ = steps_made(kind, folder)
                if made != known:
                    changed, known = time.monotonic(), made
                if left and made >= left[0][0]:
                    pid = pid_of(folder, left[0][1])
                    if pid is not None:
                        left.pop(0)
                        os.kill(pid, signal.SIGKILL)
                if time.monotonic() - changed > NO_CHANGE_SECONDS:
                    for rank in range(2):  # workers first: a launcher that is killed leaves them
                        pid = pid_of(folder, rank)
                        if pid is not None:
                            os.kill(pid, signal.SIGKILL)
                    process.kill()
                    process.wait()
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
    """Spread over the run, but not at round numbers."""
    chance = random.Random(seed)
    parts = [chance.uniform(0.35, 0.95) + number for number in range(count)]
    return [(int(part * steps / count), chance.randrange(2)) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=1, help="each with other kills")
    options = parser.parse_args()
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
    table = Table(title=f"{options.steps} steps, {options.kills} kills, a checkpoint every {options.every} steps")
    for heading in ("", "undisturbed s", "with kills s", "s a kill", "steps made again", "same weights"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, pairs in results.items():
        before = statistics.median(one["seconds"] for one, _ in pairs)
        after = statistics.median(two["seconds"] for _, two in pairs)
        cost = statistics.median((two["seconds"] - one["seconds"]) / options.kills for one, two in pairs)
        again = statistics.median(two["repeated"] for _, two in pairs)
        same = all(one["digest"] == two["digest"] is not None for one, two in pairs)
        table.add_row(
            KINDS[kind], f"{before:.1f}", f"{after:.1f}", f"{cost:.1f}", f"{again:g}", "yes" if same else "no"
        )
    console.print(table)


if __name__ == "__main__":
    main()
