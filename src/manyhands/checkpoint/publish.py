"""Checkpoint folders that appear complete or not at all.

On a disk, a folder is written under a hidden name and published by one rename (see `storage.atomic`). A store cannot
rename, so each attempt writes its files to its own subfolder of the final folder. The manifest, which is written last,
publishes them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from manyhands.checkpoint.format import MANIFEST
from manyhands.errors import CheckpointError
from manyhands.storage import atomic
from manyhands.storage.location import Address, Location, hint_of
from manyhands.storage.sealed import seal

_ATTEMPT_FILE = re.compile(
    r"(step-\d{8,}|frozen-[0-9a-f]{16})/([0-9a-f]{16})/(worker-\d+\.safetensors|part-\d+\.json|failed-\d+)"
)
"""The names of the files that an attempt writes to a store. No other files are ever deleted as leftovers."""


def partial_folder(final: Location, attempt: str) -> Location:
    """Return the folder to which the files of `final` are written. attempt: 16 hexadecimal digits, different each
    time.
    """
    return final / attempt if isinstance(final, Address) else final.with_name(f".{final.name}.{attempt}.partial")


def check_writable(root: Location) -> None:
    """Check, before training starts, that checkpoints can be written to `root`. Raises CheckpointError."""
    with as_checkpoint_error(root):
        if isinstance(root, Address):
            (root / ".trying").write_text("")
            (root / ".trying").unlink()
        else:
            root.mkdir(parents=True, exist_ok=True)


def create_partial(partial: Location, root: Location) -> None:
    """Create the empty folder `partial` in `root`, and delete partial folders that killed runs left."""
    remove_partial(root)
    if isinstance(partial, Path):
        partial.mkdir(parents=True)


def publish_checkpoint(partial: Location, final: Location, manifest: BaseModel) -> None:
    """Publish the folder `partial`, whose files are synced, as the folder `final`. Replaces an existing `final`."""
    atomic.publish_folder(partial, final, (MANIFEST, seal(manifest.model_dump(mode="json"))), replace=True)
    if isinstance(final, Address):
        with suppress(OSError):  # the folder is published; the next save deletes the leftovers
            remove_partial(final.parent)


def remove_checkpoint(folder: Location) -> None:
    """Delete a folder. Hide it first, so that a kill during the deletion leaves no incomplete folder visible.

    Raises OSError.
    """
    if isinstance(folder, Address):
        files = folder.files()
        for name in sorted(files, key=lambda name: name != MANIFEST):
            (folder / name).unlink()
        return
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old.partial")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def remove_partial(root: Location) -> None:
    """Delete the partial folders that killed runs left. Keep links and files, because Manyhands did not make them.

    A folder that can't be deleted stays, because it must not prevent a save.
    """
    if isinstance(root, Address):
        _remove_attempts(root)
    elif root.is_dir():
        for path in [*root.glob(".step-*.partial"), *root.glob(".frozen-*.partial")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _remove_attempts(root: Address) -> None:
    """Delete the attempts that the folder's manifest does not name. Without a manifest, delete all attempts."""
    files = root.files()
    attempts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in filter(None, map(_ATTEMPT_FILE.fullmatch, files)):
        attempts[match[1]][match[2]].append(match[0])
    for folder, found in attempts.items():
        is_complete = f"{folder}/{MANIFEST}" in files
        if is_complete and len(found) == 1:
            continue
        used = _attempts_of(root / folder / MANIFEST) if is_complete else set()
        for attempt, names in found.items():
            if used is not None and attempt not in used:
                for name in names:
                    (root / name).unlink()


def _attempts_of(manifest: Address) -> set[str] | None:
    """Return the attempts whose files a manifest names, or None if the manifest is broken."""
    try:
        return {str(piece["file"]).partition("/")[0] for piece in json.loads(manifest.read_bytes())["pieces"]}
    except (ValueError, KeyError, TypeError):
        return None


class as_checkpoint_error:
    """A context that turns an OSError (a full disk, a missing permission) into a CheckpointError that names `path`."""

    def __init__(self, path: Location) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint can't be written: {error.strerror or error}",
                where=str(self._path),
                hint=hint_of(error, "free some space or choose another run directory; earlier checkpoints are intact"),
            ) from error
