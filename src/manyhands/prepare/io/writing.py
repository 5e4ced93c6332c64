"""Writes output files: Parquet, JSON lines, text. `token_writing` and `array_writing` write files for training.

JSON lines and text may be compressed by gzip or zstd. The bytes of a file depend only on its records.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import IO, Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.errors import DataError
from manyhands.prepare.io.json_arrays import array_to_json
from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records.array_columns import is_tensor, shape_of
from manyhands.prepare.records.chunks import (
    CHUNK_BYTES,
    BadColumn,
    Chunk,
    concatenate,
    num_records,
    records_of,
    share_equal_texts,
    size_bytes,
    table_of,
)
from manyhands.prepare.records.functions import shown
from manyhands.prepare.records.keys import KeyedLists, KeyedTable
from manyhands.prepare.records.schemas import combined, common_schema, conformed
from manyhands.prepare.records.unfit import Unfit
from manyhands.storage.files import open_to_read


class Writer(Protocol):
    """Writes chunks into one file.

    schema: the schema of the file, or None for formats without a schema. is_discarded: True if `schema` was found too
    late, so that the file is not valid and all records must be written again with this schema.
    """

    schema: pa.Schema | None = None
    is_discarded: bool = False

    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises DataError for records that can't be represented in the format."""
        ...

    def close(self) -> None:
        """Write buffered records and the end of the format. The file itself stays open."""
        ...

    def abandon(self) -> None:
        """Release the file after an error. The content of the file is then not valid."""
        return


# A Parquet row group ends when it has this many rows or bytes, whichever comes first.
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 131_072, 2**25

_SAMPLE_ROWS = 4096  # the number of first rows that decide whether a Parquet column is written with a dictionary

_SURROGATE = re.compile("[\ud800-\udfff]")

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_BOM = b"\xef\xbb\xbf"

# The number of JSON lines encoded at a time: orjson allocates 1 KiB for each, and 512 KiB fit into the CPU's cache.
_LINES = 512


class LinesWriter(Writer):
    """Writes lines. encode: a function that returns the lines of a chunk. name: the file and task, for error
    messages.
    """

    def __init__(
        self, encode: Callable[[Chunk, str], bytes], file: IO[bytes], schema: pa.Schema | None, name: str
    ) -> None:
        self._encode, self._file, self._name, self._before = encode, file, name, 0

    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises DataError for records that can't be encoded."""
        if not num_records(chunk):
            return
        lines = self._encode(chunk, f"{self._name}, records {self._before + 1} to {self._before + num_records(chunk)}")
        if not self._before and lines.startswith(_BOM):
            # Readers drop a byte order mark at the start of a file, so write one before the text's own mark.
            self._file.write(_BOM)
        self._file.write(lines)
        self._before += num_records(chunk)

    def close(self) -> None:
        """Do nothing, because every chunk has been written."""


# orjson would drop fields of dataclasses whose names start with an underscore. It would cut NumPy's times to
# microseconds, so all values of NumPy are passed to `_known`.
_VALUES = orjson.OPT_PASSTHROUGH_DATACLASS

_JSON = orjson.OPT_APPEND_NEWLINE | _VALUES  # keys that are not text raise TypeError

_JSON_KEYS = _VALUES | orjson.OPT_NON_STR_KEYS


def _known(value: Any) -> Any:
    """Return the JSON forms of NumPy's values, and the fields of a dataclass.

    Raises TypeError for other types that orjson does not know, and for times that it would change.
    """
    if isinstance(value, np.ndarray):
        return array_to_json(value)
    if isinstance(value, np.generic):
        if value.dtype.kind == "M" and not _has_microseconds(value):
            raise TypeError("a NumPy time is missing or finer than a microsecond: convert it to text first")
        return orjson.Fragment(orjson.dumps(value, None, orjson.OPT_SERIALIZE_NUMPY))
    return _fields(value)


def _has_microseconds(times: Any) -> bool:
    """Return True if all times are whole microseconds. NaT gives False, because it differs from itself."""
    return bool(np.all(times.astype("datetime64[us]") == times))


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass. Raises TypeError for other types that orjson does not know."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"Type is not JSON serializable: {name}")
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def json_lines(chunk: Chunk, name: str) -> bytes:
    """Encode records as JSON, one record per line. Raises DataError with `name` as the location."""
    records = records_of(chunk)
    parts = []
    for start in range(0, len(records), _LINES):
        batch = records[start : start + _LINES]
        try:
            parts.append(b"".join([orjson.dumps(record, _known, _JSON) for record in batch]))
        except TypeError:
            parts.append(b"".join([_json_line(record, name) for record in batch]))
    return b"".join(parts)


def _json_line(record: Any, name: str) -> bytes:
    """Encode one record that may have values that orjson rejects. Raises DataError if JSON can't represent it."""
    try:
        _check_keys(record)
        return _json_value(record) + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        # orjson's own error does not say why `_known` refused a value.
        raise _unrepresentable("JSON", error.__cause__ or error, record, name) from error


def _check_keys(value: Any) -> None:
    """Raise ValueError if two keys of a dict are equal as text.

    Different numbers of one type are never equal as text.
    """
    if isinstance(value, dict):
        kinds = set(map(type, value))
        if len(kinds) > 1 or not kinds <= {str, int, float, bool}:
            names = [_json_key(key) for key in value]
            if len(set(names)) < len(names):
                raise ValueError("two keys of a dict are equal as text, so one of the values would be lost")
        for item in value.values():
            if isinstance(item, (dict, list, tuple)):
                _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (dict, list, tuple)):
                _check_keys(item)


def _json_value(value: Any) -> bytes:
    """Encode a value. This function encodes the values that orjson rejects. orjson encodes the values in them and
    beside them.

    The rejected values are integers beyond 64 bits, lone surrogates, named tuples and very deep nesting.
    """
    try:
        return orjson.dumps(value, _known, _JSON_KEYS)
    except TypeError:
        if dataclasses.is_dataclass(value):
            return _json_value(_fields(value))
        if isinstance(value, dict):
            items = zip(map(_json_key, value), map(_json_value, value.values()), strict=True)
            return b"{" + b",".join([name + b":" + item for name, item in items]) + b"}"
        if isinstance(value, (list, tuple)):
            return b"[" + b",".join(map(_json_value, value)) + b"]"
        if isinstance(value, str):
            return _json_text(value)
        if isinstance(value, int):
            return str(int(value)).encode()
        if isinstance(value, float):
            return orjson.dumps(float(value))
        raise


def _json_key(key: Any) -> bytes:
    """Encode a key of a dict. Numbers, True, False, None and dates are encoded as the text of their JSON form."""
    if type(key) is str:
        return _json_value(key)
    if isinstance(key, int) and not -(2**63) <= key < 2**64:
        return b'"%d"' % key
    return orjson.dumps({key: 0}, None, _JSON_KEYS | orjson.OPT_SERIALIZE_NUMPY)[1:-3]


def _json_text(text: str) -> bytes:
    """Encode text with lone surrogates. Raises ValueError for two surrogates that readers of JSON would join."""
    if _SURROGATE_PAIR.search(text):
        raise ValueError("it has text with two surrogates in a row, which JSON reads as one character")
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace")  # a surrogate is written as \udXXX


def text_lines(chunk: Chunk, name: str) -> bytes:
    """Encode strings, one string per line. Raises DataError with `name` as the location."""
    records = records_of(chunk)
    try:
        text = "\n".join(records) + "\n"
    except TypeError as error:
        invalid = next((record for record in records if not isinstance(record, str)), None)
        raise _unrepresentable("text", error, invalid, name) from error
    if text.count("\n") != len(records):
        invalid = next(record for record in records if "\n" in record)
        raise _unrepresentable("a line of text", ValueError("it contains a line end"), invalid, name)
    if "\r\n" in text:
        invalid = next(record for record in records if record.endswith("\r"))
        raise _unrepresentable(
            "a line of text", ValueError("it ends with a carriage return, which belongs to a line end"), invalid, name
        )
    try:
        return text.encode()
    except UnicodeEncodeError:
        invalid = next(record for record in records if _SURROGATE.search(record))
        raise _unrepresentable("text", ValueError("it has a lone surrogate"), invalid, name) from None


def _unrepresentable(kind: str, error: BaseException, record: Any, name: str) -> DataError:
    return DataError(
        f"a record can't be written as {kind}: {error}",
        where=name,
        got=shown(record),
        hint="map the records to values that the format supports, or write another format",
    )


class TableWriter(Writer):
    """Collects records into tables with one schema. Without a schema, the records determine it.

    The first table determines the columns. If a later table needs wider types or further columns, the writer stops
    writing, and only finds the schema that holds all records. Then `schema` differs from the file's schema, and the
    caller must discard the file and write all records again with `schema`.
    """

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._given, self._name = file, schema, name
        self.schema = schema
        self.is_discarded = False
        self._pending: list[Chunk] = []
        self._count = self._bytes = self._before = 0

    def check(self, table: pa.Table) -> None:
        """Raise Unfit for a column that the format can't hold."""

    def write(self, table: pa.Table) -> None:
        """Write a table with the schema of the file."""
        raise NotImplementedError

    def end(self) -> None:
        """Write the end of the format."""

    def add(self, chunk: Chunk) -> None:
        self._pending.append(chunk)
        self._count += num_records(chunk)
        self._bytes += size_bytes(chunk)
        if self._count >= _ROW_GROUP_ROWS or self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        if self.is_discarded:
            self.abandon()
        else:
            self.end()

    def _flush(self) -> None:
        pending, count = self._pending, self._count
        self._pending, self._count, self._bytes = [], 0, 0
        table: Any = None
        try:
            table = self._table(pending)
            self.check(table)
            table = self._fitted(table)
            if not self.is_discarded:
                # Join the arrays of each column, so that the bytes don't depend on the ends of the chunks' arrays.
                self.write(table.combine_chunks())
        except (Unfit, pa.ArrowException) as error:
            raise DataError(
                f"the records can't be put into columns: {error}",
                where=self._place(error, table, count),
                expected=f"the types of the earlier records: {_described(self.schema)}" if self._before else None,
                hint="use values of one type in a column, or set the types with write(schema=...)",
            ) from error
        self._before += count

    def _place(self, error: Exception, table: Any, count: int) -> str:
        """Return the location of the records that caused an error: one record if arrays have another shape or type."""
        if isinstance(error, Unfit) and error.index is not None:
            return f"{self._name}, record {self._before + error.index + 1}"
        column = table.column(error.column) if isinstance(error, Unfit) and table is not None else None
        if column is None or not is_tensor(column.type):
            return f"{self._name}, records {self._before + 1} to {self._before + count}"
        return f"{self._name}, record {self._before + 1 + pc.index(column.is_valid(), True).as_py()}"

    def _table(self, chunks: list[Chunk]) -> pa.Table:
        """Return the records as one table.

        Lists between tables are converted to tables, so that the tables keep their types.
        """
        tables: list[pa.Table] = []
        before = self._before
        for is_list, group in groupby(chunks, lambda chunk: isinstance(chunk, list)):
            for chunk in [concatenate(list(group))] if is_list else group:
                try:
                    tables.append(_distinct_names(table_of(chunk, self._given)))
                except DataError as error:
                    error.where = record_place(self._name, before, error)
                    raise
                before += num_records(chunk)
        return combined(tables)

    def _fitted(self, table: pa.Table) -> pa.Table:
        """Return the table with the schema of the file, or widen the schema, so that the file must be discarded."""
        if self.schema is None:
            self.schema = table.schema
        wider = common_schema(self.schema, table.schema)
        self.is_discarded = self.is_discarded or wider is not self.schema
        self.schema = wider
        return table if self.is_discarded else conformed(table, wider)


class ParquetWriter(TableWriter):
    """Writes Parquet files. Each table is a row group."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        super().__init__(file, schema, name)
        self._writer: Any = None

    def check(self, table: pa.Table) -> None:
        """Raise Unfit for a column of arrays without elements, which Parquet writes but can't read."""
        for field in table.schema:
            if is_tensor(field.type) and 0 in field.type.shape:
                why = f"it has arrays of shape {list(shape_of(field.type))}, which have no elements"
                raise Unfit(field.name, f"{why}, so Parquet can't hold them")

    def write(self, table: pa.Table) -> None:
        """Write a row group."""
        import pyarrow.parquet as pq

        if self._writer is None:
            repeating = [name for name in table.column_names if _repeats(table.column(name))]
            self._writer = pq.ParquetWriter(
                self._file, table.schema, compression="zstd", compression_level=1, use_dictionary=repeating
            )
        self._writer.write_table(table, row_group_size=max(1, len(table)))

    def end(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()  # otherwise pyarrow would write into the file after it has been closed


def parquet_tables(path: str) -> Iterator[pa.Table]:
    """Yield the row groups of a Parquet file."""
    import pyarrow.parquet as pq

    with open_to_read(path) as raw:
        reader = pq.ParquetFile(raw)
        for index in range(reader.num_row_groups):
            yield reader.read_row_group(index, use_threads=False)


def rewrite(tables: Iterable[pa.Table], writer: Writer) -> int:
    """Write the records of a file into another file. Return the number of records.

    Raises DataError if a value can't have its column's type.
    """
    records = 0
    try:
        for table in tables:
            writer.add(table)
            records += len(table)
        writer.close()
        return records
    except BaseException:
        writer.abandon()
        raise


def _distinct_names(table: pa.Table) -> pa.Table:
    names = table.column_names
    if len(set(names)) < len(names):
        raise Unfit(next(name for name in names if names.count(name) > 1), "it occurs twice")
    return table


def record_place(name: str, before: int, error: DataError) -> str:
    """Return the location of the record that caused an error: `name`, and the record's number if the error has its
    index.
    """
    index = error.index if isinstance(error, BadColumn) else None
    return name if index is None else f"{name}, record {before + index + 1}"


def _described(schema: pa.Schema | None) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema or [])[:300]


def _repeats(column: Any) -> bool:
    """Return True if values repeat often enough in the first rows to write a dictionary, which takes time to build."""
    import pyarrow as pa

    if not (pa.types.is_primitive(column.type) or pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        return True
    first = column.slice(0, _SAMPLE_ROWS)
    return len(first.unique()) * 2 <= len(first)


class ChunksWriter(Writer):
    """Writes records unchanged, as the blocks of a run file without keys."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file = RunFileWriter(file, CHUNK_BYTES)

    def add(self, chunk: Chunk) -> None:
        if not num_records(chunk):
            return
        if isinstance(chunk, list):
            self._file.add(KeyedLists([None] * len(chunk), [share_equal_texts(chunk)]))
        else:
            self._file.add(KeyedTable(chunk, ()))

    def close(self) -> None:
        self._file.close()
