"""Options, checks and records shared by the commands that start workers.

They are about the number of workers, memory for snapshots, failures and restarts.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.members.processes import oom_kills
from manyhands.output import say

if TYPE_CHECKING:
    from manyhands.checkpoint.snapshot import SnapshotMemory
    from manyhands.launching.rendezvous import Rendezvous
    from manyhands.launching.restarts import Restart
    from manyhands.listeners.run_directory import RunDirectory
    from manyhands.storage.location import Location


def check_from_one(value: int | None) -> int | None:
    """Check that an option's value is at least 1."""
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} is not an integer of at least 1")
    return value


def check_snapshot_every(value: str) -> str:
    """Check a value of --snapshot-every."""
    if value not in ("auto", "never") and not (value.isdecimal() and int(value) > 0):
        raise typer.BadParameter(f"{value} is not a number of steps, auto or never")
    return value


class Bounds(NamedTuple):
    """A range of the number of workers."""

    least: int
    most: int

    def after(self, failures: int) -> int:
        """Return the number of workers to start after this many failures without progress.

        The first failure may be accidental, so the number stays the same. After each further failure, one worker fewer
        is started, because the memory may be too small for all workers, or a part of the machine may be broken.
        """
        return max(self.least, self.most - max(0, failures - 1))


def bounds(text: str) -> Bounds:
    """Parse an option's value: `4`, or `2:8`."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise typer.BadParameter(f"{text} is not an integer of at least 1, or a range such as 2:8")
    return Bounds(int(least), int(most or least))


Workers = Annotated[
    Bounds | None,
    typer.Option(
        "--workers",
        "-n",
        metavar="N",
        parser=bounds,
        help="Worker processes on this machine (default: as many as its CPUs allow). With a range such as 2:8: as "
        "many as "
        "the CPUs allow, within the range, and fewer after repeated failures.",
        show_default=False,
    ),
]


def workers_for(requested: Bounds | None, threads_per_worker: int, micro_batches: int | None) -> Bounds:
    """Return the range of workers: as many as this process's CPUs allow, at most one per micro-batch.

    The range lies within `requested`. A single requested number is used as it is.
    """
    import os

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = max(1, cpus // threads_per_worker)
    fitting = fitting if micro_batches is None else min(fitting, micro_batches)
    if requested is None:
        return Bounds(fitting, fitting)
    return Bounds(requested.least, max(requested.least, min(requested.most, fitting)))


class SnapshotStore:
    """Memory that holds the workers' snapshots across restarts. variables: environment variables for the workers."""

    def __init__(self, memory: SnapshotMemory | None, every: int | None) -> None:
        from manyhands.checkpoint.snapshot import SNAPSHOT_MEMORY_VARIABLE
        from manyhands.training.snapshotting import SNAPSHOT_EVERY_VARIABLE

        self._memory = memory
        self.variables = {} if memory is None else {SNAPSHOT_MEMORY_VARIABLE: memory.address()}
        if every is not None:
            self.variables[SNAPSHOT_EVERY_VARIABLE] = str(every)

    def newest_step(self) -> tuple[int, int]:
        """Return the newest snapshot: the number of its training in the script, from 0, and its step."""
        newest = None if self._memory is None else self._memory.newest()
        return (0, 0) if newest is None else (newest.of.number, newest.manifest.step)


@contextmanager
def snapshot_memory(every: str, workers: int) -> Iterator[SnapshotStore]:
    """Create memory for snapshots. every: a number of steps, auto or never."""
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
    cooperates: bool,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Start workers with `variables` in their environment, and wait until they end. Raises WorkerError and Interrupted.

    rendezvous: the rendezvous with the other hosts of the run, if there are any.
    """
    try:
        from manyhands.launching.launcher import run_workers

        run_workers(
            command,
            workers=workers,
            environment=variables,
            log_dir=log_dir,
            cooperates=cooperates,
            rendezvous=rendezvous,
        )
    except KeyboardInterrupt:  # the launcher did not handle signals yet
        raise Interrupted("stopped on request before any worker started") from None


def number_of_workers(count: int) -> str:
    """Return "1 worker", or "2 workers"."""
    return f"{count} worker{'' if count == 1 else 's'}"


def print_restart(restart: Restart, workers: int) -> None:
    """Print the cause, the number of the restart, and the number of workers.

    A traceback is printed at once, because an error that a worker raised is likely to recur.
    """
    cause = restart.cause
    where = f"\n  where: {cause.where}" if cause.where else ""
    hint = f"\n  what to do: {cause.hint}" if cause.hint else ""
    shown = str(cause) if cause.raised else f"{cause.what}{where}{hint}"
    say(f"{shown}\nrestarting ({restart.number} of {restart.limit}) with {number_of_workers(workers)}")


@contextmanager
def ending_reported(
    record: Callable[..., None], directory: Path, checkpoints: Location, *, given: bool
) -> Iterator[None]:
    """Record a failure of the run in this block. If the run is interrupted, add to the error how to continue."""
    try:
        yield
    except WorkerError as error:
        record(error, restart=None)
        raise
    except Interrupted as error:
        raise _with_resume_hint(error, directory, checkpoints, given=given) from None


def record_restart(directory: RunDirectory, restart: Restart, workers: int) -> None:
    """Record a restart in the run directory, and print it."""
    record_run_failure(directory, restart.cause, restart.number)
    print_restart(restart, workers)


def record_run_failure(directory: RunDirectory, error: WorkerError | None, restart: int | None) -> None:
    """Record a failure.

    restart: the number of the restart that follows; None if the run ends. error: None if the hosts of the run change.
    If the failure can't be recorded, for example because the disk is full, this is printed, and the run is still
    restarted.
    """
    try:
        if error is None:
            directory.append_event("hosts changed")
        else:
            facts = {"rank": error.rank, "what": error.what, "where": error.where, "hint": error.hint}
            directory.append_event("failed", **facts, restart=restart, oom_kills=oom_kills())
    except ConfigError as unwritten:
        say(f"the failure is not recorded: {unwritten}")


def _with_resume_hint(error: Interrupted, directory: Path, checkpoints: Location, *, given: bool) -> Interrupted:
    """Add the last checkpoint and the command that continues from it to the error."""
    from manyhands.checkpoint.format import list_checkpoints
    from manyhands.listeners.run_directory import ISLANDS

    found = list_checkpoints(checkpoints)
    has_islands = (directory / ISLANDS).is_dir()
    last = f"its last checkpoint is {found[-1][1]}" if found else "there is no checkpoint: no step was completed"
    again = shlex.join(["manyhands", *sys.argv[1:], *([] if given else ["--run-dir", str(directory)])])
    return Interrupted(
        error.what,
        where=error.where if has_islands else last,
        hint=f"to continue: {again}" if found or has_islands else None,
        detail=error.detail,
    )
