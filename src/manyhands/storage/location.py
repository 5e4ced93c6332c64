"""Paths and fsspec addresses: list, read ranges, write.

A `Location` is a `Path` of this machine's file system, or an `Address` in a store (s3://bucket/folder). `Address` has
the methods of `Path` that checkpoints and data jobs use, so most code does not distinguish the two. A store cannot
rename atomically, but it shows an object only when its last byte has arrived.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from manyhands.errors import ConfigError
from manyhands.storage.http_file import is_http, open_http


def is_local(path: str) -> bool:
    """Return True for a path of this machine's file system, and False for an address such as s3://bucket/key."""
    return "://" not in path


def file_system(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it. Raises ConfigError if fsspec cannot open it."""
    try:
        import fsspec

        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"the address can't be used: {error}",
            where=path,
            hint="install fsspec's package for it: s3fs for s3://, gcsfs for gs://, adlfs for abfs://, ...",
        ) from error
    return system, inner


AHEAD_BYTES = 8 << 20
"""The number of bytes of an object that one call reads or writes. No more of the object is in memory at a time."""

_PART_BYTES, _MOST_PARTS = 32 << 20, 9_000  # stores allow 10,000 parts of an upload


class StoreError(OSError):
    """An error of a store.

    It is an OSError, although fsspec's packages raise other exceptions. hint: what to do about it.
    """

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


class Address:
    """A folder or an object in a store.

    The constructor raises ConfigError if fsspec does not know the address. Methods raise FileNotFoundError for an
    object that does not exist, and StoreError for all other errors.
    """

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")
        self._system, self._inner = file_system(self._text)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self._text}/{name}")

    @property
    def name(self) -> str:
        """Return the last part of the address."""
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """Return the address of the folder that contains this address."""
        return Address(self._text.rpartition("/")[0])

    def absolute(self) -> Address:
        """Return this address, because addresses are always absolute."""
        return self

    def is_dir(self) -> bool:
        """Return True if there is anything below the address."""
        return bool(self.files())

    def exists(self) -> bool:
        """Return True if there is an object at the address, or anything below the address."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return True if there is an object at the address."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        """Return the size of the object in bytes."""
        with self._store_errors():
            self._system.invalidate_cache()
            info = self._system.info(self._inner)
        if info["type"] != "file":
            raise FileNotFoundError(self._text)
        return int(info["size"])

    def files(self) -> list[str]:
        """Return the names of all objects below the address, as `folder/name`, sorted. The list may be empty."""
        with self._store_errors():
            self._system.invalidate_cache()  # other processes also write there
            found = self._system.find(self._inner)
        first = len(self._inner.rstrip("/")) + 1
        return sorted(path[first:] for path in found if path[first:])

    def names(self) -> list[str]:
        """Return the names of the objects and folders directly in the folder, sorted. The list may be empty."""
        with self._store_errors():
            self._system.invalidate_cache()
            if not self._system.isdir(self._inner):
                return []
            found = self._system.ls(self._inner, detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def open_to_read(self) -> IO[bytes]:
        """Return the object, open for reading and seeking."""
        with self._store_errors():
            if is_http(self._system):
                return open_http(self._system, self._inner)
            file: IO[bytes] = self._system.open(self._inner, "rb")
        return file

    def read_bytes(self) -> bytes:
        """Return the content of the object."""
        with self._store_errors():
            return bytes(self._system.cat_file(self._inner))

    def read_text(self) -> str:
        """Return the content of the object as text."""
        return self.read_bytes().decode()

    def read_range(self, start: int, end: int) -> bytes:
        """Return bytes [start, end) of the object."""
        with self._store_errors():
            return bytes(self._system.cat_file(self._inner, start=start, end=end))

    def write_bytes(self, data: bytes) -> None:
        """Create or replace the object. Readers see either the old object or the new object."""
        with self._store_errors():
            self._system.pipe_file(self._inner, data)

    def write_text(self, text: str) -> None:
        """Create or replace the object. Its content is `text`."""
        self.write_bytes(text.encode())

    def upload(self, path: str) -> None:
        """Create or replace the object. Its content is that of a file on this machine."""
        with self._store_errors():
            self._system.put_file(path, self._inner)

    @contextmanager
    def written(self, size: int) -> Iterator[IO[bytes]]:
        """Yield a file of `size` bytes for writing. It is sent in parts.

        The object appears when the block ends, unless the block raises.
        """
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        with self._store_errors():
            file = self._system.open(self._inner, "wb", block_size=part_bytes, autocommit=False)
        try:
            yield _InParts(self, file)  # type: ignore[misc]
            with self._store_errors():
                file.close()
                file.commit()
        except BaseException:
            with suppress(Exception):  # the store may be unreachable; an unfinished upload creates no object
                file.discard()
            with suppress(AttributeError):
                file.closed = True  # otherwise its finalizer would send the remaining data
            raise

    def make_folder(self) -> None:
        """Create the folder, if the store has folders."""
        with self._store_errors():
            self._system.makedirs(self._inner, exist_ok=True)

    def move(self, to: Address) -> None:
        """Rename the object by copying and deleting it. This is not atomic."""
        with self._store_errors():
            self._system.mv(self._inner, to._inner)

    def unlink(self) -> None:
        """Delete the object. Does nothing if it does not exist."""
        with suppress(FileNotFoundError), self._store_errors():
            self._system.rm_file(self._inner)

    def remove_tree(self) -> None:
        """Delete the object, and all objects below it. Does nothing if there are none."""
        with self._store_errors():
            self._system.invalidate_cache()
            if self._system.exists(self._inner):
                self._system.rm(self._inner, recursive=True)

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Convert exceptions that a store's package raises in the block to StoreError, except for FileNotFoundError."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) and _is_missing_object(error):
                raise
            raise StoreError(f"{self._text}: {_text_of(error)}", _hint_for(error)) from error


class _InParts:
    """A file that passes at most AHEAD_BYTES at a time to the underlying file, because that file copies them."""

    def __init__(self, address: Address, file: Any) -> None:
        self._address, self._file = address, file

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        for start in range(0, view.nbytes, AHEAD_BYTES):
            with self._address._store_errors():
                self._file.write(view[start : start + AHEAD_BYTES])
        return view.nbytes


Location = Path | Address


def location_of(text: str | os.PathLike[str] | Location) -> Location:
    """Return the location of a path or an address from a user. Raises ConfigError."""
    if isinstance(text, Address):
        return text
    path = os.fspath(text)
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", path) and isinstance(text, Path):
        raise ConfigError(
            "the address can't be used: pathlib.Path removes one of its slashes", where=path, hint="pass it as a string"
        )
    return address_or_path(path.removeprefix("file://"))


def address_or_path(location: str | Location) -> Location:
    """Return `location` itself, or the Path or Address for a string.

    Raises ConfigError for an address that can't be used.
    """
    if isinstance(location, str):
        return Path(location) if is_local(location) else Address(location)
    return location


def hint_of(error: OSError, default: str) -> str:
    """Return a hint about an error: the hint of a StoreError, or else `default`."""
    return error.hint if isinstance(error, StoreError) else default


def _is_missing_object(error: FileNotFoundError) -> bool:
    """Return False if the bucket or an upload does not exist, for which s3fs also raises FileNotFoundError."""
    answer = getattr(error.__cause__, "response", None)
    return not isinstance(answer, dict) or answer.get("Error", {}).get("Code") in ("NoSuchKey", "404")


def _text_of(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text or type(error).__name__


def _hint_for(error: Exception) -> str:
    kind = type(error).__name__  # compare names, because the class's package may not be installed
    if "Credential" in kind or "Token" in kind:
        return "provide credentials for the store, in the environment or where the store's package expects them"
    if isinstance(error, PermissionError):
        return "allow these credentials to read, write, list and delete there"
    if isinstance(error, FileNotFoundError):
        return "create the bucket first, or correct the address"
    return "check that the store can be reached from here; a run continues, and tries again at the next checkpoint"


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. Opening a FIFO, which is not a file of tensors, does not wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


class Ranges:
    """Reads ranges of a file. size: its size in bytes. Raises OSError.

    An object in a store is read some MiB ahead, because a request takes a long time, and the next range is usually read
    soon.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._first, self._ahead = 0, b""
        self.size = location.size() if isinstance(location, Address) else location.stat().st_size

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), or fewer bytes if the file ends earlier."""
        found = bytearray(max(0, min(length, self.size - start)))
        return bytes(found[: self.read_into(start, memoryview(found))])

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `start` on.

        Return the number of bytes, which is smaller at the end of the file.
        """
        if not isinstance(self._location, Address):
            with open(self._location, "rb", opener=_without_waiting) as file:
                file.seek(start)
                return file.readinto(buffer)
        position, end = start, min(start + buffer.nbytes, self.size)
        while position < end:
            offset = position - self._first
            if not 0 <= offset < len(self._ahead):
                self._first, offset = position, 0
                self._ahead = self._location.read_range(position, min(position + AHEAD_BYTES, self.size))
                if not self._ahead:
                    break
            part = self._ahead[offset : offset + end - position]
            buffer[position - start : position - start + len(part)] = part
            position += len(part)
        return position - start

    def rest(self) -> None:
        """Free the bytes that were read ahead. Call this if the reader will not be used for some time."""
        self._ahead = b""
