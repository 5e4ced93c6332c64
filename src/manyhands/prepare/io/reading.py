"""Reads a split of lines, JSON or Parquet. `csv_files` reads CSV.

A split is read as chunks with the location of each record (file and line, or file and row) for error messages.
Lines that can't be parsed are passed to `BadRecords`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import orjson

from manyhands.errors import DataError
from manyhands.prepare.io.compression import COMPRESSIONS
from manyhands.prepare.io.json_arrays import MARK, DamagedArray, with_arrays
from manyhands.prepare.io.listing import Split
from manyhands.prepare.records.chunks import CHUNK_BYTES, TABLE_CHUNK_BYTES, Chunk
from manyhands.prepare.records.columns import without_views
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.prepare.records.schemas import conformed, schema_from_text
from manyhands.prepare.records.unfit import Unfit
from manyhands.storage.files import open_to_read

# Numbers that may exceed 64 bits are found by translating each digit to "0" and all other bytes to spaces.
_ZEROS_FOR_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))

_LONG_NUMBER = b"0" * 19

_BOM = b"\xef\xbb\xbf"


def read_text(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read lines as text, without their line ends."""
    return _lines(split, bad, _text)


def read_json_lines(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read one JSON value from each line. Empty lines are skipped.

    columns: the keys to select. A key that an object lacks is None. A value that is not an object is a bad record.
    """
    return _lines(split, bad, _json if columns is None else partial(_json_columns, columns))


@contextmanager
def opened(split: Split) -> Iterator[IO[bytes]]:
    """Open the file of a split and decompress it. Errors of reading the file are raised as DataError."""
    try:
        with open_to_read(split.path) as raw:
            yield COMPRESSIONS[split.compression].reader(raw) if split.compression else raw
    except (OSError, EOFError, zlib.error) as error:
        if split.compression and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise DataError(
                f"a {split.compression} file is truncated or damaged: {error}",
                where=split.path,
                hint="download or copy the file again; it can't be skipped, because the number of lost records is "
                "unknown",
            ) from error
        raise DataError(f"a file can't be read: {error}", where=split.path) from error


def line_blocks(file: IO[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Yield the complete lines that start in bytes `start` to `end` of the file, about CHUNK_BYTES at a time."""
    position = start
    if start:
        # The line that contains the byte before `start` belongs to the previous split, even if it ends after `start`.
        file.seek(start - 1)
        position += len(file.readline()) - 1
    while end is None or position < end:
        data = file.read(CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - position))
        if not data:
            return
        if data[-1:] != b"\n":
            data += file.readline()
        yield data
        position += len(data)


def _lines(
    split: Split, bad: BadRecords, parse: Callable[..., tuple[list[Any], list[int] | None]]
) -> Iterator[SourcedChunk]:
    seen = 0
    with opened(split) as file:
        for data in line_blocks(file, split.start, split.end):
            if not seen and not split.start and data.startswith(_BOM):
                data = data[len(_BOM) :]
            lines = data.split(b"\n")
            if not lines[-1]:
                lines.pop()
            where = _LineLocator(split, seen)
            records, valid = parse(lines, where, bad)
            yield SourcedChunk(records, where if valid is None else _selected(where, valid))
            seen += len(lines)


class _LineLocator:
    """A function that returns the file and the line number of the i-th line of a block.

    It counts the lines before the split in each call, because few records ever need their line number.
    """

    def __init__(self, split: Split, before: int) -> None:
        self._split, self._before = split, before

    def __call__(self, index: int) -> str:
        number = self._before + 1 + index
        if self._split.start:
            with open_to_read(self._split.path) as file:
                for data in line_blocks(file, 0, self._split.start):
                    number += data.count(b"\n")
        return f"{self._split.path}, line {number}"


def _text(lines: list[bytes], where: Callable[[int], str], bad: BadRecords) -> tuple[list[Any], list[int] | None]:
    """Decode lines as text, without line ends.

    Return the texts, and the indices of the valid lines (None if all lines are valid).
    """
    try:
        texts = b"\n".join(lines).decode().split("\n") if lines else []
        return ([text.removesuffix("\r") for text in texts] if "\r" in "".join(texts) else texts), None
    except UnicodeDecodeError:
        return _each(lines, lambda line: line.decode().removesuffix("\r"), where, bad)


def _json(lines: list[bytes], where: Callable[[int], str], bad: BadRecords) -> tuple[list[Any], list[int] | None]:
    """Parse lines as JSON, skipping empty lines.

    Return the values and the indices of their lines, or None for all lines.
    """
    block = b"\n".join(lines)
    parse = _loads_with_arrays if MARK in block else _loads
    try:
        if parse is _loads and _LONG_NUMBER not in block.translate(_ZEROS_FOR_DIGITS):
            return list(map(orjson.loads, lines)), None
        return list(map(parse, lines)), None
    except ValueError:
        return _each(lines, parse, where, bad, skip_empty=True)


def _json_columns(
    columns: tuple[str, ...], lines: list[bytes], where: Callable[[int], str], bad: BadRecords
) -> tuple[list[Any], list[int]]:
    """Parse lines as JSON objects, retaining only these keys. Return the objects and the indices of their lines."""
    values, valid = _json(lines, where, bad)
    records, indices = [], []
    for index, value in zip(range(len(lines)) if valid is None else valid, values, strict=True):
        if isinstance(value, dict):
            records.append({name: value.get(name) for name in columns})
            indices.append(index)
        else:
            bad.add(where(index), "the line is not a JSON object, so it has no columns", value)
    return records, indices


def _loads(line: bytes) -> Any:
    """Parse a line of JSON. Raises ValueError."""
    try:
        if _LONG_NUMBER not in line.translate(_ZEROS_FOR_DIGITS):
            return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    # json accepts integers beyond 64 bits and NaN, and its errors contain the position.
    return json.loads(line.decode())


def _loads_with_arrays(line: bytes) -> Any:
    # Each line is looked at by itself, so that its value does not depend on the other lines of a block.
    return with_arrays(_loads(line)) if MARK in line else _loads(line)


def _each(
    lines: list[bytes],
    parse: Callable[[bytes], Any],
    where: Callable[[int], str],
    bad: BadRecords,
    *,
    skip_empty: bool = False,
) -> tuple[list[Any], list[int]]:
    """Parse each line. This is used after the fast path has failed for the block. Add the invalid lines to `bad`."""
    records, valid = [], []
    for index, line in enumerate(lines):
        if skip_empty and not line.strip():
            continue
        try:
            records.append(parse(line))
            valid.append(index)
        except UnicodeDecodeError as error:
            shown = line.decode(errors="backslashreplace")
            bad.add(where(index), f"the line is not UTF-8 text: {error.reason} at byte {error.start + 1}", shown, error)
        except ValueError as error:
            what = str(error) if isinstance(error, DamagedArray) else f"the line is not JSON: {error}"
            bad.add(where(index), what, line.decode(errors="backslashreplace"), error)
    return records, valid


def read_parquet(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the row groups of a split as tables. columns: the columns to read, or None for all columns.

    Raises DataError if the file can't be read or lacks a column that `columns` names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen = 0
    try:
        with open_to_read(split.path) as raw:
            reader = pq.ParquetFile(raw)
            groups = [reader.metadata.row_group(index) for index in split.row_groups]
            rows = sum(group.num_rows for group in groups)
            size = sum(group.total_byte_size for group in groups)
            batch_rows = max(1, min(65_536, rows * TABLE_CHUNK_BYTES // max(1, size)))
            before = sum(reader.metadata.row_group(index).num_rows for index in range(split.row_groups[0]))
            names = None if columns is None else list(columns)
            if names is not None:
                check_names(names, reader.schema_arrow.names, split.path)
            for batch in reader.iter_batches(batch_rows, list(split.row_groups), names, use_threads=False):
                first = before + seen + 1
                yield SourcedChunk(_table(batch, split, names), row_locator(split.path, first))
                seen += batch.num_rows
    except (pa.ArrowException, OSError, Unfit) as error:
        raise DataError(f"a Parquet file can't be read: {error}", where=split.path) from error
    except DataError as error:
        error.where = error.where or split.path
        raise


def check_names(names: list[str], known: list[str], path: str) -> None:
    """Raise DataError if a file lacks a column."""
    unknown = set(names).difference(known)
    if unknown:
        first = next(name for name in names if name in unknown)
        raise DataError(
            f"there is no column {first!r}", where=path, expected=f"one of {', '.join(known)}", got=repr(first)
        )


def _table(batch: Any, split: Split, names: list[str] | None) -> Chunk:
    """Return a batch of a Parquet file as a table, with the types that all files of the input share."""
    import pyarrow as pa

    return shared_types(pa.Table.from_batches([batch]).replace_schema_metadata(), split, names)


def shared_types(table: Any, split: Split, names: list[str] | None) -> Chunk:
    """Return a table with the types that all files of the input share. names: the columns that are read, or None."""
    import pyarrow as pa

    if split.schema is not None:
        shared = schema_from_text(split.schema)
        table = conformed(table, shared if names is None else pa.schema([shared.field(name) for name in names]))
    return without_views(table)


def _selected(where: Callable[[int], str], indices: list[int]) -> Callable[[int], str]:
    return lambda index: where(indices[index])


def row_locator(path: str, first: int) -> Callable[[int], str]:
    """Return a function that returns the location of the i-th row from row `first` on, which counts from 1."""
    return lambda index: f"{path}, row {first + index}"
