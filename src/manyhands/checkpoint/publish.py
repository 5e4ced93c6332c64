"""Folders that appear whole or not at all: written under a hidden name, published by one rename."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import BaseModel

from manyhands.checkpoint.format import MANIFEST, seal
from manyhands.errors import CheckpointError


def publish(partial: Path, final: Path, manifest: BaseModel) -> None:
    """Let `partial`, whose files are on the disk, be the folder `final`, in place of what is there."""
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


def remove_partial(root: Path) -> None:
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
