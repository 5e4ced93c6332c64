"""What islands cost in loss, compared with a synchronous run of the same tokens: docs/islands-loss.md.

    .venv/bin/python benchmarks/islands_loss.py [--steps 600] [--seeds 0 1 2] [--only "warm H=30"] [--again]

Trains the GPT of examples/gpt (0.97 M parameters) on the bytes of Python's standard library, with each setting and seed
in a process of its own, and validates the final weights on files that no run trains on. All settings of a seed have the
same initial weights and, except for one island alone, the same tokens. Appends each result to runs/islands-loss.jsonl
and skips those that are there, so a run that was interrupted continues. At the end prints a table, and writes it to
docs/islands-loss.md, with a picture next to it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import contenders
import manyhands as mh
from islands_loss_report import print_report, write_report
from manyhands.numerics.arithmetic import numerics_identity

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "runs" / "islands-loss.jsonl"
ISLANDS, BATCH, LENGTH = 4, 2, 128
HELD_OUT_WINDOWS, CURVE_WINDOWS = 512, 64


@dataclass(frozen=True)
class Case:
    """One setting. islands: options of `mh.Islands` beside `count`; None: one model. batch: samples in a step."""

    name: str
    islands: Mapping[str, Any] | None = None
    batch: int = BATCH


def cases(steps: int) -> list[Case]:
    """All settings, in the order of the table."""
    half = steps // 2
    warm = {"warm_steps": half, "momentum_from": half}
    return [
        Case("synchronous", batch=ISLANDS * BATCH),
        Case("one island alone"),
        Case("cold default", {}),
        Case("cold momentum", {"momentum_from": half}),
        Case("warm H=30", warm),
        Case("warm H=10", {**warm, "every": 10}),
        Case("warm H=30 32 bits", {**warm, "bits": 32}),
        Case("warm H=30 2 bits", {**warm, "bits": 2}),
        Case("warm H=30 delay 5", {**warm, "delay": 5}),
        Case("warm H=30 averaging", {"warm_steps": half, "every": 30}),
        Case("warm H=10 averaging", {"warm_steps": half, "every": 10}),
    ]


def example(name: str) -> ModuleType:
    """Import a module of examples/gpt, one of which is named like a module of the benchmarks."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", HERE.parent / "examples" / "gpt" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"examples/gpt/{name}.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Windows(Dataset[Tensor]):
    """Windows of LENGTH + 1 bytes of a text, int64. The first bytes of two windows are `stride` bytes apart."""

    def __init__(self, text: bytes, count: int | None = None) -> None:
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._stride = LENGTH if count is None else (len(text) - LENGTH - 1) // count
        self._count = (len(text) - 1) // LENGTH if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return self._bytes[index * self._stride : index * self._stride + LENGTH + 1].long()


def texts() -> tuple[bytes, bytes]:
    """Return the text to train on and the held-out text. The hash of a file's content decides to which it belongs."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for content in {file.read_bytes(): None for file in example("text").library_files()}:
        parts[hashlib.sha256(content).digest()[0] < 16].append(content)
    return b"".join(parts[False]), b"".join(parts[True])


def setup_of(steps: int, lr: float, train: bytes, held_out: bytes) -> dict[str, Any]:
    """Return what all settings share. Results with another setup are not compared."""
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(held_out).digest()).hexdigest()[:16]
    return {
        "steps": steps,
        "lr": lr,
        "islands": ISLANDS,
        "batch": BATCH,
        "length": LENGTH,
        "text": digest,
        "train_bytes": len(train),
        "held_out_bytes": len(held_out),
    }


def machine() -> dict[str, str]:
    """Return what decides the bits on this machine, and the name of its CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = torch.device("cpu")
    return {"cpu": names[0] if names else "unknown", "cores": str(os.cpu_count()), **numerics_identity(cpu, 1, cpu)}


class Rounds(mh.Listener):
    """Collects the validations of a run, and the events of its rounds."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.rounds: list[dict[str, Any]] = []

    def evaluated(self, evaluation: mh.Evaluation) -> None:
        if evaluation.set == "curve" and evaluation.loss is not None:
            self.curve.append((evaluation.step, evaluation.loss))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        if name == "round":
            self.rounds.append(dict(facts))


def trained(case: Case, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """Train with one setting. Return the row of the results."""
    train, held_out = texts()
    gpt, heard, curve_every = example("gpt"), Rounds(), max(1, steps // 20)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    recipe = mh.Recipe(
        model=gpt.GPT,
        loss=gpt.loss,
        optimizer=optimizer,
        schedule=lambda of: gpt.warmup_cosine(of, max(1, steps // 20), steps),
        data=Windows(train),
        batch=mh.Batch(global_size=case.batch, micro_size=BATCH),
        islands=None if case.islands is None else mh.Islands(count=ISLANDS, **case.islands),
        validation={
            "curve": mh.Validation(data=Windows(held_out, CURVE_WINDOWS), every=f"{curve_every} steps", batch=32),
            "held_out": mh.Validation(data=Windows(held_out, HELD_OUT_WINDOWS), every=f"{steps} steps", batch=32),
        },
        clip_norm=1.0,
        seed=seed,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="manyhands-") as folder:
        summary = mh.train(recipe, steps=steps, run_dir=folder, show=False, listeners=[heard])
    return {
        "case": case.name,
        "seed": seed,
        "setup": setup_of(steps, lr, train, held_out),
        "machine": machine(),
        "parameters": summary.parameters,
        "loss": summary.validations["held_out"]["loss"],
        "digest": summary.digest,
        "curve": heard.curve,
        "agreement": [round(each["agreement"], 4) for each in heard.rounds],
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def run_all(todo: Sequence[tuple[str, int]], options: argparse.Namespace) -> None:
    """Run settings and seeds, `options.jobs` at a time, each in a process of its own. Append their rows to RESULTS."""
    waiting, running = list(todo), dict[tuple[str, int], subprocess.Popen[str]]()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    common = [sys.executable, __file__, "--steps", str(options.steps), "--lr", str(options.lr)]
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name, seed = waiting.pop(0)
                command = [*common, "--seeds", str(seed), "--here", name]
                running[name, seed] = contenders.start(command, env=environment, stdout=subprocess.PIPE)
            for (name, seed), process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name, seed]
                out = process.communicate()[0]
                if process.returncode:
                    raise SystemExit(f"{name}, seed {seed}, failed with exit code {process.returncode}")
                row = json.loads(out.splitlines()[-1])
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, seed {seed}: {row['loss']:.4f} in {row['wall_seconds']:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        for process in running.values():
            contenders.end(process)


def results(setup: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows of this setup, by setting and seed. The last row counts; a torn one does not."""
    found = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["setup"] == setup:
            found[row["case"], row["seed"]] = row
    return found


def main() -> None:
    """Run what is missing, print the table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=4e-3, help="the best of a synchronous run: see the page")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--only", default="", help="run only settings whose names contain this")
    parser.add_argument("--again", action="store_true", help="also repeat runs whose results are there")
    parser.add_argument("--no-report", action="store_true", help="leave docs/islands-loss.md as it is")
    parser.add_argument("--here", help="train with this setting in this process, and print its row")
    options = parser.parse_args()
    settings = {case.name: case for case in cases(options.steps)}
    if options.here:
        print(json.dumps(trained(settings[options.here], options.seeds[0], options.steps, options.lr)))
        return
    contenders.stop_on_signals()
    RESULTS.parent.mkdir(exist_ok=True)
    setup = setup_of(options.steps, options.lr, *texts())
    known = {} if options.again else results(setup)
    wanted = [(name, seed) for seed in options.seeds for name in settings if options.only in name]
    run_all([each for each in wanted if each not in known], options)
    rows = [row for (name, seed), row in results(setup).items() if name in settings and seed in options.seeds]
    print_report(rows, list(settings))
    if not options.no_report:
        write_report(rows, list(settings))


if __name__ == "__main__":
    main()
