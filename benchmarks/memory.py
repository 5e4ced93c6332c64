"""Measured memory against the formula, for every sharding, offload and precision: docs/memory.md.

    .venv/bin/python benchmarks/memory.py [--workers 1 2 4] [--only "zero3 disk"] [--most-gib 9]

Trains a GPT with 154 M parameters for two steps with each strategy, and reads the memory of the workers meanwhile,
minus that of the same processes before they created engines. Needs root, for the control group that counts it. Writes
runs/memory.json after each case; completed cases are skipped (--again: measured again). At the end the tables go into
docs/memory.md, and the plot next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import contenders
import manyhands as mh
from gpt import GPT
from manyhands.planner.footprint import Footprint, footprint, sizes_of
from memory_report import write_report
from memory_worker import BATCH, HEADS, LENGTH, WIDTH, recipe_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "runs" / "memory.json"
MIB, GIB = 2**20, 2**30
SAMPLE_SECONDS = 0.003


@dataclass(frozen=True)
class Case:
    """One run. sharding "none": forward and backward alone."""

    transport: str
    workers: int
    precision: str
    sharding: str
    offload: str

    def __str__(self) -> str:
        return f"{self.transport} {self.workers} {self.precision} {self.sharding} {self.offload}"


def cases(workers: Sequence[int]) -> Iterator[Case]:
    """All cases: every strategy on shared memory, two workers over torch.distributed, and activations alone."""
    shardings, offloads = ("ddp", "zero1", "zero2", "zero3"), ("none", "disk")
    for precision in ("fp32", "bf16"):
        for offload in offloads:
            yield Case("alone", 1, precision, "none", offload)
        for count, sharding, offload in product(workers, shardings, offloads):
            yield Case("shared-memory", count, precision, sharding, offload)
        for sharding, offload in product(shardings, offloads):
            if 2 in workers and (offload == "none" or sharding == "zero3"):
                yield Case("distributed", 2, precision, sharding, offload)


class ControlGroup:
    """The kernel's count of the memory of a set of processes: `with ControlGroup() as folder:`. The processes join it
    themselves. It may be of version 1 or 2."""

    def __init__(self) -> None:
        first = Path("/sys/fs/cgroup/memory")
        self._is_first = first.is_dir()
        self._folder = (first if self._is_first else Path("/sys/fs/cgroup")) / f"manyhands-memory-{os.getpid()}"

    def __enter__(self) -> Path:
        self._folder.mkdir()
        return self._folder

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a process may still be ending
            self._folder.rmdir()

    def read(self) -> tuple[float, float]:
        """Return MiB in memory, and MiB mapped from files (pages that the kernel may drop once they are written)."""
        stat = dict(line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        anonymous, mapped = ("rss", "mapped_file") if self._is_first else ("anon", "file_mapped")
        shared = int(stat["shmem"])  # counts as mapped, too
        return (int(stat[anonymous]) + shared) / MIB, (int(stat[mapped]) - shared) / MIB


class Reading:
    """The readings of one case: the peak per worker in each phase, beyond what the workers took before."""

    def __init__(self, case: Case) -> None:
        self.case, self.phase = case, "before"
        self._before = (0.0, 0.0)
        self._memory_mib: dict[str, float] = {}
        self._mapped_mib: dict[str, float] = {}
        self._ready = 0

    def a_worker_is_ready(self, now: tuple[float, float]) -> None:
        """Count a worker that is ready. When all are, the phase "start" begins."""
        self._ready += 1
        if self._ready == self.case.workers:
            self._before, self.phase = now, "start"

    def add(self, now: tuple[float, float]) -> None:
        """Add a reading."""
        for largest, value, before in zip((self._memory_mib, self._mapped_mib), now, self._before, strict=True):
            largest[self.phase] = max(largest.get(self.phase, 0.0), (value - before) / self.case.workers)

    def row(self) -> dict[str, Any]:
        """Return the peaks in MiB per worker."""
        phases = ("start", "steps")
        return {
            **{f"{phase}_mib": round(self._memory_mib.get(phase, 0.0), 1) for phase in phases},
            **{f"{phase}_mapped_mib": round(max(0.0, self._mapped_mib.get(phase, 0.0)), 1) for phase in phases},
            "before_mib": round(self._before[0] / self.case.workers, 1),
        }


def predicted(case: Case, depth: int) -> Footprint:
    """The formula's prediction for a case, from a model on the meta device."""
    with torch.device("meta"):
        model = GPT(LENGTH, WIDTH, depth, HEADS)
    strategy = mh.Strategy(sharding=case.sharding, offload=case.offload, transport=case.transport)
    sizes = sizes_of(model, recipe_of(case.precision, WIDTH, depth, HEADS), strategy, case.workers)
    return footprint(sizes, BATCH, strategy, case.workers)


class Run:
    """Several cases in one set of processes. Calls `measured` with the row of each case when the case ends."""

    def __init__(self, several: Sequence[Case], measured: Callable[[Case, dict[str, Any]], None]) -> None:
        self._cases = {str(case): case for case in several}
        self._measured = measured
        self._control, self._reading = ControlGroup(), Reading(several[0])
        self._done = threading.Event()

    def run(self, depth: int) -> None:
        """Start the workers, and read their memory until they end."""
        with (
            tempfile.TemporaryDirectory(prefix="manyhands-") as scratch,
            tempfile.TemporaryFile("w+") as errors,
            self._control as control,
        ):
            given = [{**vars(case), "scratch": scratch, "name": name} for name, case in self._cases.items()]
            workers = next(iter(self._cases.values())).workers
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)),
                *(str(HERE / "memory_worker.py"), str(control), str(depth), json.dumps(given)),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            with contenders.running(command, env=environment, stdout=subprocess.PIPE, stderr=errors) as process:
                thread = threading.Thread(target=self._read, daemon=True)
                thread.start()
                for line in process.stdout or ():
                    if line.startswith("{"):
                        self._hear(json.loads(line))
                self._done.set()
                thread.join()
                process.wait()
            if process.returncode != 0:
                errors.seek(0)
                raise SystemExit(f"{list(self._cases)} failed:\n{errors.read()[-3000:]}")

    def _read(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._reading.add(self._control.read())

    def _hear(self, heard: dict[str, Any]) -> None:
        if heard["case"] not in self._cases:
            return  # warming up
        case = self._cases[heard["case"]]
        if self._reading.case != case:
            self._reading = Reading(case)
        if heard.get("ended") == "nothing yet":
            self._reading.a_worker_is_ready(self._control.read())
        elif "ended" in heard:
            self._reading.phase = "steps" if heard["ended"] == "start" else "over"
            if self._reading.phase == "over":
                self._measured(case, self._reading.row())


def formula_mib(case: Case, depth: int) -> dict[str, float]:
    """The formula's prediction in MiB, without activations."""
    if case.sharding == "none":
        return {}
    expected = predicted(case, depth)
    everything = {**vars(expected), "peak": expected.peak, "mapped": expected.mapped}
    return {name: round(value / MIB, 1) for name, value in everything.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, help="blocks of the GPT, 7.1 M parameters each")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", default="", help="run only cases whose names contain this")
    parser.add_argument("--most-gib", type=float, default=9.0, help="skip cases whose workers together take more")
    parser.add_argument("--again", action="store_true", help="also repeat cases that were measured before")
    parser.add_argument("--no-report", action="store_true", help="leave docs/memory.md as it is")
    options = parser.parse_args()
    contenders.stop_on_signals()
    RESULTS.parent.mkdir(exist_ok=True)
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    together: dict[tuple[str, int, str, str], list[Case]] = {}  # per offload, because files need other malloc settings
    for case in cases(options.workers):
        if options.only not in str(case) or (str(case) in rows and not options.again):
            continue
        total = 0.0
        if case.sharding != "none":
            expected = predicted(case, options.depth)
            total = max(expected.peak, expected.start) * case.workers / GIB
        if total > options.most_gib:
            print(f"{case}: skipped, because it would take {total:.1f} GiB")
        else:
            together.setdefault((case.transport, case.workers, case.precision, case.offload), []).append(case)

    def measured(case: Case, row: dict[str, Any]) -> None:
        rows[str(case)] = row = {**vars(case), **row, "formula_mib": formula_mib(case, options.depth)}
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        figures = {name: value for name, value in row.items() if name.endswith("mib") and name != "formula_mib"}
        print(f"{case}: {row['formula_mib'].get('peak', 0):,.0f} MiB predicted, {figures}", flush=True)

    for several in together.values():
        Run(several, measured).run(options.depth)
    if not options.no_report:
        known = [case for case in cases(options.workers) if str(case) in rows]
        write_report([{**rows[str(case)], "formula_mib": formula_mib(case, options.depth)} for case in known])


if __name__ == "__main__":
    main()
