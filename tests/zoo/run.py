"""Train models of many packages in several ways, each of which must have the bits of plain PyTorch.

    make zoo ARGS="--only 'transformers/*'"

Each case runs in processes of its own, with a time limit. Its row in docs/zoo.md is written at once. Exit code 1: a
model has different bits, or does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from zoo.case import CASES, Case
from zoo.catalogue import load_cases
from zoo.report import OUTCOMES, Result, write_report
from zoo.training import train_in_all_ways

TIME_LIMIT_SECONDS = 300.0


def _process(case: Case, folder: Path) -> None:
    """Write the result of a case, and what its processes print, to files in `folder`."""
    os.setsid()  # so that the processes that it starts can be ended with it
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    (folder / "result").write_text(json.dumps(train_in_all_ways(case, folder)))


def result_of(case: Case, folder: Path) -> Result:
    """Run a case in a process of its own."""
    process = get_context("fork").Process(target=_process, args=(case, folder))
    process.start()
    try:
        process.join(TIME_LIMIT_SECONDS)
    finally:  # also after Ctrl-C, which the case's session does not receive
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    if (folder / "result").exists():
        return Result(case, *json.loads((folder / "result").read_text()))
    output = (folder / "output").read_text(errors="replace")[-2000:]
    return Result(case, "failed", f"no result within {TIME_LIMIT_SECONDS:.0f} s, or a crash\n{output}")


def main() -> None:
    """Run the cases; print one line per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of cases, such as 'timm/*'")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    load_cases()
    chosen = [case for case in CASES.values() if any(fnmatch(case.name, each) for each in options.only)]
    if not chosen:
        parser.error(f"no case is named {' or '.join(options.only)}; there are {', '.join(CASES)}")
    console, results = Console(highlight=False, markup=False, soft_wrap=True), []
    for case in chosen:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
            result = result_of(case, Path(folder))
        results.append(result)
        write_report([result])
        detail = f"\n{result.detail}" if result.detail else ""
        console.print(f"{case.name}: {result.outcome}, {time.monotonic() - started:.0f} s{detail}")
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(1 if counts["different"] or counts["failed"] else 0)


if __name__ == "__main__":
    main()
