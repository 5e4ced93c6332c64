"""What commands that start workers share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.errors import Interrupted

if TYPE_CHECKING:
    from manyhands.checkpoint.snapshot import SnapshotMemory
    from manyhands.launching.restarts import Restart


def from_one(value: int | None) -> int | None:
    """An option's value, if it counts from 1."""
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} is not a whole number of at least 1")
    return value


def a_number_auto_or_never(value: str) -> str:
    """An option's value, if it is one of those."""
    if value not in ("auto", "never") and not (value.isdecimal() and int(value) > 0):
        raise typer.BadParameter(f"{value} is neither a number of steps nor auto nor never")
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


class KeptSnapshots:
    """Memory for the workers' snapshots, while they are started again and again. variables: their environment's."""

    def __init__(self, memory: SnapshotMemory | None, every: int | None) -> None:
        from manyhands.training.snapshots import SNAPSHOT_EVERY_VARIABLE, SNAPSHOT_MEMORY_VARIABLE

        self._memory = memory
        self.variables = {} if memory is None else {SNAPSHOT_MEMORY_VARIABLE: memory.address()}
        if every is not None:
            self.variables[SNAPSHOT_EVERY_VARIABLE] = str(every)

    def newest_step(self) -> int:
        """How many steps the last one has made."""
        newest = None if self._memory is None else self._memory.newest()
        return 0 if newest is None else newest.manifest.step


@contextmanager
def snapshots_kept(every: str, workers: int) -> Iterator[KeptSnapshots]:
    """every: a number of steps, auto or never."""
    from manyhands.checkpoint.snapshot import SnapshotMemory

    memory = None if every == "never" or not sys.platform.startswith("linux") else SnapshotMemory.create(workers)
    try:
        yield KeptSnapshots(memory, int(every) if every.isdecimal() else None)
    finally:
        if memory is not None:
            memory.close()


def start_workers(
    command: list[str], workers: int, log_dir: Path | None, variables: Mapping[str, str], *, holds_signals: bool
) -> None:
    """Start them, with `variables` in their environment, and await their end. Raises WorkerError and Interrupted."""
    try:
        from manyhands.launching.launcher import run_workers

        run_workers(command, workers=workers, environment=variables, log_dir=log_dir, holds_signals=holds_signals)
    except KeyboardInterrupt:  # before the launcher listened to signals
        raise Interrupted("stopped before any worker began, as asked (SIGINT)") from None


def tell_restart(restart: Restart) -> None:
    """On the terminal: why, and for which time."""
    cause = restart.cause
    place = f"\n  where: {cause.where}" if cause.where else ""
    hint = f"\n  what to do: {cause.hint}" if cause.hint else ""
    sys.stderr.write(f"{cause.what}{place}{hint}\nstarting again ({restart.number} of {restart.most})\n")
