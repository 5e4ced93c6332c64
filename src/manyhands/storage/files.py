"""Operations on files by path or address, and a file that is hashed while it is written.

Every function takes a path (text or Path) or an address (text or Address) and raises OSError. `atomic` writes files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import IO, Any

from manyhands.storage.location import Address, Location, address_or_path, file_system, is_local

_REMOVE_TRIES, _REMOVE_PAUSE_SECONDS = 20, 0.05


def join_path(folder: str, name: str) -> str:
    """Return the path of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def is_plain_name(name: object) -> bool:
    """Return True if `name` is the name of a file, and not a path that leads out of a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def open_to_read(location: str | Location) -> IO[bytes]:
    """Open a file for reading and seeking."""
    if isinstance(location, str) and is_local(location):
        return open(location, "rb")  # for a small file, making a Path takes as long as opening the file
    target = address_or_path(location)
    return target.open_to_read() if isinstance(target, Address) else target.open("rb")


def read_bytes(location: str | Location) -> bytes:
    """Return the complete content of a file."""
    with open_to_read(location) as file:
        return file.read()


def exists(location: str | Location) -> bool:
    """Return True if there is a file or a folder at `location`.

    In a store, a folder exists if something is below it.
    """
    target = address_or_path(location)
    return target.exists() if isinstance(target, Address) else os.path.lexists(target)


def names_in(folder: str | Location, *, missing_ok: bool = True) -> list[str]:
    """Return the names of all files and folders in a folder, sorted.

    If the folder is missing, return an empty list if `missing_ok`, and otherwise raise FileNotFoundError. A store never
    raises this error.
    """
    target = address_or_path(folder)
    if isinstance(target, Address):
        return target.names()
    return sorted(os.listdir(target)) if target.is_dir() or not missing_ok else []


def path_below(folder: str, paths: Iterable[str]) -> str | None:
    """Return the first of these files that is in the folder at any depth, also through links, or None.

    Paths and addresses may be mixed.
    """
    place = _path_or_full_address(folder)
    known = {place: True}

    def is_below(inner: str) -> bool:
        if inner not in known:
            above = os.path.dirname(inner)
            known[inner] = (above != inner and is_below(above)) or _is_same_folder(inner, place)
        return known[inner]

    @cache
    def folders_of(inner: str) -> tuple[str, str]:
        return inner, os.path.realpath(inner)

    for path in paths:
        given = _path_or_full_address(path)
        if not is_local(given):
            found = not is_local(place) and given.startswith(f"{place}/")
        else:
            links = [os.path.realpath(given)] if os.path.islink(given) else []
            found = is_local(place) and any(
                is_below(each) for one in (given, *links) for each in folders_of(os.path.dirname(one))
            )
        if found:
            return path
    return None


def _path_or_full_address(path: str) -> str:
    """Return an absolute path, or an address with its protocol's first name (s3:// for s3a://)."""
    path = re.sub("^(file|local)://", "", path)
    if is_local(path):
        return os.path.abspath(path)
    system, inner = file_system(path)
    return str(system.unstrip_protocol(inner)).rstrip("/")


def _is_same_folder(one: str, other: str) -> bool:
    """Return True if both paths lead to the same folder, for example through links or mounts."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def make_folder(folder: str | Location) -> None:
    """Create the folder and its parents, if they are missing."""
    target = address_or_path(folder)
    if isinstance(target, Address):
        target.make_folder()
    else:
        target.mkdir(parents=True, exist_ok=True)


def move(location: str | Location, to: str | Location) -> None:
    """Rename a file. Replaces a file that has the new name. Both names must be on one file system, or in one store."""
    source, target = address_or_path(location), address_or_path(to)
    if isinstance(source, Address) and isinstance(target, Address):
        source.move(target)
    else:
        os.replace(str(source), str(target))


def remove(location: str | Location) -> None:
    """Delete a file, or a folder with everything in it, if it exists."""
    target = address_or_path(location)
    if isinstance(target, Address):
        target.remove_tree()
    elif target.is_dir() and not target.is_symlink():
        _remove_folder(target)
    else:
        target.unlink(missing_ok=True)


def _remove_folder(path: Path) -> None:
    """Delete a folder.

    Try several times, because an abandoned task may write one more file into the folder meanwhile.
    """
    for _ in range(_REMOVE_TRIES):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        time.sleep(_REMOVE_PAUSE_SECONDS)
    shutil.rmtree(path)


class HashedFile:
    """Writes bytes to `file` sequentially, and hashes them. Its `close` leaves `file` open."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._written = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes. Return the number of bytes written."""
        count = self._file.write(data)
        self._hash.update(data)
        self._written += count
        return count

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._written

    def flush(self) -> None:
        """Flush the buffers of `file`."""
        self._file.flush()

    def sync(self) -> None:
        """Write buffered bytes through to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes written."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        """Return True, because the file is open for writing."""
        return True

    def readable(self) -> bool:
        """Return False, because bytes can't be read back."""
        return False

    def seekable(self) -> bool:
        """Return False, because bytes are hashed in the order of writing."""
        return False

    def close(self) -> None:
        """Do nothing: the owner of `file` closes it."""
