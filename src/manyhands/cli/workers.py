"""What the commands that start workers share.

What commands that start workers share.

What is noted and told of a run's workers that failed, and of a run that didn't end well.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from manyhands.errors import Interrupted, WorkerError

if TYPE_CHECKING:
    from manyhands.checkpoint.snapshot import SnapshotMemory
    from manyhands.launching.failures import Restart
    from manyhands.launching.rendezvous import Rendezvous
    from manyhands.listeners.run_directory import RunDirectory
    from manyhands.storage.location import Location


def check_from_one(value: int | None) -> int | None:
    """An option's value, if it counts from 1."""
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} is not a whole number of at least 1")
    return value


def check_snapshot_every(value: str) -> str:
    """An option's value, if it is one of those."""
    if value not in ("auto", "never") and not (value.isdecimal() and int(value) > 0):
        raise typer.BadParameter(f"{value} is neither a number of steps nor auto nor never")
    return value


class Bounds(NamedTuple):
    """Between how many and how many."""

    least: int
    most: int

    def after(self, failures: int) -> int:
        """How many workers to start after so many failures without progress: the first may have been chance; then there
        may be too many of them for the memory, or a part of the machine is broken."""
        return max(self.least, self.most - max(0, failures - 1))


def bounds(text: str) -> Bounds:
    """Of an option's value: `4`, or `2:8`."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise typer.BadParameter(f"{text} is neither a whole number of at least 1 nor a range of them such as 2:8")
    return Bounds(int(least), int(most or least))


Workers = Annotated[
    Bounds | None,
    typer.Option(
        "--workers",
        "-n",
        metavar="N",
        parser=bounds,
        help="Worker processes on this machine (default: as many as its CPUs allow). 2:8: as many as they allow, but "
        "at least 2 and at most 8, and fewer when workers fail again and again.",
        show_default=False,
    ),
]


def workers_for(wanted: Bounds | None, threads_per_worker: int, micro_batches: int | None) -> Bounds:
    """As many workers as the CPUs that this process may use allow, but no more than there are micro-batches; in a range
    that is wanted, and as many as are wanted if it's one number."""
    import os

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = max(1, cpus // threads_per_worker)
    fitting = fitting if micro_batches is None else min(fitting, micro_batches)
    if wanted is None:
        return Bounds(fitting, fitting)
    return Bounds(wanted.least, max(wanted.least, min(wanted.most, fitting)))


class SnapshotStore:
    """Memory for the workers' snapshots, while they are started again and again. variables: their environment's."""

    def __init__(self, memory: SnapshotMemory | None, every: int | None) -> None:
        from manyhands.checkpoint.snapshot import SNAPSHOT_MEMORY_VARIABLE
        from manyhands.training.saving import SNAPSHOT_EVERY_VARIABLE

        self._memory = memory
        self.variables = {} if memory is None else {SNAPSHOT_MEMORY_VARIABLE: memory.address()}
        if every is not None:
            self.variables[SNAPSHOT_EVERY_VARIABLE] = str(every)

    def newest_step(self) -> tuple[int, int]:
        """Which training of the script the last one is of, from 0, and how many steps that has made."""
        newest = None if self._memory is None else self._memory.newest()
        return (0, 0) if newest is None else (newest.of.number, newest.manifest.step)


@contextmanager
def snapshot_memory(every: str, workers: int) -> Iterator[SnapshotStore]:
    """every: a number of steps, auto or never."""
    from manyhands.checkpoint.snapshot import SnapshotMemory

    memory = None if every == "never" or not sys.platform.startswith("linux") else SnapshotMemory.create(workers)
    try:
        yield SnapshotStore(memory, int(every) if every.isdecimal() else None)
    finally:
        if memory is not None:
            memory.close()


def start_workers(
    command: list[str],
    workers: int,
    log_dir: Path | None,
    variables: Mapping[str, str],
    *,
    holds_signals: bool,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Start them, with `variables` in their environment, and await their end. Raises WorkerError and Interrupted.

    meeting: with other hosts', if any.
    """
    try:
        from manyhands.launching.launcher import run_workers

        run_workers(
            command,
            workers=workers,
            environment=variables,
            log_dir=log_dir,
            holds_signals=holds_signals,
            rendezvous=rendezvous,
        )
    except KeyboardInterrupt:  # before the launcher listened to signals
        raise Interrupted("stopped before any worker began, as asked (SIGINT)") from None


def print_restart(restart: Restart, workers: int) -> None:
    """On the terminal: why, for which time, and with how many workers."""
    cause, count = restart.cause, f"{workers} worker{'' if workers == 1 else 's'}"
    place = f"\n  where: {cause.where}" if cause.where else ""
    hint = f"\n  what to do: {cause.hint}" if cause.hint else ""
    again = f"starting again ({restart.number} of {restart.limit}) with {count}"
    sys.stderr.write(f"{cause.what}{place}{hint}\n{again}\n")


@contextmanager
def ending_reported(
    note: Callable[..., None], directory: Path, checkpoints: Location, *, given: bool
) -> Iterator[None]:
    """How the run ends inside, if not well, is noted in its directory; and how to go on with one that was stopped."""
    try:
        yield
    except WorkerError as error:
        note(error, restart=None)
        raise
    except Interrupted as error:
        raise _with_the_way_on(error, directory, checkpoints, given=given) from None


def record_restart(directory: RunDirectory, restart: Restart, workers: int) -> None:
    """In the run's directory, and on the terminal."""
    record_run_failure(directory, restart.cause, restart.number)
    print_restart(restart, workers)


def record_run_failure(directory: RunDirectory, error: WorkerError | None, restart: int | None) -> None:
    """restart: None if nobody tries again. error: None if it was none: a host has come or gone."""
    if error is None:
        directory.append_event("hosts changed")
        return
    facts = {"rank": error.rank, "what": error.what, "where": error.where, "hint": error.hint}
    directory.append_event("failed", **facts, restart=restart)


def _with_the_way_on(error: Interrupted, directory: Path, checkpoints: Location, *, given: bool) -> Interrupted:
    """The same, with where the last checkpoint is and how to go on from it; or that there is none."""
    from manyhands.checkpoint.format import list_checkpoints

    found = list_checkpoints(checkpoints)
    again = shlex.join(["manyhands", *sys.argv[1:], *([] if given else ["--run-dir", str(directory)])])
    return Interrupted(
        error.what,
        where=f"its last checkpoint is {found[-1][1]}" if found else "there is no checkpoint: no step was finished",
        hint=f"to go on: {again}" if found else None,
        detail=error.detail,
    )
