"""Reads a split: lines, JSON, CSV, Parquet.

Reads CSV files: every column is text, as it stands there, unless `types` says otherwise.

Reads a split: lines of text, JSON lines, rows of Parquet and CSV files, as pieces that know where they are from.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import BufferedReader, TextIOWrapper
from itertools import count, islice
from typing import IO, Any, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from manyhands.errors import DataError
from manyhands.prepare.io.listing import Split
from manyhands.prepare.records.chunks import CHUNK_BYTES, TABLE_CHUNK_BYTES, Chunk
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.storage.files import open_to_read

_BLOCK_BYTES = 2**24  # that are parsed at once: a row must lie in two of them


def read_csv(
    split: Split,
    bad: BadRecords,
    types: Mapping[str, str],
    opened: Callable[[Split], AbstractContextManager[IO[bytes]]],
) -> Iterator[SourcedChunk]:
    """The rows of a file, as tables. Rows with too many or too few fields, or that `types` don't fit, are set aside."""
    wrong: list[Any] = []

    def put_aside(row: Any) -> str:
        wrong.append(row)
        return "skip"

    try:
        with opened(split) as file:
            names = _names(split, types, opened)
            reader = pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=put_aside),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            numbers = _numbers(wrong)
            for batch in reader:
                for row in wrong:
                    what = f"the row has {row.actual_columns} fields where {row.expected_columns} are expected"
                    bad.add(f"{split.path}, row {row.number}", what, row.text)
                rows = list(islice(numbers, batch.num_rows))
                table, step = pa.Table.from_batches([batch]), max(1, len(rows) * CHUNK_BYTES // max(1, batch.nbytes))
                for start in range(0, len(rows), step):
                    part = table.slice(start, step)
                    yield _typed(part, rows[start : start + step], types, split.path, bad)
                wrong.clear()
    except pa.ArrowException as error:
        raise DataError(f"a CSV file can't be read: {error}", where=split.path) from error


def _names(
    split: Split, types: Mapping[str, str], opened: Callable[[Split], AbstractContextManager[IO[bytes]]]
) -> list[str]:
    with opened(split) as file:
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        names = next(csv.reader(text), [])
        text.detach()  # the file is closed by who opened it
    unknown = [name for name in types if name not in names]
    if unknown:
        raise DataError(f"there is no column {unknown[0]!r}", where=split.path, expected=f"one of {', '.join(names)}")
    return names


def _numbers(wrong: list[Any]) -> Iterator[int]:
    """The numbers of the rows that are read (the header is row 1): all but those that are set aside."""
    for number in count(2):
        if not any(row.number == number for row in wrong):
            yield number


def _typed(table: pa.Table, rows: list[int], types: Mapping[str, str], path: str, bad: BadRecords) -> SourcedChunk:
    """Columns as `types` say, an empty field as null; rows that don't fit are set aside."""
    for name, type_name in types.items():
        kind = pa.type_for_alias(type_name)
        texts = table.column(name)
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        try:
            values = pc.cast(texts, kind)
        except pa.ArrowInvalid:
            values, kept = [], []
            for index, text in enumerate(texts):
                try:
                    values.append(text.cast(kind))
                    kept.append(index)
                except pa.ArrowInvalid as error:
                    row = table.slice(index, 1).to_pylist()[0]
                    bad.add(
                        f"{path}, row {rows[index]}", f"a field of {name!r} doesn't fit its type: {error}", str(row)
                    )
            table, rows = table.take(kept), [rows[index] for index in kept]
            values = pa.array([value.as_py() for value in values], kind)
        table = table.set_column(table.column_names.index(name), name, values)
    return SourcedChunk(table, lambda index: f"{path}, row {rows[index]}")


_LONG, _DIGITS = b"0" * 19, bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))  # digits, all as zeros

_BOM = b"\xef\xbb\xbf"


def read_split(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """The records of a split. Those that can't be read are set aside. Raises DataError for a file that breaks off."""
    if split.format == "parquet":
        return _parquet(split, columns)
    if split.format == "csv":
        return read_csv(split, bad, types, opened)
    return _lines(split, bad, _text if split.format == "text" else _json)


@contextmanager
def opened(split: Split) -> Iterator[IO[bytes]]:
    """The split's file, decompressed. Errors of reading it become DataError."""
    try:
        with open_to_read(split.path) as raw:
            if split.compression == "gzip":
                yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
            elif split.compression == "zstd":
                import pyarrow as pa

                yield BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        broken = split.compression and not isinstance(error, (FileNotFoundError, PermissionError))
        raise DataError(
            f"a {split.compression} file is broken off or damaged: {error}"
            if broken
            else f"a file can't be read: {error}",
            where=split.path,
            hint="get the file again: an unknown number of records is missing, so it can't be skipped"
            if broken
            else None,
        ) from error


def line_blocks(file: IO[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Whole lines, about a chunk at a time: those that begin in bytes `start` to `end` of the file."""
    position = start
    if start:
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
            place = _Place(split, seen)
            records, kept = parse(lines, place, bad)
            yield SourcedChunk(records, place if kept is None else _chosen(place, kept))
            seen += len(lines)


class _Place:
    """File and line of the i-th line of a block. The lines before the split are counted only when that is asked."""

    def __init__(self, split: Split, before: int) -> None:
        self._split, self._before = split, before

    def __call__(self, index: int) -> str:
        before = self._before + 1 + index
        if self._split.start:
            with open_to_read(self._split.path) as file:
                for data in line_blocks(file, 0, self._split.start):
                    before += data.count(b"\n")
        return f"{self._split.path}, line {before}"


def _text(lines: list[bytes], place: Callable[[int], str], bad: BadRecords) -> tuple[list[Any], list[int] | None]:
    """Lines as text, without their ends; and which lines they are, if not all."""
    try:
        texts = b"\n".join(lines).decode().split("\n") if lines else []
        return ([text.removesuffix("\r") for text in texts] if "\r" in "".join(texts) else texts), None
    except UnicodeDecodeError:
        return _each(lines, lambda line: line.decode().removesuffix("\r"), place, bad)


def _json(lines: list[bytes], place: Callable[[int], str], bad: BadRecords) -> tuple[list[Any], list[int] | None]:
    """Lines as JSON values; empty lines are none."""
    try:
        if _LONG in b"\n".join(lines).translate(_DIGITS):  # orjson makes floats of numbers beyond 64 bits
            return list(map(_loads, lines)), None
        return list(map(orjson.loads, lines)), None
    except ValueError:
        return _each(lines, _loads, place, bad, skip_empty=True)


def _loads(line: bytes) -> Any:
    try:
        if _LONG not in line.translate(_DIGITS):
            return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    return json.loads(line.decode())  # whole numbers beyond 64 bits, NaN; or an error that says where


def _each(
    lines: list[bytes],
    parse: Callable[[bytes], Any],
    place: Callable[[int], str],
    bad: BadRecords,
    *,
    skip_empty: bool = False,
) -> tuple[list[Any], list[int]]:
    records, kept = [], []
    for index, line in enumerate(lines):
        if skip_empty and not line.strip():
            continue
        try:
            records.append(parse(line))
            kept.append(index)
        except UnicodeDecodeError as error:
            shown = line.decode(errors="backslashreplace")
            bad.add(place(index), f"the line is not UTF-8 text: {error.reason} at byte {error.start + 1}", shown, error)
        except ValueError as error:
            bad.add(place(index), f"the line is not JSON: {error}", line.decode(errors="backslashreplace"), error)
    return records, kept


def _parquet(split: Split, columns: tuple[str, ...] | None) -> Iterator[SourcedChunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen = 0
    try:
        with open_to_read(split.path) as raw:
            reader = pq.ParquetFile(raw)
            groups = [reader.metadata.row_group(index) for index in split.row_groups]
            rows = sum(group.num_rows for group in groups)
            size = sum(group.total_byte_size for group in groups)
            batch = max(1, min(65_536, rows * TABLE_CHUNK_BYTES // max(1, size)))
            before = sum(reader.metadata.row_group(index).num_rows for index in range(split.row_groups[0]))
            wanted = None if columns is None else list(columns)
            if wanted is not None and (unknown := [name for name in wanted if name not in reader.schema_arrow.names]):
                raise DataError(
                    f"there is no column {unknown[0]!r}",
                    where=split.path,
                    expected=f"one of {', '.join(reader.schema_arrow.names)}",
                    got=repr(unknown[0]),
                )
            batches = reader.iter_batches(batch, list(split.row_groups), wanted, use_threads=False)
            for one in batches:
                chunk: Chunk = pa.Table.from_batches([one]).replace_schema_metadata()
                first = before + seen + 1
                yield SourcedChunk(chunk, _row(split.path, first))
                seen += one.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a Parquet file can't be read: {error}", where=split.path) from error


def _chosen(place: Callable[[int], str], kept: list[int]) -> Callable[[int], str]:
    return lambda index: place(kept[index])


def _row(path: str, first: int) -> Callable[[int], str]:
    return lambda index: f"{path}, row {first + index}"
