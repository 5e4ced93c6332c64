"""What commands that start workers share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyhands.errors import Interrupted


def from_one(value: int | None) -> int | None:
    """An option's value, if it counts from 1."""
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} is not a whole number of at least 1")
    return value


Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-n",
        metavar="N",
        callback=from_one,
        help="Worker processes on this machine (default: as many as its CPUs allow).",
        show_default=False,
    ),
]


def default_workers(threads_per_worker: int, micro_batches: int | None) -> int:
    """As many workers as the CPUs that this process may use allow, but no more than there are micro-batches."""
    import os

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cpus // threads_per_worker)
    return workers if micro_batches is None else min(workers, micro_batches)


def start_workers(command: list[str], workers: int, log_dir: Path | None, *, holds_signals: bool) -> None:
    """Start them and await their end. Raises WorkerError and Interrupted."""
    try:
        from manyhands.launching.launcher import run_workers

        run_workers(command, workers=workers, log_dir=log_dir, holds_signals=holds_signals)
    except KeyboardInterrupt:  # before the launcher listened to signals
        raise Interrupted("stopped before any worker began, as asked (SIGINT)") from None
