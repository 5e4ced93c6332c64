"""The cost of a checkpoint: how long a step waits for it, when it is published, and how long a load takes.

    .venv/bin/python benchmarks/checkpoint.py [--rounds 3] [--depth 8] [--folder DIR]

The state of a GPT with 69.4 M parameters and AdamW, 12 bytes per parameter, on 2 workers. Manyhands computes checksums,
and a digest at the save and again at the load, and its checkpoint is synced when it is published. Contenders run in
turn, round by round; the table shows medians. All figures go to runs/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import contenders

HERE = Path(__file__).resolve().parent
KINDS = ("manyhands-zero2", "manyhands-ddp", "torch.save", "dcp", "dcp-async")
FIGURES = ("stall", "published", "load")
WORKERS = 2


def measure(kind: str, folder: str, depth: int) -> list[dict[str, float]]:
    """Run one contender once. Return the seconds of each save; empty if it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)),
        *(str(HERE / "checkpoint_worker.py"), kind, folder, "--depth", str(depth)),
    ]
    done = contenders.run(command, environment, 900)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    if not lines:
        sys.stderr.write(done.stderr[-2000:])
    return json.loads(lines[-1])["times"] if lines else []


def described(times: list[dict[str, float]], ours: list[dict[str, float]], figure: str) -> str:
    """The median, and its ratio to that of Manyhands."""
    if not times:
        return "failed"
    seconds = statistics.median(time[figure] for time in times)
    ratio = f"  {seconds / statistics.median(time[figure] for time in ours):5.2f}" if ours else ""
    return f"{seconds:6.2f}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=8, help="blocks of the GPT, 7.1 M parameters each")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    contenders.stop_on_signals()
    console = Console(width=max(100, Console().width))
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                results[kind] += measure(kind, folder, options.depth)
            console.print(f"round {number + 1} of {options.rounds}  {kind}", highlight=False)
    table = Table(
        "median seconds; ratio to the first row",
        *FIGURES,
        title=f"A checkpoint by {WORKERS} workers, {options.rounds} rounds",
    )
    for kind, times in results.items():
        table.add_row(kind, *(described(times, results[KINDS[0]], figure) for figure in FIGURES))
    console.print(table)
    (HERE.parent / "runs").mkdir(exist_ok=True)
    (HERE.parent / "runs" / "checkpoint.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
