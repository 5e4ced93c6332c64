"""Files that appear complete or not at all, hashed while they are written.

Where files are: a local folder, or any address that fsspec knows. Files appear whole or not at all.
On a local disk a file is written under a temporary name and linked to its own: the first of several writers wins. An
object store publishes a file when its last byte has arrived; a later writer, whose bytes are the same, changes nothing.

A file that is hashed while it is written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from manyhands.storage.location import file_system, is_local

TEMPORARY = ".tmp"

_REMOVALS = 20


def join_path(folder: str, name: str) -> str:
    """The path of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def _attempt() -> str:
    """A name for a try: no other process has it, on no host that sees the folder."""
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def open_to_read(path: str) -> IO[bytes]:
    """The file, for reading and seeking. Raises OSError."""
    if is_local(path):
        return open(path, "rb")
    system, inner = file_system(path)
    file: IO[bytes] = system.open(inner, "rb")
    return file


@contextmanager
def publish_file(path: str) -> Iterator[IO[bytes]]:
    """A file to write, that appears under `path` when the block ends: not if it raises, nor if nothing was written."""
    if is_local(path):
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{_attempt()}{TEMPORARY}")
        try:
            with open(temporary, "wb") as file:
                yield file
                if not file.tell():
                    return
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass  # the first writer has won, and its bytes are ours
            except OSError:  # a file system without links
                os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        return
    system, inner = file_system(path)
    with tempfile.NamedTemporaryFile() as file:
        yield file
        if not file.tell():
            return
        file.flush()
        system.put_file(file.name, inner)


def read_bytes(path: str) -> bytes:
    """All of a file. Raises OSError."""
    with open_to_read(path) as file:
        return file.read()


def replace_bytes(path: str, data: bytes) -> None:
    """Make `data` the file's content, on the disk, in place of what was there."""
    if not is_local(path):
        system, inner = file_system(path)
        system.pipe_file(inner, data)
        return
    temporary = f"{path}.{_attempt()}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def exists(path: str) -> bool:
    """There is a file or folder of that name."""
    if is_local(path):
        return os.path.lexists(path)
    system, inner = file_system(path)
    return bool(system.exists(inner))


def names_in(folder: str) -> list[str]:
    """The names of all files and folders in a folder, sorted; none if there is no such folder."""
    if is_local(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    system, inner = file_system(folder)
    if not system.isdir(inner):
        return []
    system.invalidate_cache()
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in system.ls(inner, detail=False))


def make_folder(folder: str) -> None:
    """Make the folder and those above it, where they aren't there."""
    if is_local(folder):
        os.makedirs(folder, exist_ok=True)
        return
    system, inner = file_system(folder)
    system.makedirs(inner, exist_ok=True)


def move(path: str, to: str) -> None:
    """Give a file another name, in place of what has that name."""
    if is_local(path):
        os.replace(path, to)
        return
    system, inner = file_system(path)
    system.mv(inner, file_system(to)[1])


def remove(path: str) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if is_local(path):
        if os.path.isdir(path) and not os.path.islink(path):
            _remove_folder(path)
        elif os.path.lexists(path):
            os.unlink(path)
        return
    system, inner = file_system(path)
    if system.exists(inner):
        system.rm(inner, recursive=True)


def _remove_folder(path: str) -> None:
    """Again, if somebody puts a file into it meanwhile: a task that was given up and has just come to its end."""
    for _ in range(_REMOVALS):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        time.sleep(0.05)
    shutil.rmtree(path)


class HashedFile:
    """Passes bytes on to `file`, from its beginning to its end, and hashes them on the way."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._written = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write some bytes; how many."""
        count = self._file.write(data)
        self._hash.update(data)
        self._written += count
        return count

    def tell(self) -> int:
        """How many bytes were written."""
        return self._written

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()

    def sync(self) -> None:
        """Have it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """No."""
        return False

    def seekable(self) -> bool:
        """No."""
        return False

    def close(self) -> None:
        """Nothing: the file belongs to who opened it."""
