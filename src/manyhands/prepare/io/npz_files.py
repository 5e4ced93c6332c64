"""Reads NumPy's npz files as tables. The first axis of the arrays is the records. Never reads pickles."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from manyhands.errors import DataError
from manyhands.prepare.io.array_files import row_ranges, row_splits
from manyhands.prepare.io.listing import InputFile, Split
from manyhands.prepare.io.reading import check_names, row_locator, shared_types
from manyhands.prepare.records.array_columns import element_type, table_of_stacks
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.storage.files import open_to_read

_SUFFIX = ".npy"


class _Member(NamedTuple):
    """An array of an npz file. offset: where its elements start in its member of the archive."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int
    is_compressed: bool

    @property
    def row_bytes(self) -> int:
        """Return the size of a record's part of the array."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@contextmanager
def _opened(path: str) -> Iterator[tuple[zipfile.ZipFile, list[_Member]]]:
    """Open an npz file. Raises DataError if it is damaged, or if its arrays can't be the columns of records."""
    try:
        with open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            members = [_member(archive, info) for info in archive.infolist()]
            rows = {member.shape[0] for member in members}
            if len(rows) != 1 or len({member.name for member in members}) < len(members):
                shapes = ", ".join(f"{member.name}: {list(member.shape)}" for member in members)
                raise _invalid(path, "its arrays have different numbers of records, or one name", shapes or "no arrays")
            yield archive, members
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise _invalid(path, f"it is truncated or damaged: {error}", None) from error
    except OSError as error:
        raise DataError(f"a file can't be read: {error}", where=path) from error
    except ValueError as error:
        raise _invalid(path, str(error), None) from error


def _invalid(path: str, why: str, got: str | None) -> DataError:
    return DataError(
        f"an npz file can't be read as records: {why}",
        where=path,
        expected="arrays of numbers, booleans or times, with the same length of the first axis, the records",
        got=got,
        hint="write the arrays again with numpy.savez, one row for each record, without objects",
    )


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Read the header of an array. Raises ValueError if it can't be a column."""
    name = info.filename.removesuffix(_SUFFIX)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        offset = file.tell()
    if not shape:
        raise ValueError(f"array {name!r} has no dimensions, so it has no records")
    if dtype.kind not in "US" or len(shape) > 1:
        try:
            element_type(dtype)
        except ValueError as error:
            raise ValueError(f"array {name!r}: {error}") from error
    if info.file_size - offset != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"array {name!r} has {info.file_size - offset} bytes, and not those of its shape {list(shape)}"
        )
    is_compressed = info.compress_type != zipfile.ZIP_STORED
    return _Member(name, dtype, tuple(shape), is_fortran and len(shape) > 1, offset, is_compressed)


def split_npz(file: InputFile, form: str, compression: str | None, partition_bytes: int) -> tuple[list[Split], Any]:
    """Divide an npz file into ranges of records. A file with compressed arrays or Fortran order is one split.

    Return the splits, whose `start` and `end` are records, and the schema.
    """
    with _opened(file.path) as (archive, members):
        size = sum(member.row_bytes for member in members) * members[0].shape[0]
        is_whole = any(member.is_compressed or member.is_fortran for member in members)
        schema = _Rows(archive, members).table(0, min(1, members[0].shape[0])).schema
        splits = row_splits(file, form, members[0].shape[0], size, size + 1 if is_whole else partition_bytes)
        return splits, schema


def read_npz(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read a range of records as tables. Raises DataError if the file can't be read or lacks a column."""
    names = None if columns is None else list(columns)
    with _opened(split.path) as (archive, members):
        if names is not None:
            check_names(names, [member.name for member in members], split.path)
            members = [next(member for member in members if member.name == name) for name in names]
        rows = _Rows(archive, members)
        for start, stop in row_ranges(split.start, split.end, sum(member.row_bytes for member in members)):
            yield SourcedChunk(shared_types(rows.table(start, stop), split, names), row_locator(split.path, start + 1))


def npz_tables(path: str) -> Iterator[pa.Table]:
    """Yield the records of an npz file as tables."""
    with _opened(path) as (archive, members):
        rows = _Rows(archive, members)
        for start, stop in row_ranges(0, members[0].shape[0], sum(member.row_bytes for member in members)):
            yield rows.table(start, stop)


class _Rows:
    """Reads ranges of records in ascending order. Each array is read by its own file object, so compressed arrays are
    decompressed once. An array in Fortran order is held in memory.
    """

    def __init__(self, archive: zipfile.ZipFile, members: list[_Member]) -> None:
        self._archive, self._members = archive, members
        self._files: dict[str, IO[bytes]] = {}
        self._held: dict[str, Any] = {}

    def table(self, start: int, stop: int) -> pa.Table:
        """Return records [start, stop)."""
        return table_of_stacks({member.name: self._read(member, start, stop) for member in self._members})

    def _read(self, member: _Member, start: int, stop: int) -> Any:
        file = self._files.get(member.name)
        if file is None:
            file = self._files[member.name] = self._archive.open(member.name + _SUFFIX)
        if member.is_fortran:
            if member.name not in self._held:
                file.seek(member.offset)
                whole = np.frombuffer(_complete(file, math.prod(member.shape) * member.dtype.itemsize), member.dtype)
                self._held[member.name] = whole.reshape(member.shape[::-1]).T
            found = self._held[member.name][start:stop]
        else:
            file.seek(member.offset + start * member.row_bytes)
            data = _complete(file, (stop - start) * member.row_bytes)
            found = np.frombuffer(data, member.dtype).reshape(stop - start, *member.shape[1:])
        return np.ascontiguousarray(found, member.dtype.newbyteorder("="))


def _complete(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data
