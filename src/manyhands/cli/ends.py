"""What is noted and told of a run's workers that failed, and of a run that didn't end well."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.cli.workers import tell_restart
from manyhands.errors import Interrupted, WorkerError

if TYPE_CHECKING:  # what torch is loaded for waits until it's needed
    from manyhands.checkpoint.address import Place
    from manyhands.launching.restarts import Restart
    from manyhands.report.run_directory import RunDirectory


@contextmanager
def ending_told(note: Callable[..., None], directory: Path, checkpoints: Place, *, given: bool) -> Iterator[None]:
    """How the run ends inside, if not well, is noted in its directory; and how to go on with one that was stopped."""
    try:
        yield
    except WorkerError as error:
        note(error, restart=None)
        raise
    except Interrupted as error:
        raise _with_the_way_on(error, directory, checkpoints, given=given) from None


def note_restart(directory: RunDirectory, restart: Restart, workers: int) -> None:
    """In the run's directory, and on the terminal."""
    note_failure(directory, restart.cause, restart.number)
    tell_restart(restart, workers)


def note_failure(directory: RunDirectory, error: WorkerError | None, restart: int | None) -> None:
    """restart: None if nobody tries again. error: None if it was none: a host has come or gone."""
    if error is None:
        directory.append_event("hosts changed")
        return
    facts = {"rank": error.rank, "what": error.what, "where": error.where, "hint": error.hint}
    directory.append_event("failed", **facts, restart=restart)


def _with_the_way_on(error: Interrupted, directory: Path, checkpoints: Place, *, given: bool) -> Interrupted:
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
