"""Folders that appear whole or not at all: written by all workers under a hidden name, published by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from manyhands.checkpoint.format import MANIFEST, seal
from manyhands.comm.group import Group
from manyhands.engine.control import gather_json
from manyhands.errors import CheckpointError


def publish_together(
    final: Path,
    group: Group,
    write: Callable[[Path], dict[str, Any]],
    manifest_of: Callable[[list[dict[str, Any]]], BaseModel],
    tag: str,
) -> None:
    """Make the folder `final`, in place of what is there. Collective.

    write: writes this worker's files into the folder that it is given, and returns what worker 0 must know to make the
    manifest from everyone's. Raises CheckpointError; what was published before is never touched by a failure.
    """
    partial = final.with_name(f".{final.name}.partial")
    if group.rank == 0:
        with as_checkpoint_error(partial):
            _remove_partial(final.parent)
            partial.mkdir(parents=True)
    group.barrier(f"{tag} begins / control")
    with as_checkpoint_error(partial):
        mine = write(partial)
    everyone: list[Any] = gather_json(group, mine, f"{tag} / control")
    if group.rank == 0:
        manifest = manifest_of(everyone)
        with as_checkpoint_error(final):
            path = partial / MANIFEST
            path.write_text(seal(manifest.model_dump(mode="json")))
            sync(path)
            sync(partial)
            if final.exists():
                remove(final)
            os.rename(partial, final)
            sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder: out of sight first, so that a kill on the way leaves none that is only half there."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _remove_partial(root: Path) -> None:
    """What earlier runs were killed over."""
    if root.is_dir():
        for path in [*root.glob(".step-*.partial"), *root.glob(".frozen-*.partial")]:
            shutil.rmtree(path)


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class as_checkpoint_error:
    """An OSError inside (a full disk, a folder that may not be written) becomes a CheckpointError naming `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint can't be written: {error.strerror or error}",
                where=str(self._path),
                hint="free some space or choose another run directory; earlier checkpoints are whole",
            ) from error
