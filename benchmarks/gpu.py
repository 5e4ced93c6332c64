"""One GPU: a step compared with plain PyTorch's and DeepSpeed ZeRO-Offload's, and the largest models that train.

    .venv-bench/bin/python benchmarks/gpu.py [--depth 25] [--rounds 3] [--largest]

A GPT in bf16 with fp32 master weights and AdamW. With width 2,048 and 25 blocks it has 1.3 billion parameters. Every
contender runs once per round in its own process. Ratios are computed inside a round, and their median is shown. busy:
the part of a step in which the GPU computes or copies. --largest: doubles the depth until a model no longer trains.
With `--device cpu --width 64 --depth 2` everything runs on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import contenders

HERE = Path(__file__).resolve().parent
PLAIN, NONE, CPU = "plain", "manyhands-ddp-none", "manyhands-ddp-cpu"
KINDS = (PLAIN, "plain-any-kernels", NONE, CPU, "manyhands-zero3-cpu", "deepspeed-offload")
LARGEST = (PLAIN, CPU, "manyhands-zero3-cpu")
SHAPE = ("device", "width", "depth", "length", "batch", "steps")
Record = dict[str, Any]


def measure(kind: str, options: argparse.Namespace, **changes: int) -> Record:
    """Run one contender once. Return its JSON line, or {"error": reason}."""
    values = {name: getattr(options, name) for name in SHAPE} | changes
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, str(HERE / "gpu_worker.py"), kind, "--threads", str(options.threads), *words]
    try:
        done = contenders.run(command, environment, options.seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {options.seconds} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:] or f"exit status {done.returncode}"}


def shown(records: list[Record], figure: str, beside: list[Record] | None = None) -> str:
    """The median of a figure over the rounds, or of the ratio of `beside`'s figure to it in the same round."""
    if beside is None:
        values = [record[figure] for record in records if figure in record]
    else:
        values = [
            other[figure] / one[figure]
            for one, other in zip(records, beside, strict=True)
            if figure in one and figure in other
        ]
    return f"{statistics.median(values):,.2f}" if values else "-"


def speeds(options: argparse.Namespace, console: Console) -> dict[str, list[Record]]:
    """Measure all contenders, round by round."""
    kinds = [kind for kind in KINDS if kind != "deepspeed-offload" or importlib.util.find_spec("deepspeed")]
    results: dict[str, list[Record]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind in kinds:
            record = measure(kind, options)
            results[kind].append(record)
            outcome = f"{record['step_ms']:,.1f} ms" if "step_ms" in record else f"failed\n{record['error']}"
            console.print(f"round {number + 1} of {options.rounds}  {kind}: {outcome}", highlight=False, markup=False)
    offload = results.get("deepspeed-offload", [{}] * options.rounds)
    columns = ("", "step ms", "speed vs. plain", "speed vs. ZeRO-Offload", "busy", "peak GPU MiB", "digest")
    table = Table(*columns, title=f"One step, {options.batch} x {options.length} tokens, bf16")
    for kind, records in results.items():
        table.add_row(
            kind,
            shown(records, "step_ms"),
            shown(records, "step_ms", results[PLAIN]),
            shown(records, "step_ms", offload),
            shown(records, "busy"),
            shown(records, "peak_mib"),
            str(records[-1].get("digest", ""))[:12],
        )
    console.print(table)
    return results


def largest(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    """The largest model with which each contender completes two steps, found by doubling and bisecting the depth."""
    found = {}
    for kind in LARGEST:
        trained, failed = 0, 0
        best: Record = {}
        while failed == 0 or failed - trained > max(1, trained // 8):
            depth = (trained + failed) // 2 if failed else max(1, 2 * trained) if trained else options.depth
            record = measure(kind, options, depth=depth, steps=2)
            console.print(f"{kind}, {depth} blocks: {'failed' if 'error' in record else 'trained'}", highlight=False)
            if "error" in record:
                failed = depth
            else:
                trained, best = depth, record
            if depth >= options.most:
                break
        found[kind] = best
    table = Table("", "parameters", "step ms", "peak GPU MiB", title="The largest model that trains")
    for kind, record in found.items():
        millions = f"{record['parameters'] / 1e6:,.0f} M" if record else "none"
        table.add_row(kind, millions, shown([record], "step_ms"), shown([record], "peak_mib"))
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=25)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--seconds", type=int, default=900, help="how long a contender may take")
    parser.add_argument("--largest", action="store_true", help="look for the largest model, too")
    parser.add_argument("--most", type=int, default=4096, help="blocks of the largest model to try")
    options = parser.parse_args()
    contenders.stop_on_signals()
    console = Console(width=max(120, Console().width))
    results: Record = {"speeds": speeds(options, console)}
    if options.largest:
        results["largest"] = largest(options, console)
    folder = HERE.parent / "runs"
    folder.mkdir(exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
