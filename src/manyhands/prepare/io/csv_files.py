"""Reads CSV files as tables. Each invalid row is a bad record with its line.

Columns are text, exactly as in the file, unless `types` specifies another type. The header is the first line that isn't
empty. Files that are read together must have the same columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from manyhands.errors import DataError, InvariantError
from manyhands.prepare.io.csv_rows import (
    BlockReader,
    RowBlock,
    count_lines,
    field_text,
    row_blocks,
    scan_row,
)
from manyhands.prepare.io.listing import InputFile, Split, undivided
from manyhands.prepare.io.reading import opened
from manyhands.prepare.records.chunks import CHUNK_BYTES
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk

_BLOCK_BYTES = 2**24  # rows are parsed in blocks of this size; a row may extend over at most two of them

_SMALL_BYTES = 2**13

_HEADER_BYTES = 2**16  # the bytes that are read to find the header when a job is planned

_BOM = b"\xef\xbb\xbf"

_EMPTY_LINES = re.compile(rb"[\r\n]*")


_OTHER_DELIMITERS = re.compile(rb"[;\t|]")


class Header(NamedTuple):
    """The header of a CSV file: the names of its columns, and the bytes and lines up to the first row.

    An empty file has no names.
    """

    names: tuple[str, ...]
    size_bytes: int
    lines: int


class _Wrong(NamedTuple):
    """A row that is set aside: its line, the reason, and its text."""

    line: int
    what: str
    text: str


class _Rows(NamedTuple):
    """The rows of a block as a table of text, the line of each row, and the rows that aren't in the table."""

    table: pa.Table
    lines: Any  # [rows] int64
    wrong: list[_Wrong]


def split_csv(
    file: InputFile, form: str, compression: str | None, partition_bytes: int
) -> tuple[list[Split], tuple[str, ...] | None]:
    """Return one split for the complete file, and the names of its columns, or None if the file is empty.

    A quoted field may contain line ends, so rows can't be found from the middle of a file.
    """
    splits, _ = undivided(file, form, compression, partition_bytes)
    for split in splits:
        with opened(split) as stream:
            return splits, _read_header(stream, split.path).names or None
    return splits, None


def _read_header(file: IO[bytes], path: str) -> Header:
    """Read the header of a CSV file, and little more. Raises DataError if it is invalid, or longer than a block."""
    reader = BlockReader(file, _HEADER_BYTES)
    parts: list[bytes] = []
    # The number of parts that have been searched, which doubles, so that all searches together take linear time.
    tried = 0
    while True:
        part, final = reader.read()
        parts.append(part)
        if final or len(parts) >= 2 * tried:
            header = _header(b"".join(parts), path, final=final)
            if header is not None:
                return header
            tried = len(parts)
            if tried * _HEADER_BYTES >= _BLOCK_BYTES:
                raise _header_too_long(path)


def _header_too_long(path: str) -> DataError:
    return DataError("the header of a CSV file is too long", where=path, expected=f"at most {_BLOCK_BYTES} bytes")


def check_same_names(first: tuple[str, tuple[str, ...]], path: str, names: tuple[str, ...]) -> None:
    """Raise DataError if a CSV file has different columns than the first file. first: the path and names of the first
    file.
    """
    if set(names) != set(first[1]):
        raise DataError(
            "a CSV file has different columns than the first one",
            where=path,
            expected=f"{', '.join(first[1])} (as in {first[0]})",
            got=", ".join(names),
            hint="correct the header, or read the files separately, because files that are read together need the "
            "same columns",
        )


def is_csv_type(name: str) -> bool:
    """Return True if CSV fields can have the type with this name."""
    try:
        _cast(pa.chunked_array([[""]]), pa.type_for_alias(name))
    except (pa.ArrowException, ValueError, TypeError):
        return False
    return True


def read_csv(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the rows of a CSV file as tables.

    Bad records are rows with too many or too few fields, with text after a closing quote, with bytes that are not
    UTF-8, or with a field that does not fit its type. Raises DataError if the file can't be read, if its header is
    wrong or lacks a column that `columns` or `types` names, or if a quote isn't closed.
    """
    with opened(split) as file:
        reader = BlockReader(file, _BLOCK_BYTES)
        data, final = reader.read()
        header = _header(data, split.path, final=final)
        if header is None:
            raise _header_too_long(split.path)
        if not header.names:
            return
        for name in (*types, *(columns or ())):
            if name not in header.names:
                expected = f"one of {', '.join(header.names)}"
                raise DataError(f"there is no column {name!r}", where=split.path, expected=expected, got=repr(name))
        kinds = {name: pa.type_for_alias(kind) for name, kind in types.items() if columns is None or name in columns}
        for block in row_blocks(data[header.size_bytes :], reader, 1 + header.lines, split.path, final=final):
            yield from _chunks(_parsed(block, header.names, columns, split.path), kinds, split.path, bad)


def _header(data: bytes, path: str, *, final: bool) -> Header | None:
    """Parse the header, or return None if more data is needed. final: True if `data` is the complete file.

    Raises DataError if the header is invalid.
    """
    start = len(_BOM) if data.startswith(_BOM) else 0
    plain = _plain_header(data[: data.find(b"\n", 0, _SMALL_BYTES) + 1])
    if plain is not None:
        return plain
    empty = _EMPTY_LINES.match(data, start)
    first = start if empty is None else empty.end()
    if first == len(data):
        return Header((), first, count_lines(data)) if final else None
    row = scan_row(data, first, final=final)
    if row.end is None and not final:
        return None
    raw = [data[begin:end] for begin, end in row.fields]
    wrong, hint = _wrong_names(raw)
    if row.quote is not None:
        wrong, hint = "a quote is not closed, or text follows it", "double each quote inside a quoted field"
    if wrong is not None or row.end is None:
        raise DataError(
            f"the header of a CSV file can't be used: {wrong}",
            where=f"{path}, line {1 + count_lines(data, 0, first)}",
            got=data[first : row.end][:200].decode(errors="backslashreplace").rstrip(),
            hint=hint,
        )
    names = tuple(field_text(data, field).decode() for field in row.fields)
    return Header(names, row.end, count_lines(data, 0, row.end))


@lru_cache(maxsize=16)
def _plain_header(line: bytes) -> Header | None:
    """Parse a simple header: one valid line of ASCII without quotes. Return None for any other header.

    The result is cached, because files that are read together usually have the same header.
    """
    if not line.isascii() or line[:1] in (b"\r", b"\n", b"") or b'"' in line or b"\r" in line.removesuffix(b"\r\n"):
        return None
    fields = line.rstrip(b"\r\n").split(b",")
    return None if _wrong_names(fields)[0] else Header(tuple(field.decode() for field in fields), len(line), 1)


def _wrong_names(raw: list[bytes]) -> tuple[str | None, str | None]:
    """Return what is wrong with the fields of a header, and what to do, or (None, None) if the header is valid."""
    try:
        names = [field_text(field, (0, len(field))).decode() for field in raw]
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason})", "convert the file: iconv -f LATIN1 -t UTF-8, for example"
    if any("\0" in name for name in names):
        return "it contains NUL bytes", "convert the file: iconv -f UTF-16 -t UTF-8, for example"
    twice = [name for index, name in enumerate(names) if name in names[:index]] if len(set(names)) < len(names) else []
    if twice:
        return f"it has two columns named {twice[0]!r}", "rename one of them: a record has one value of each name"
    if len(raw) == 1 and not raw[0].startswith(b'"') and _OTHER_DELIMITERS.search(raw[0]):
        return (
            "the columns are not divided by commas",
            "write the file with commas; or quote the name, if it is the name of a single column",
        )
    return None, None


def _small_table(data: bytes, names: tuple[str, ...], columns: tuple[str, ...] | None) -> pa.Table | None:
    """Parse a small block, for which Arrow's parser takes longer to start than to parse. data: UTF-8 text.

    Returns None if the block is not small, or if it has a quote, a carriage return, an empty line, or a row with a
    wrong number of fields.
    """
    if not 0 < len(data) <= _SMALL_BYTES or b'"' in data or b"\r" in data:
        return None
    lines = data.decode().removesuffix("\n").split("\n")
    rows = [line.split(",") for line in lines]
    if not all(lines) or set(map(len, rows)) != {len(names)}:
        return None
    values = dict(zip(names, zip(*rows, strict=True), strict=True))
    read = columns or names
    return pa.Table.from_arrays([pa.array(values[name], pa.string()) for name in read], list(read))


def _parsed(block: RowBlock, names: tuple[str, ...], columns: tuple[str, ...] | None, path: str) -> _Rows:
    """Parse a block as text. Rows with a wrong quote, a wrong number of fields or invalid UTF-8 are set aside."""
    data, lines = block.data, None
    wrong: list[_Wrong] = []
    if block.wrong or not _is_utf8(data):
        data, lines, wrong = _without_unreadable(block)
    invalid: list[Any] = []

    def skip(row: Any) -> str:
        invalid.append(row)
        return "skip"

    small = _small_table(data, names, columns) if lines is None else None
    table = small or pa.table({name: pa.array([], pa.string()) for name in columns or names})
    if data and small is None:
        try:
            # For a small block, open_csv takes half as long as read_csv, which starts a thread.
            table = pacsv.open_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data), column_names=names),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                convert_options=pacsv.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=False,
                    include_columns=columns,
                ),
            ).read_all()
        except pa.ArrowException as error:
            raise DataError(f"a CSV file can't be read: {error}", where=f"{path}, line {block.first_line}") from error
    rows = table.num_rows + len(invalid)
    if lines is None:
        # If there are as many lines as rows, no line is empty and no row spans several lines.
        is_simple = rows == block.lines
        lines = np.arange(block.first_line, block.first_line + rows) if is_simple else block.starts()[1]
    if len(lines) != rows:
        raise InvariantError("the rows of a CSV file were divided in two ways", where=path, got=(len(lines), rows))
    for row in invalid:
        what = f"the row has {row.actual_columns} fields where {row.expected_columns} are expected"
        wrong.append(_Wrong(int(lines[row.number - 1]), what, row.text))
    if invalid:
        lines = np.delete(lines, [row.number - 1 for row in invalid])
    return _Rows(table, lines, sorted(wrong))


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
    try:
        pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(data)]).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


def _without_unreadable(block: RowBlock) -> tuple[bytes, Any, list[_Wrong]]:
    """Return the data without rows that have a wrong quote or are not UTF-8, the lines of the remaining rows, and the
    rows that were removed.
    """
    starts, lines = block.starts()
    ends = np.append(starts[1:], len(block.data))
    quotes = {start for start, _ in block.wrong}
    kept: list[int] = []
    wrong: list[_Wrong] = []
    for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        row = block.data[start:end]
        what = "text follows the closing quote of a field" if start in quotes else None
        try:
            row.decode()
        except UnicodeDecodeError as error:
            what = f"the row is not UTF-8 text: {error.reason} at byte {error.start + 1}"
        if what is None:
            kept.append(index)
        else:
            shown = row.decode(errors="backslashreplace").rstrip("\r\n")
            wrong.append(_Wrong(int(lines[index]), what, shown))
    data = b"".join(block.data[starts[index] : ends[index]] for index in kept)
    return data, lines[kept], wrong


def _chunks(rows: _Rows, kinds: Mapping[str, pa.DataType], path: str, bad: BadRecords) -> Iterator[SourcedChunk]:
    """Yield the rows in chunks of about CHUNK_BYTES with typed columns.

    Add the invalid rows to `bad` in their order.
    """
    num_rows, lines, wrong = rows.table.num_rows, rows.lines, rows.wrong
    step = max(1, num_rows * CHUNK_BYTES // max(1, rows.table.nbytes))
    # Cast the columns of the complete block, and put them into one table. With many columns, this is much faster than
    # casting each chunk or column. Columns with a field that does not fit are cast chunk by chunk.
    table, remaining = _cast_columns(rows.table, kinds)
    for start in range(0, num_rows, step):
        part = table if step >= num_rows else table.slice(start, step)
        part_lines = lines[start : start + step]
        found = _misfits(part, part_lines, remaining) if remaining else {}
        next_line = lines[start + step] if start + step < num_rows else np.inf
        count = sum(row.line < next_line for row in wrong) if wrong else 0
        for row in sorted([*wrong[:count], *found.values()]):
            bad.add(f"{path}, line {row.line}", row.what, row.text)
        wrong = wrong[count:]
        if remaining:
            valid = [index for index in range(part.num_rows) if index not in found]
            part, part_lines = _cast_columns(part.take(pa.array(valid, pa.int64())), remaining)[0], part_lines[valid]
        yield SourcedChunk(part, _line_locator(path, part_lines))
    for row in wrong:
        bad.add(f"{path}, line {row.line}", row.what, row.text)


def _cast_columns(table: pa.Table, kinds: Mapping[str, pa.DataType]) -> tuple[pa.Table, dict[str, pa.DataType]]:
    """Cast the columns to their types. Return the table, and the types of columns with a field that does not fit."""
    columns, remaining = dict(zip(table.column_names, table.columns, strict=True)), {}
    for name, kind in kinds.items():
        try:
            columns[name] = _cast(columns[name], kind)
        except pa.ArrowInvalid:
            remaining[name] = kind
    return (pa.Table.from_arrays(list(columns.values()), names=list(columns)) if kinds else table), remaining


def _cast(texts: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Convert texts to a type, and empty texts to null. Raises pa.ArrowInvalid if a text does not fit."""
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    values = pc.cast(texts, kind)
    if kind in (pa.float32(), pa.float64()):
        infinite = pc.is_inf(values)
        if (
            pc.any(infinite).as_py()
            and not pc.all(pc.match_substring(texts.filter(infinite), "inf", ignore_case=True)).as_py()
        ):
            raise pa.ArrowInvalid(f"a number is too large for {kind}")  # Arrow would return infinity
    return values


def _misfits(table: pa.Table, lines: Any, kinds: Mapping[str, pa.DataType]) -> dict[int, _Wrong]:
    """Return the rows with a field that does not fit its type, by their index."""
    found: dict[int, _Wrong] = {}
    for name, kind in kinds.items():
        for index, error in _misfits_of(table.column(name), kind, 0):
            if index not in found:
                row = table.slice(index, 1).to_pylist()[0]
                what = f"a field of {name!r} doesn't fit its type: {error}"
                found[index] = _Wrong(int(lines[index]), what, str(row))
    return found


def _misfits_of(texts: pa.ChunkedArray, kind: pa.DataType, before: int) -> Iterator[tuple[int, str]]:
    """Yield the index and the error of each text that does not fit. The texts are found by bisection."""
    try:
        _cast(texts, kind)
    except pa.ArrowInvalid as error:
        if len(texts) == 1:
            yield before, str(error)
            return
        half = len(texts) // 2
        yield from _misfits_of(texts.slice(0, half), kind, before)
        yield from _misfits_of(texts.slice(half), kind, before + half)


def _line_locator(path: str, lines: Any) -> Callable[[int], str]:
    return lambda index: f"{path}, line {lines[index]}"
