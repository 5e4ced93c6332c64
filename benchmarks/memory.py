"""Measured memory against the formula, for every stage, home and precision: docs/memory.md.

    .venv/bin/python benchmarks/memory.py [--depth 20] [--workers 1 2 4]

Trains a GPT for three steps and compares what a worker holds between two of them (proportional set size) with what the
formula says, beyond the same process before it made its engine. Writes runs/memory.json, and runs/memory.png where
matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "runs"
MIB = 2**20
STAGES, PRECISIONS = ("ddp", "zero1", "zero2", "zero3"), ("fp32", "bf16")


def formula(stage: str, home: str, precision: str, workers: int, group: str) -> float:
    """Bytes a parameter between two steps, with AdamW and one round of micro-batches, without clipping."""
    itemsize = 2 if precision == "bf16" else 4
    shared = group == "shared-memory"
    state = 8 + (4 if precision == "bf16" or (stage == "ddp" and shared) else 0)  # in fp32 parameters are the masters
    whole = stage != "zero3"
    params = itemsize / workers if shared or not whole else itemsize
    gathers = stage == "zero3" and (home == "disk" or not shared)
    grads = 0.0 if stage == "zero3" or (stage == "zero2" and not shared) else itemsize
    sums = 4 / workers if stage == "ddp" and shared else 4 if stage == "ddp" else 0.0
    optim = state if stage == "ddp" else state / workers
    if home == "disk":
        optim, params = 0.0, 0.0 if gathers else params
    in_flight = (
        4 / workers if stage == "zero3" and home != "disk" else 0.0
    )  # the sums' scratch is kept for the next step
    return params + grads + optim + sums + in_flight


WORKER = """
import json, os, sys
sys.path.insert(0, {here!r})
import torch
import manyhands as mh
from gpt import GPT
from measure import RandomTokens, pss_mib
stage, home, precision, group, scratch, depth = {options!r}
workers = int(os.environ.get("WORLD_SIZE", "1"))
def recipe_of(*shape):
    return mh.Recipe(
        model=lambda: GPT(32, *shape),
        loss=lambda model, batch: model(batch),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
        data=RandomTokens(64, 32),
        batch=mh.Batch(global_size=workers, micro_size=1),
        precision=precision,
    )
strategy = mh.Strategy(stage=stage, home=home, group=group, scratch=scratch)
with mh.Engine(recipe_of(64, 1, 1), strategy) as engine:  # what torch takes for itself
    for batch in engine.batches(2):
        engine.step(batch)
before = pss_mib()
with mh.Engine(recipe_of(768, depth, 12), strategy) as engine:
    for batch in engine.batches(3):
        engine.step(batch)
    numel = sum(param.numel() for param in engine.model.parameters())
    largest = max(unit.layout.padded_numel for unit in engine.units)
    engine.group.barrier("memory / control")
    after = pss_mib()
    engine.group.barrier("memory / control")
    if engine.group.rank == 0:
        print(json.dumps(dict(mib=after - before, numel=numel, largest=largest, digest=engine.digest())), flush=True)
    else:
        engine.digest()
"""


def measure(stage: str, home: str, precision: str, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """One run of whole new processes."""
    with tempfile.TemporaryDirectory(dir=options.scratch or None) as scratch:
        given = (stage, home, precision, options.group, scratch, options.depth)
        script = Path(scratch) / "worker.py"
        script.write_text(WORKER.format(here=str(HERE), options=given))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"mib"')]
    if not lines:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, help="blocks of the GPT, 7.1 M parameters each")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--homes", nargs="+", default=["device", "disk"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--group", default="auto")
    parser.add_argument("--scratch", default="")
    options = parser.parse_args()
    console, rows = Console(width=110), []
    table = Table("stage", "home", "precision", "workers", "formula MiB", "measured MiB", "ratio", "digest")
    for workers, precision, stage, home in product(options.workers, options.precisions, options.stages, options.homes):
        found = measure(stage, home, precision, workers, options)
        group = options.group if options.group != "auto" else "shared-memory"
        expected = formula(stage, home, precision, workers, group) * found["numel"] / MIB
        units = 0.0
        if stage == "zero3":  # the ring of gradients, and what is whole or was
            itemsize = 2 if precision == "bf16" else 4
            units = (3 + (4 if home == "disk" else 0)) * found["largest"] * itemsize / MIB
        row = {"stage": stage, "home": home, "precision": precision, "workers": workers, **found}
        rows.append({**row, "formula_mib": expected + units})
        ratio = found["mib"] / (expected + units)
        words = (
            stage,
            home,
            precision,
            str(workers),
            f"{expected + units:,.0f}",
            f"{found['mib']:,.0f}",
            f"{ratio:.2f}",
        )
        table.add_row(*words, str(found["digest"])[:12])
        console.print(" ".join(words), highlight=False)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
