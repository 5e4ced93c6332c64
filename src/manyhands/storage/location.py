"""A folder or an fsspec address: list, read ranges, write.

Addresses such as s3://bucket/folder: whether something is one, and the fsspec file system behind it.

Where checkpoints are: a folder of this machine, or an address that fsspec knows (s3://bucket/folder).
`Address` has the words of pathlib's `Path` that checkpoints need, so most of what reads and writes them needn't know
which of the two it has. An object store lacks renaming, but shows an object when its last byte has arrived.

Ranges of a file's bytes, wherever it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from manyhands.errors import ConfigError


def is_local(path: str) -> bool:
    """A path of this machine's file system, not an address such as s3://bucket/key."""
    return "://" not in path


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Raises ConfigError for one that it can't have."""
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
"""Read at once, and written at once: what of an object is in memory."""

_PART_BYTES, _MOST_PARTS = 32 << 20, 9_000  # stores allow 10,000 parts of an upload


class StoreError(OSError):
    """What a store said, as an OSError whatever fsspec's package for it raises. hint: what to do."""

    def __init__(self, words: str, hint: str) -> None:
        super().__init__(words)
        self.hint = hint


class Address:
    """A folder or an object of a store, by its address. Raises ConfigError if fsspec doesn't know it; what it does
    raises OSError, with a hint where the store itself is the matter."""

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
        """The last part."""
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The folder that it is in."""
        return Address(self._text.rpartition("/")[0])

    def absolute(self) -> Address:
        """Itself."""
        return self

    def is_dir(self) -> bool:
        """Whether there is anything below it."""
        return bool(self.files())

    def exists(self) -> bool:
        """Whether there is an object of that name, or anything below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of that name."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        """Of the object, in bytes."""
        with self._told():
            self._system.invalidate_cache()
            info = self._system.info(self._inner)
        if info["type"] != "file":
            raise FileNotFoundError(self._text)
        return int(info["size"])

    def files(self) -> list[str]:
        """The names of all objects below it, as `folder/name`, sorted; none if there is nothing."""
        with self._told():
            self._system.invalidate_cache()  # others write there, too
            found = self._system.find(self._inner)
        first = len(self._inner.rstrip("/")) + 1
        return sorted(path[first:] for path in found if path[first:])

    def read_bytes(self) -> bytes:
        """All of an object."""
        with self._told():
            return bytes(self._system.cat_file(self._inner))

    def read_text(self) -> str:
        """All of an object, as text."""
        return self.read_bytes().decode()

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object."""
        with self._told():
            return bytes(self._system.cat_file(self._inner, start=start, end=end))

    def write_text(self, text: str) -> None:
        """Make an object of it, in place of what is there: readers see the old one or the new one."""
        with self._told():
            self._system.pipe_file(self._inner, text.encode())

    @contextmanager
    def written(self, size: int) -> Iterator[IO[bytes]]:
        """A file of `size` bytes to write, sent in parts: the object is there when the block ends, and isn't if the
        block raises."""
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        with self._told():
            file = self._system.open(self._inner, "wb", block_size=part_bytes, autocommit=False)
        try:
            yield _InParts(self, file)  # type: ignore[misc]
            with self._told():
                file.close()
                file.commit()
        except BaseException:
            with suppress(Exception):  # the store may be gone: what it has of the upload is no object
                file.discard()
            with suppress(AttributeError):
                file.closed = True  # or its end would send the rest
            raise

    def unlink(self) -> None:
        """Delete an object; that it is gone already is no error."""
        with suppress(FileNotFoundError), self._told():
            self._system.rm_file(self._inner)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a package for a store raises, as an OSError."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) and error.__cause__ is None:
                raise  # there is no such object, and nothing else is wrong
            raise StoreError(f"{self._text}: {_words_of(error)}", _hint_for(error)) from error


class _InParts:
    """Hands on what is written, some MiB at a time: the file below copies what it's given."""

    def __init__(self, address: Address, file: Any) -> None:
        self._address, self._file = address, file

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        for start in range(0, view.nbytes, AHEAD_BYTES):
            with self._address._told():
                self._file.write(view[start : start + AHEAD_BYTES])
        return view.nbytes


Location = Path | Address


def location_of(text: str | os.PathLike[str] | Location) -> Location:
    """What a user calls a folder or an address. Raises ConfigError."""
    if isinstance(text, Address):
        return text
    said = os.fspath(text)
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", said) and isinstance(text, Path):
        raise ConfigError(
            "the address can't be used: pathlib.Path takes a slash out of it", where=said, hint="give it as a text"
        )
    return Path(said.removeprefix("file://")) if is_local(said.removeprefix("file://")) else Address(said)


@contextmanager
def written(place: Location, size: int) -> Iterator[IO[bytes]]:
    """A file of `size` bytes to write; when the block ends it is there for good."""
    if isinstance(place, Address):
        with place.written(size) as file:
            yield file
        return
    with place.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def put_text(place: Location, text: str) -> None:
    """A file that is there with all of its text, or not at all."""
    if isinstance(place, Address):
        return place.write_text(text)
    hidden = place.with_name(f".{place.name}")
    hidden.write_text(text)
    os.rename(hidden, place)
    return None


def names_in(folder: Location) -> set[str]:
    """Of the files in a folder."""
    return set(folder.files()) if isinstance(folder, Address) else {path.name for path in folder.iterdir()}


def hint_of(error: OSError, otherwise: str) -> str:
    """What to do about it: what the store's error says, or else `otherwise`."""
    return error.hint if isinstance(error, StoreError) else otherwise


def _words_of(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error)
    return words or type(error).__name__


def _hint_for(error: Exception) -> str:
    kind = type(error).__name__  # of packages that may not be installed
    if "Credential" in kind or "Token" in kind:
        return "give this machine credentials for the store, in the environment or where its package looks for them"
    if isinstance(error, PermissionError):
        return "let these credentials read, write, list and delete there"
    if isinstance(error, FileNotFoundError):
        return "make the bucket first, or mend the address"
    return "see whether the store can be reached from here; a run goes on, and tries again with the next checkpoint"


class Ranges:
    """Reads ranges of a file. size: its bytes. Of one in a store it reads some MiB ahead, since a request takes long
    and what follows is mostly wanted next. Raises OSError."""

    def __init__(self, place: Location) -> None:
        self._place = place
        self._first, self._ahead = 0, b""
        self.size = place.size() if isinstance(place, Address) else place.stat().st_size

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length): fewer if the file ends before."""
        found = bytearray(max(0, min(length, self.size - start)))
        return bytes(found[: self.read_into(start, memoryview(found))])

    def read_into(self, start: int, wanted: memoryview) -> int:
        """Fill `wanted` with the bytes from `start` on; how many there were."""
        if not isinstance(self._place, Address):
            with self._place.open("rb") as file:
                file.seek(start)
                return file.readinto(wanted)
        position, end = start, min(start + wanted.nbytes, self.size)
        while position < end:
            offset = position - self._first
            if not 0 <= offset < len(self._ahead):
                self._first, offset = position, 0
                self._ahead = self._place.read_range(position, min(position + AHEAD_BYTES, self.size))
                if not self._ahead:
                    break
            part = self._ahead[offset : offset + end - position]
            wanted[position - start : position - start + len(part)] = part
            position += len(part)
        return position - start

    def rest(self) -> None:
        """Something else is read for now: what was read ahead is forgotten."""
        self._ahead = b""
