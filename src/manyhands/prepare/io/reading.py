"""Reads a split: lines, JSON, CSV, Parquet.

A split is read as chunks with the location of each record (file and line, or file and row) for error messages.
Lines and rows that can't be parsed are passed to `BadRecords`. CSV columns are text, exactly as in the file, unless
`types` specifies another type.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import count, islice
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from manyhands.errors import DataError
from manyhands.prepare.io.compression import COMPRESSIONS
from manyhands.prepare.io.listing import Split
from manyhands.prepare.records.chunks import CHUNK_BYTES, TABLE_CHUNK_BYTES, Chunk
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.storage.files import open_to_read

_BLOCK_BYTES = 2**24  # Arrow parses a CSV file in blocks of this size; a row may extend over at most two of them


def read_csv(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the rows of a CSV file as tables.

    Rows with too many or too few fields, or with a field that does not fit its type, are bad records. Raises DataError
    if the file can't be read or has no column that `types` names.
    """
    invalid: list[Any] = []  # rows that Arrow skipped in the block it parsed last

    def skip(row: Any) -> str:
        invalid.append(row)
        return "skip"

    try:
        with opened(split) as file:
            names = _column_names(split, types)
            reader = pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            numbers = _valid_row_numbers(invalid)
            for batch in reader:
                for row in invalid:
                    what = f"the row has {row.actual_columns} fields where {row.expected_columns} are expected"
                    bad.add(f"{split.path}, row {row.number}", what, row.text)
                rows = list(islice(numbers, batch.num_rows))
                table = pa.Table.from_batches([batch])
                step = max(1, len(rows) * CHUNK_BYTES // max(1, batch.nbytes))
                for start in range(0, len(rows), step):
                    part = table.slice(start, step)
                    yield _typed(part, rows[start : start + step], types, split.path, bad)
                invalid.clear()
    except pa.ArrowException as error:
        raise DataError(f"a CSV file can't be read: {error}", where=split.path) from error


def _column_names(split: Split, types: Mapping[str, str]) -> list[str]:
    """Read the header. Raises DataError if a column that `types` names does not exist."""
    with opened(split) as file:
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        names = next(csv.reader(text), [])
        text.detach()  # otherwise the wrapper would close the file, but `opened` closes it
    unknown = [name for name in types if name not in names]
    if unknown:
        raise DataError(f"there is no column {unknown[0]!r}", where=split.path, expected=f"one of {', '.join(names)}")
    return names


def _valid_row_numbers(invalid: list[Any]) -> Iterator[int]:
    """Yield the numbers of the valid rows (the header is row 1). The caller updates `invalid` for each block."""
    for number in count(2):
        if not any(row.number == number for row in invalid):
            yield number


def _typed(table: pa.Table, rows: list[int], types: Mapping[str, str], path: str, bad: BadRecords) -> SourcedChunk:
    """Convert columns to their types, and empty fields to null. Rows with a field that does not fit are bad records."""
    for name, type_name in types.items():
        kind = pa.type_for_alias(type_name)
        texts = table.column(name)
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        try:
            values = pc.cast(texts, kind)
        except pa.ArrowInvalid:
            values, valid = [], []
            for index, text in enumerate(texts):
                try:
                    values.append(text.cast(kind))
                    valid.append(index)
                except pa.ArrowInvalid as error:
                    row = table.slice(index, 1).to_pylist()[0]
                    bad.add(
                        f"{path}, row {rows[index]}", f"a field of {name!r} doesn't fit its type: {error}", str(row)
                    )
            table, rows = table.take(valid), [rows[index] for index in valid]
            values = pa.array([value.as_py() for value in values], kind)
        table = table.set_column(table.column_names.index(name), name, values)
    return SourcedChunk(table, lambda index: f"{path}, row {rows[index]}")


# To find numbers that may exceed 64 bits: translate each digit to "0" and all other bytes to spaces, then search.
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
    """Read one JSON value from each line. Empty lines are skipped."""
    return _lines(split, bad, _json)


@contextmanager
def opened(split: Split) -> Iterator[IO[bytes]]:
    """Open the file of a split and decompress it. Errors while reading it are raised as DataError."""
    try:
        with open_to_read(split.path) as raw:
            yield COMPRESSIONS[split.compression].reader(raw) if split.compression else raw
    except (OSError, EOFError, zlib.error) as error:
        if split.compression and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise DataError(
                f"a {split.compression} file is truncated or damaged: {error}",
                where=split.path,
                hint="download or copy the file again: it can't be skipped: the number of lost records is unknown",
            ) from error
        raise DataError(f"a file can't be read: {error}", where=split.path) from error


def line_blocks(file: IO[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Yield complete lines, about CHUNK_BYTES at a time: the lines that start in bytes `start` to `end` of the file."""
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
    """Returns the file and the line number of the i-th line of a block.

    The lines before the split are counted only in a call, because few records ever need their line number.
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
    """Decode lines as text, without line ends. Return the texts and the indices of the valid lines (None: all)."""
    try:
        texts = b"\n".join(lines).decode().split("\n") if lines else []
        return ([text.removesuffix("\r") for text in texts] if "\r" in "".join(texts) else texts), None
    except UnicodeDecodeError:
        return _each(lines, lambda line: line.decode().removesuffix("\r"), where, bad)


def _json(lines: list[bytes], where: Callable[[int], str], bad: BadRecords) -> tuple[list[Any], list[int] | None]:
    """Parse lines as JSON, skipping empty ones. Return the values and the indices of their lines (None: all)."""
    try:
        if _LONG_NUMBER in b"\n".join(lines).translate(_ZEROS_FOR_DIGITS):  # orjson would round them to floats
            return list(map(_loads, lines)), None
        return list(map(orjson.loads, lines)), None
    except ValueError:
        return _each(lines, _loads, where, bad, skip_empty=True)


def _loads(line: bytes) -> Any:
    """Parse a line of JSON. Raises ValueError."""
    try:
        if _LONG_NUMBER not in line.translate(_ZEROS_FOR_DIGITS):
            return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    return json.loads(line.decode())  # accepts integers beyond 64 bits and NaN; its errors contain the position


def _each(
    lines: list[bytes],
    parse: Callable[[bytes], Any],
    where: Callable[[int], str],
    bad: BadRecords,
    *,
    skip_empty: bool = False,
) -> tuple[list[Any], list[int]]:
    """Parse each line after the fast path has failed for the block. Add the invalid lines to `bad`."""
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
            bad.add(where(index), f"the line is not JSON: {error}", line.decode(errors="backslashreplace"), error)
    return records, valid


def read_parquet(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the row groups of a split as tables. columns: the columns to read (None: all).

    Raises DataError if the file can't be read or has no column that `columns` names.
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
            if names is not None and (unknown := [name for name in names if name not in reader.schema_arrow.names]):
                raise DataError(
                    f"there is no column {unknown[0]!r}",
                    where=split.path,
                    expected=f"one of {', '.join(reader.schema_arrow.names)}",
                    got=repr(unknown[0]),
                )
            for batch in reader.iter_batches(batch_rows, list(split.row_groups), names, use_threads=False):
                chunk: Chunk = pa.Table.from_batches([batch]).replace_schema_metadata()
                first = before + seen + 1
                yield SourcedChunk(chunk, _row_locator(split.path, first))
                seen += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a Parquet file can't be read: {error}", where=split.path) from error


def _selected(where: Callable[[int], str], indices: list[int]) -> Callable[[int], str]:
    return lambda index: where(indices[index])


def _row_locator(path: str, first: int) -> Callable[[int], str]:
    return lambda index: f"{path}, row {first + index}"
