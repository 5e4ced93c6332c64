"""A zarr store for reading only, over paths and fsspec addresses. Import this module only where zarr is needed.

Only "not found" means that a chunk was never written. Any other error ends the reading, with the chunk's key.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from manyhands.errors import DataError
from manyhands.storage.files import join_path, names_in, open_to_read
from manyhands.storage.location import hint_of, is_local
from manyhands.storage.untrusted import open_inside

METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")


class ReadingStore(Store):  # type: ignore[misc]
    """Reads the files below a folder.

    absent: the keys of chunks that were requested and do not exist. with_blosc: the names of arrays whose chunks are
    compressed by blosc, which reads beyond the end of a truncated chunk instead of raising an error.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: str) -> None:
        super().__init__(read_only=True)
        self._root = root
        self.absent: set[str] = set()
        self.with_blosc: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadingStore) and self._root == other._root

    def __str__(self) -> str:
        return self._root

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash(self._root)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        from zarr.core.buffer import default_buffer_prototype

        data = self.read(key, byte_range)
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    def read(self, key: str, byte_range: Any = None) -> bytes | None:
        """Return the content of a file, or of a range of it, or None if the file does not exist."""
        path = join_path(self._root, key)
        try:
            with open_file(self._root, key) as file:
                data = file.read() if byte_range is None else _read_range(file, byte_range)
        except (FileNotFoundError, NotADirectoryError):
            if is_local(path) and os.path.islink(path):
                hint = "a link to a missing file is not a chunk that was never written; restore the file"
                raise DataError("a file of a zarr store can't be read: broken link", where=path, hint=hint) from None
            if key.rpartition("/")[2] not in METADATA:
                self.absent.add(key)
            return None
        except OSError as error:
            raise DataError(
                f"a file of a zarr store can't be read: {error}",
                where=path,
                hint=hint_of(error, "make the file readable; only a file that doesn't exist is a chunk without values"),
            ) from error
        if byte_range is None and key.partition("/")[0] in self.with_blosc and key.rpartition("/")[2] not in METADATA:
            expected = int.from_bytes(data[12:16], "little")  # in blosc's header
            if len(data) != expected:
                raise DataError(
                    "a chunk of a zarr store is truncated",
                    where=path,
                    expected=f"{expected} bytes",
                    got=f"{len(data)} bytes",
                    hint="restore the file from a copy of the store",
                )
        return data

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return self.read(key) is not None

    async def set(self, key: str, value: Any) -> None:
        raise PermissionError("the store is opened for reading")

    async def delete(self, key: str) -> None:
        raise PermissionError("the store is opened for reading")

    def list(self) -> AsyncIterator[str]:
        return self.list_dir("")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self.list_dir(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in names_in(join_path(self._root, prefix)):
            yield name


def open_file(root: str, key: str) -> IO[bytes]:
    """Open a file of a store. On a disk, it must be a regular file inside the folder, also behind links."""
    return open_inside(Path(root), key) if is_local(root) else open_to_read(join_path(root, key))


def _read_range(file: IO[bytes], byte_range: Any) -> bytes:
    if isinstance(byte_range, SuffixByteRequest):
        end = file.seek(0, 2)
        file.seek(max(0, end - byte_range.suffix))
        return file.read()
    if isinstance(byte_range, OffsetByteRequest):
        file.seek(byte_range.offset)
        return file.read()
    if not isinstance(byte_range, RangeByteRequest):
        raise TypeError(f"an unknown kind of range: {byte_range!r}")
    file.seek(byte_range.start)
    return file.read(byte_range.end - byte_range.start)
