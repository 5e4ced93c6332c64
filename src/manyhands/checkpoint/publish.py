"""Checkpoint folders that appear complete or not at all.

On a disk: written under a hidden name, published by one rename. In a store, which has no renaming: written below the
folder's own name, each attempt apart, and published by the manifest, which is written last.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from manyhands.checkpoint.format import MANIFEST, seal
from manyhands.errors import CheckpointError
from manyhands.storage.location import Address, Location, hint_of, put_text

_OURS = re.compile(
    r"(step-\d{8,}|frozen-[0-9a-f]{16})/([0-9a-f]{16})/(worker-\d+\.safetensors|part-\d+\.json|failed-\d+)"
)
"""What an attempt writes to a store: nothing else is ever removed as a leftover."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def partial_folder(final: Location, attempt: str) -> Location:
    """Where what shall be the folder `final` is written. attempt: 16 hexadecimal digits, other ones each time."""
    return final / attempt if isinstance(final, Address) else final.with_name(f".{final.name}.{attempt}.partial")


def check_writable(root: Location) -> None:
    """See now, and not after an hour, that checkpoints can be written there. Raises CheckpointError."""
    with as_checkpoint_error(root):
        if isinstance(root, Address):
            put_text(root / ".trying", "")
            (root / ".trying").unlink()
        else:
            root.mkdir(parents=True, exist_ok=True)


def create_partial(partial: Location, root: Location) -> None:
    """Have an empty folder `partial` in `root`, and nothing there of what earlier runs were killed over."""
    remove_partial(root)
    if isinstance(partial, Path):
        partial.mkdir(parents=True)


def publish_folder(partial: Location, final: Location, manifest: BaseModel) -> None:
    """Let what is in `partial`, whose files are written for good, be the folder `final`, in place of what is there."""
    text = seal(manifest.model_dump(mode="json"))
    if isinstance(final, Address) or isinstance(partial, Address):
        put_text(final / MANIFEST, text)
        with suppress(OSError):  # it's there: what was there before is a leftover, and the next save tries again
            remove_partial(final.parent)
        return
    path = partial / MANIFEST
    path.write_text(text)
    sync(path)
    sync(partial)
    if final.exists():
        _exchange(partial, final)
        sync(final.parent)
        shutil.rmtree(partial)
    else:
        os.rename(partial, final)
        sync(final.parent)


def remove_checkpoint(folder: Location) -> None:
    """Delete a folder: out of sight first, so that a kill on the way leaves none that is only half there."""
    if isinstance(folder, Address):
        files = folder.files()
        for name in sorted(files, key=lambda name: name != MANIFEST):
            (folder / name).unlink()
        return
    hidden = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def remove_partial(root: Location) -> None:
    """What earlier runs were killed over."""
    if isinstance(root, Address):
        _remove_attempts(root)
    elif root.is_dir():
        for path in [*root.glob(".step-*.partial"), *root.glob(".frozen-*.partial")]:
            shutil.rmtree(path)


def _remove_attempts(root: Address) -> None:
    """Of every folder without a manifest all attempts, and of the others those that it doesn't name."""
    files = root.files()
    attempts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in filter(None, map(_OURS.fullmatch, files)):
        attempts[match[1]][match[2]].append(match[0])
    for folder, found in attempts.items():
        is_whole = f"{folder}/{MANIFEST}" in files
        if is_whole and len(found) == 1:
            continue
        named = _attempts_of(root / folder / MANIFEST) if is_whole else set()
        for attempt, names in found.items():
            if named is not None and attempt not in named:
                for name in names:
                    (root / name).unlink()


def _attempts_of(manifest: Address) -> set[str] | None:
    """The attempts whose files a manifest names; None if that can't be said: it's broken."""
    try:
        return {str(piece["file"]).partition("/")[0] for piece in json.loads(manifest.read_bytes())["pieces"]}
    except (ValueError, KeyError, TypeError):
        return None


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change their names, at once where the file system can do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(AttributeError):  # a C library without that call
        if not libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            return
    between = other.with_name(f".{other.name}.old.partial")  # killed here, neither would be seen
    shutil.rmtree(between, ignore_errors=True)
    os.rename(other, between)
    os.rename(one, other)
    os.rename(between, one)


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class as_checkpoint_error:
    """An OSError inside (a full disk, a folder that may not be written) becomes a CheckpointError naming `path`."""

    def __init__(self, path: Location) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint can't be written: {error.strerror or error}",
                where=str(self._path),
                hint=hint_of(error, "free some space or choose another run directory; earlier checkpoints are whole"),
            ) from error
