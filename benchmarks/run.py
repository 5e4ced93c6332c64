"""Measure Manyhands and its peers side by side in one run; print one table, and which targets are met.

    .venv-bench/bin/python benchmarks/run.py [--rounds 3] [--steps 8] [--only SETTING/KIND ...]

Machines are noisy, and their speed drifts. So every contender runs once per round, A B C A B C, each time in new
processes with one thread each. Ratios are computed inside a round, and their median over the rounds is shown. If the
speed drifts within minutes, use `--in-turns`: all contenders of a setting run at the same time (all must fit in memory
together) and take single steps in turn; a round is one step of each. Use a machine that does nothing else. Peers that
aren't installed are skipped, and their names are printed. All figures go to runs/bench/.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import contenders
from manyhands.numerics.arithmetic import bf16_instructions
from measure import Turns

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "runs" / "bench"
OURS = "manyhands-zero2"  # manyhands-SHARDING[-TRANSPORT]: ratios are relative to it
ZERO3, ZERO3_DISTRIBUTED = "manyhands-zero3", "manyhands-zero3-distributed"
SECONDS_ALLOWED = 600
ALL_PEERS = ("ddp", "ddp-bf16hook", "zero-redundancy", "fsdp2", "deepspeed-1", "deepspeed-2", "deepspeed-3")
# On a CPU without bf16 instructions most of a peer's step is their emulation. These show what is left without it.
OUR_PRODUCTS = "-our-products"
WITH_OUR_PRODUCTS = tuple(kind + OUR_PRODUCTS for kind in ("ddp", "fsdp2", "deepspeed-2", "deepspeed-3"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The number of workers, their batch and precision, and the contenders."""

    name: str
    workers: int
    batch: int
    precision: str
    kinds: tuple[str, ...]
    length: int = 128

    def __str__(self) -> str:
        workers = f"{self.workers} workers" if self.workers > 1 else "1 worker alone"
        return f"{self.name}: {workers}, {self.batch} x {self.length} tokens each, {self.precision}"


SETTINGS = (
    Setting(
        name="alone-bf16",
        workers=1,
        batch=4,
        precision="bf16",
        kinds=(OURS, "single", "single-bf16", "single" + OUR_PRODUCTS),
    ),
    Setting(
        name="2-bf16",
        workers=2,
        batch=4,
        precision="bf16",
        kinds=(
            OURS,
            "manyhands-ddp",
            ZERO3,
            "manyhands-zero2-distributed",
            ZERO3_DISTRIBUTED,
            *ALL_PEERS,
            *WITH_OUR_PRODUCTS,
        ),
    ),
    Setting(name="alone-fp32", workers=1, batch=4, precision="fp32", kinds=(OURS, "single")),
    Setting(
        name="2-fp32",
        workers=2,
        batch=4,
        precision="fp32",
        kinds=(OURS, ZERO3, ZERO3_DISTRIBUTED, *(kind for kind in ALL_PEERS if kind != "ddp-bf16hook")),
    ),
    Setting(
        name="4-bf16", workers=4, batch=1, precision="bf16", kinds=(OURS, "ddp", "fsdp2", "deepspeed-2", "deepspeed-3")
    ),
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on the ratio of a figure of `ours` to that of `peer`; for step times, of the peer's to ours."""

    what: str
    setting: str
    peer: tuple[str, str]  # its setting and kind
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    ours: str = OURS


def as_fast(setting: str, peer: str, at_least: float, ours: str = OURS) -> Target:
    """The peer's step must take at least `at_least` times as long as that of `ours`."""
    who = (setting, peer)
    return Target(
        what=f"times as fast as {peer}", setting=setting, peer=who, figure="step_ms", at_least=at_least, ours=ours
    )


TARGETS = (
    as_fast("2-bf16", "ddp", 1.3),
    as_fast("2-bf16", "fsdp2", 2.4),
    as_fast("2-bf16", "deepspeed-2", 2.2),
    as_fast("2-bf16", "fsdp2", 2.2, ZERO3),
    as_fast("2-bf16", "deepspeed-3", 2.2, ZERO3),
    as_fast("2-bf16", OURS, 0.95, ZERO3),
    as_fast("2-bf16", "fsdp2", 1.3, ZERO3_DISTRIBUTED),
    Target(
        what="of one plain PyTorch process's tokens/s, per worker",
        setting="2-bf16",
        peer=("alone-bf16", "single"),
        figure="tokens_per_second_per_worker",
        at_least=0.93,
    ),
    Target(what="of DDP's peak memory", setting="2-bf16", peer=("2-bf16", "ddp"), figure="peak_pss_mib", at_most=0.65),
    Target(what="of DDP's memory at rest", setting="2-bf16", peer=("2-bf16", "ddp"), figure="pss_mib", at_most=0.65),
    Target(
        what="of DeepSpeed ZeRO-2's peak memory",
        setting="2-bf16",
        peer=("2-bf16", "deepspeed-2"),
        figure="peak_pss_mib",
        at_most=1.0,
    ),
    as_fast("2-fp32", "ddp", 1.08),
    as_fast("4-bf16", "ddp", 1.8),
)

MOST_OVERHEAD = 0.02

Record = dict[str, Any]
Results = dict[tuple[str, str], list[Record]]  # (setting, kind): one record per round, {"error": ...} if it failed


def command_of(setting: Setting, kind: str, steps: int) -> list[str]:
    """The command of a contender: torch's launcher, with one process per worker."""
    sharding, _, group = kind.removeprefix("manyhands-").partition("-")
    ours = kind.startswith("manyhands-")
    script = ["ours.py", "--sharding", sharding, "--transport", group or "auto"] if ours else ["peers.py", kind]
    shape = {"--precision": setting.precision, "--batch": setting.batch, "--length": setting.length, "--steps": steps}
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.workers)),
        *(str(HERE / script[0]), *script[1:]),
        *(str(word) for option in shape.items() for word in option),
    ]


def start(setting: Setting, kind: str, steps: int, turns: str = "") -> subprocess.Popen[str]:
    """Start one contender. turns: see Turns."""
    environment = {
        **os.environ,
        Turns.VARIABLE: turns,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    # DeepSpeed compiles an extension at its first use, with the ninja next to this Python.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    pipe = subprocess.PIPE
    return contenders.start(command_of(setting, kind, steps), env=environment, stdout=pipe, stderr=pipe)


def end(process: subprocess.Popen[str], seconds: float = SECONDS_ALLOWED) -> Record:
    """Wait for a contender: its JSON line, or {"error": why}."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        contenders.end(process)
        process.communicate()
        return {"error": f"took longer than {seconds:g} seconds"}
    except BaseException:
        contenders.end(process)
        raise
    lines = [line for line in out.splitlines() if line.startswith('{"kind"')]
    if process.returncode or not lines:
        return {"error": err[-2000:] or f"exit status {process.returncode}, and no result"}
    return json.loads(lines[-1])


def measure_in_turns(setting: Setting, kinds: list[str], steps: int) -> dict[str, list[Record]]:
    """Run several contenders at once, a step of each in turn; a record for each step. If one fails, all are ended."""
    with tempfile.TemporaryDirectory() as folder:
        turn = Path(folder) / "turn"
        turn.write_text("0")
        processes = [start(setting, kind, steps, f"{turn} {number} {len(kinds)}") for number, kind in enumerate(kinds)]
        with ThreadPoolExecutor(
            len(kinds)
        ) as pool:  # a thread reads the output of each contender, so that no pipe fills up
            waits = [pool.submit(end, process, SECONDS_ALLOWED * len(kinds)) for process in processes]
            try:
                for done in as_completed(waits):
                    if "error" in done.result():
                        break
            finally:
                for process in processes:
                    contenders.end(process)
        ended = dict(zip(kinds, (wait.result() for wait in waits), strict=True))
    return {
        kind: [{**record, "step_ms": each} for each in record.get("steps_ms", ())] or [record]
        for kind, record in ended.items()
    }


def selected(patterns: list[str]) -> list[tuple[Setting, str]]:
    """The contenders of one round, in order: those that `--only` names, or all that are installed."""
    pairs = [(setting, kind) for setting in SETTINGS for kind in setting.kinds]
    if patterns:
        pairs = [
            (setting, kind)
            for setting, kind in pairs
            if any(fnmatch.fnmatch(f"{setting.name}/{kind}", pattern) for pattern in patterns)
        ]
    if bf16_instructions():  # with these, the suffix would change nothing
        pairs = [(setting, kind) for setting, kind in pairs if not kind.endswith(OUR_PRODUCTS)]
    if not importlib.util.find_spec("deepspeed"):
        pairs = [(setting, kind) for setting, kind in pairs if not kind.startswith("deepspeed")]
    return pairs


def median(results: Results, key: tuple[str, str], figure: str) -> float | None:
    values = [record[figure] for record in results.get(key, []) if figure in record]
    return statistics.median(values) if values else None


def ratio(results: Results, above: tuple[str, str], below: tuple[str, str], figure: str) -> float | None:
    """The median over the rounds of `above`'s figure divided by `below`'s in the same round."""
    rounds = zip(results.get(above, []), results.get(below, []), strict=False)
    values = [one[figure] / other[figure] for one, other in rounds if figure in one and figure in other]
    return statistics.median(values) if values else None


def table_of(results: Results) -> Table:
    table = Table(title="One training step of a GPT of 69.4 M parameters (ratios: to Manyhands in the same setting)")
    for heading in ("", "step ms", "ratio", "tokens/s per worker", "peak PSS MiB", "ratio", "PSS at rest", "ratio"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for setting in SETTINGS:
        rows = [kind for kind in setting.kinds if (setting.name, kind) in results]
        if not rows:
            continue
        table.add_section()
        table.add_row(f"[bold]{setting}")
        for kind in rows:
            key, ours = (setting.name, kind), (setting.name, OURS)
            step = median(results, key, "step_ms")
            if step is None:
                table.add_row(f"  {kind}", "failed")
                continue
            table.add_row(
                f"  {kind}",
                f"{step:,.0f}",
                shown(ratio(results, key, ours, "step_ms")),
                f"{median(results, key, 'tokens_per_second_per_worker'):,.0f}",
                f"{median(results, key, 'peak_pss_mib'):,.0f}",
                shown(ratio(results, key, ours, "peak_pss_mib")),
                f"{median(results, key, 'pss_mib'):,.0f}",
                shown(ratio(results, key, ours, "pss_mib")),
            )
    return table


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def judged(results: Results) -> list[Record]:
    """Each target with what was measured: met, missed or not measured."""
    verdicts = []
    for target in TARGETS:
        ours = (target.setting, target.ours)
        above, below = (target.peer, ours) if target.figure == "step_ms" else (ours, target.peer)
        value = ratio(results, above, below, target.figure)
        bound = f"at least {target.at_least}" if target.at_least is not None else f"at most {target.at_most}"
        if value is None:
            verdict = "not measured"
        elif target.at_least is not None:
            verdict = "met" if value >= target.at_least else "missed"
        else:
            verdict = "met" if value <= (target.at_most or 0.0) else "missed"
        record = {"setting": target.setting, "ours": target.ours, "what": target.what, "target": bound}
        verdicts.append({**record, "measured": value, "verdict": verdict})
    overhead = median(results, ("2-bf16", OURS), "overhead")
    verdict = "not measured" if overhead is None else "met" if overhead <= MOST_OVERHEAD else "missed"
    what = "of a step for digests (every 10th step) and records"
    record = {"setting": "2-bf16", "ours": OURS, "what": what, "target": f"at most {MOST_OVERHEAD}"}
    verdicts.append({**record, "measured": overhead, "verdict": verdict})
    return verdicts


def machine() -> Record:
    """Where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    installed = {}
    for name in ("torch", "deepspeed"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "bf16": bf16_instructions() or "none",
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **installed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps measured in each run")
    parser.add_argument("--in-turns", action="store_true", help="a step of each contender in turn, in one round")
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING/KIND", help='such as "2-bf16/*" "*/ddp"')
    options = parser.parse_args()
    contenders.stop_on_signals()
    console = Console(width=max(120, Console().width))
    pairs, where = selected(options.only), machine()
    if not pairs:
        names = ", ".join(f"{setting.name}/{kind}" for setting in SETTINGS for kind in setting.kinds)
        raise SystemExit(f"--only {' '.join(options.only)} names no contender that is installed; contenders: {names}")
    description = (
        f"{where['processor']}, {where['cores']} cores, bf16 instructions: {where['bf16']}, torch {where['torch']}"
    )
    console.print(description, highlight=False)
    if "deepspeed" not in where:
        console.print("skipped: deepspeed-1, deepspeed-2, deepspeed-3 (not installed: pip install '.[bench]')")
    if where["load_before"] > 0.5:
        console.print(f"[yellow]This machine is busy (load {where['load_before']:.1f}): don't trust these figures.")
    results: Results = {}
    try:
        for setting in (setting for setting in SETTINGS if options.in_turns):
            if kinds := [kind for its, kind in pairs if its is setting]:
                by_kind = measure_in_turns(setting, kinds, options.steps)
                results |= {(setting.name, kind): records for kind, records in by_kind.items()}
                for kind, (record, *_) in by_kind.items():
                    if "error" in record:
                        console.print(
                            f"{setting.name}/{kind}: failed\n{record['error']}", highlight=False, markup=False
                        )
        for number in range(0 if options.in_turns else options.rounds):
            for setting, kind in pairs:
                record = end(start(setting, kind, options.steps))
                results.setdefault((setting.name, kind), []).append(record)
                outcome = f"{record['step_ms']:,.0f} ms" if "step_ms" in record else f"failed\n{record['error']}"
                label = f"round {number + 1} of {options.rounds}  {setting.name}/{kind}"
                console.print(f"{label}: {outcome}", highlight=False, markup=False)
    except KeyboardInterrupt:
        console.print("stopped; measured so far:")
    console.print(table_of(results))
    verdicts = judged(results)
    for verdict in verdicts:
        colour = {"met": "green", "missed": "red"}.get(verdict["verdict"], "dim")
        who = f"{verdict['setting']}/{verdict['ours']}"
        figure = f"{who}: {shown(verdict['measured'])} {verdict['what']} (target: {verdict['target']})"
        console.print(f"[{colour}]{verdict['verdict']:>12}[/]  {figure}", highlight=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    runs = [{"setting": setting, "kind": kind, "rounds": records} for (setting, kind), records in results.items()]
    path.write_text(json.dumps({"machine": where, "runs": runs, "targets": verdicts}, indent=1) + "\n")
    console.print(f"all figures: {path}")


if __name__ == "__main__":
    main()
