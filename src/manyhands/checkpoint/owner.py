"""Records which run a folder of checkpoints belongs to, so that two runs never write to one folder.

A run has an `id` in its manifest. A folder of checkpoints outside of the run directory holds `run.json`, with the id
and the directory of the run that writes there. The folder `checkpoints` in a run directory belongs to that run and
needs no such file, so that the run directory can be moved and copied.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from manyhands.checkpoint.format import MANIFEST, OWNER
from manyhands.errors import CheckpointError, ConfigError, ManyhandsError
from manyhands.storage.atomic import write_atomic
from manyhands.storage.location import Address, Location, hint_of
from manyhands.storage.run_lock import is_locked
from manyhands.storage.untrusted import read_inside

_UNREADABLE = "unreadable"  # the id of an owner whose file is broken: no run has this id


class Owner(NamedTuple):
    """A run: its id and its absolute directory. Both are "" for a run without a run directory."""

    id: str
    directory: str

    def __str__(self) -> str:
        if self.id == _UNREADABLE:
            return f"unknown: {self.directory} can't be read"
        return f"the run {self.id} in {self.directory}" if self.directory else "a run without a run directory"

    @property
    def path(self) -> Path | None:
        """The run directory; None if there is none."""
        return Path(self.directory) if self.directory and self.id != _UNREADABLE else None


NO_DIRECTORY = Owner("", "")


def run_in(directory: Path) -> Owner | None:
    """Return the run of a run directory; None if its manifest has no id."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(read_inside(directory / MANIFEST)).get("id")
        if isinstance(found, str) and found:
            return Owner(found, str(directory.absolute()))
    return None


def owner_of(folder: Location) -> Owner | None:
    """Return the run that the checkpoints in `folder` belong to; None if they belong to none. Raises CheckpointError.

    The file of an owner may be missing: another program may have copied the checkpoints, or `Engine.save` wrote them.
    """
    path = folder / OWNER
    try:
        if path.is_file():
            found: Any = json.loads(read_inside(path))
            return Owner(str(found["run"]), str(found["directory"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Owner(_UNREADABLE, str(path))
    except OSError as error:
        raise CheckpointError(
            "the checkpoints can't be listed",
            where=str(path),
            got=error,
            hint=hint_of(error, "check that you may read the folder"),
        ) from error
    if isinstance(folder, Address) or folder.resolve().name != "checkpoints":
        return None
    return run_in(folder.resolve().parent)


def check_owner(folder: Location, run: Owner) -> None:
    """Raise ConfigError if the checkpoints in `folder` belong to a run other than `run`. Raises CheckpointError."""
    owner = owner_of(folder)
    if owner is None or _is_same(owner, run):
        return
    raise ConfigError(
        "the checkpoints here belong to another run",
        where=str(folder.absolute()),
        expected=str(run),
        got=str(owner),
        hint="choose another place for the checkpoints of one of the runs; to continue from the other run's "
        "checkpoints, and to let only this run write there from now on, use --adopt (adopt=True)",
    )


def _is_same(owner: Owner, run: Owner) -> bool:
    """Return True if both are the same run. A run directory may have been moved, but a copy of it is another run."""
    if owner.id != run.id:
        return False
    before, now = owner.path, run.path
    if before is None or now is None or before.resolve() == now.resolve():
        return True
    found = run_in(before)
    return found is None or found.id != owner.id


def refuse_active(folder: Location, run: Owner) -> None:
    """Raise ConfigError if the owner of `folder` is another run that is in progress."""
    owner = owner_of(folder)
    if owner is None or owner.path is None or _is_same(owner, run) or not is_locked(owner.path):
        return
    raise ConfigError(
        "the run whose checkpoints are to be adopted is in progress",
        where=str(folder.absolute()),
        got=str(owner),
        hint="wait for it to end, or stop it first",
    )


def claim(folder: Location, run: Owner) -> None:
    """Record that the checkpoints in `folder` belong to `run`. Raises OSError."""
    path = folder / OWNER
    if _is_inside(folder, run):
        with suppress(FileNotFoundError):
            path.unlink()
    elif owner_of(folder) != run:
        if not isinstance(folder, Address):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"run": run.id, "directory": run.directory}))


def _is_inside(folder: Location, run: Owner) -> bool:
    """Return True if `folder` is the folder `checkpoints` in the run's directory, and not a link to another place."""
    return isinstance(folder, Path) and run.path is not None and folder.resolve() == run.path.resolve() / "checkpoints"


def refuse_other_owner(folder: Location, run: Owner) -> None:
    """Raise CheckpointError if another run has adopted the checkpoints in `folder` in the meantime."""
    try:
        check_owner(folder, run)
    except ConfigError as error:
        raise CheckpointError(
            "the checkpoint can't be written: another run has adopted the folder",
            where=error.where,
            expected=error.expected,
            got=error.got,
            hint="resume this run with another checkpoint_dir",
        ) from error


def refusal(folder: Location, run: Owner | None) -> ManyhandsError | None:
    """Return the error of `check_owner` for readers of the run's checkpoints, or None if they belong to the run."""
    try:
        if run is not None:
            check_owner(folder, run)
    except ConfigError as error:
        error.hint = "the run's own checkpoints are gone from there; pass the folder itself to use the other run's"
        return error
    return None
