"""Output files: Parquet, JSON lines, text, tokens.

JSON lines and text may be compressed by gzip or zstd. Token files hold the tokens of all documents in sequence and the
positions where documents end (see `manyhands.data.token_format`). The bytes of a file depend on its records only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.data.token_format import padding, tail, token_type
from manyhands.errors import DataError
from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records.chunks import (
    CHUNK_BYTES,
    Chunk,
    concatenate,
    num_records,
    records_of,
    share_equal_texts,
    size_bytes,
    table_of,
)
from manyhands.prepare.records.keys import KeyedLists, KeyedTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COLUMN = "tokens"

_VOCABULARY = b"vocabulary"


def token_schema(vocabulary: int) -> pa.Schema:
    """Return the schema of documents as lists of tokens.

    vocabulary: the number of different tokens (0: unknown). A token takes two bytes if the number is known and at most
    65,536, and four bytes otherwise.
    """
    kind = pa.list_(pa.from_numpy_dtype(token_type(vocabulary)))
    return pa.schema([(_COLUMN, kind)], metadata={_VOCABULARY: str(vocabulary)})


class TokensWriter:
    """Writes the column `tokens`, one list per document, as a token file. Without a schema, tokens take four bytes."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._name, self._schema = file, name, schema or token_schema(0)
        self._vocabulary = int((self._schema.metadata or {}).get(_VOCABULARY, 0))
        self._type = token_type(self._vocabulary)
        self._lengths: list[NDArray[np.uint64]] = []
        self._written = 0

    def add(self, chunk: Chunk) -> None:
        """Write the documents of a chunk. Raises DataError if a record has no list of tokens in `tokens`."""
        if not num_records(chunk):
            return
        try:
            column = table_of(chunk, self._schema).column(_COLUMN)
        except (DataError, KeyError) as error:
            raise self._invalid(str(error.what if isinstance(error, DataError) else error)) from error
        for part in column.chunks:
            tokens = part.flatten()
            if part.null_count or tokens.null_count:
                raise self._invalid("a document or a token is missing (null)")
            values = tokens.to_numpy(zero_copy_only=False)
            if self._vocabulary and len(values) and int(values.max()) >= self._vocabulary:
                raise self._invalid(f"token {values.max()} is outside the vocabulary of {self._vocabulary} tokens")
            self._file.write(values.astype(self._type, copy=False).tobytes())
            self._lengths.append(pc.list_value_length(part).to_numpy(zero_copy_only=False).astype(np.uint64))
            self._written += len(values)

    def close(self) -> None:
        """Write the ends of the documents and the tail. The file stays open."""
        ends = np.cumsum(np.concatenate(self._lengths), dtype=np.uint64) if self._lengths else np.empty(0, np.uint64)
        self._file.write(bytes(padding(self._written * self._type.itemsize)))
        self._file.write(ends.astype("<u8").tobytes())
        self._file.write(tail(self._written, len(ends), self._vocabulary, self._type.itemsize))

    def _invalid(self, reason: Any) -> DataError:
        return DataError(
            f"records can't be written as tokens: {reason}",
            where=self._name,
            expected="a column `tokens` of lists of integers",
            hint="map the records to {'tokens': [...]}, one record per document",
        )


# A Parquet row group ends when it has this many rows or bytes, whichever comes first.
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 131_072, 2**25

_SAMPLE_ROWS = 4096  # the first rows, which decide whether a Parquet column is written with a dictionary

_LINES = 512  # JSON lines encoded at a time: orjson allocates 1 KiB for each, and 512 KiB fit into the CPU's cache


class Writer(Protocol):
    """Writes chunks into one file."""

    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises DataError for records that can't be represented in the format."""
        ...

    def close(self) -> None:
        """Write buffered records and the end of the format. The file itself stays open."""
        ...


class LinesWriter:
    """Writes lines. encode: returns the lines of a chunk. name: the file and task, for error messages."""

    def __init__(
        self, encode: Callable[[Chunk, str], bytes], file: IO[bytes], schema: pa.Schema | None, name: str
    ) -> None:
        self._encode, self._file, self._name = encode, file, name

    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises DataError for records that can't be encoded."""
        if num_records(chunk):
            self._file.write(self._encode(chunk, self._name))

    def close(self) -> None:
        """Do nothing: every chunk has been written."""


def json_lines(chunk: Chunk, name: str) -> bytes:
    """Encode records as JSON, one on each line. Raises DataError with `name` as the location."""
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    records = records_of(chunk)
    parts = []
    for start in range(0, len(records), _LINES):
        batch = records[start : start + _LINES]
        try:
            parts.append(b"".join([orjson.dumps(record, None, options) for record in batch]))
        except TypeError:
            parts.append(b"".join([_json_line(record, name) for record in batch]))
    return b"".join(parts)


def _json_line(record: Any, name: str) -> bytes:
    """Encode a record that orjson rejects, for example because of an integer beyond 64 bits.

    Raises DataError that names the record if it can't be represented in JSON.
    """
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise _unrepresentable("JSON", error, record, name) from error


def text_lines(chunk: Chunk, name: str) -> bytes:
    """Encode strings, one on each line. Raises DataError with `name` as the location."""
    records = records_of(chunk)
    try:
        text = "\n".join(records) + "\n"
    except TypeError as error:
        invalid = next((record for record in records if not isinstance(record, str)), None)
        raise _unrepresentable("text", error, invalid, name) from error
    if text.count("\n") != len(records):
        invalid = next(record for record in records if "\n" in record)
        raise _unrepresentable("a line of text", ValueError("it contains a line end"), invalid, name)
    return text.encode()


def _unrepresentable(kind: str, error: Exception, record: Any, name: str) -> DataError:
    return DataError(
        f"a record can't be written as {kind}: {error}",
        where=name,
        got=repr(record)[:200],
        hint="map the records to values that the format supports, or write another format",
    )


class ParquetWriter:
    """Writes Parquet files. Without a schema, the first row group determines the columns."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._schema, self._name = file, schema, name
        self._writer: Any = None
        self._pending: list[Chunk] = []
        self._count = self._bytes = 0

    def add(self, chunk: Chunk) -> None:
        self._pending.append(chunk)
        self._count += num_records(chunk)
        self._bytes += size_bytes(chunk)
        if self._count >= _ROW_GROUP_ROWS or self._bytes >= _ROW_GROUP_BYTES:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        import pyarrow.parquet as pq

        chunk = concatenate(self._pending)
        self._pending, self._count, self._bytes = [], 0, 0
        try:
            table = table_of(chunk, self._schema)
        except DataError as error:
            error.where = self._name
            raise
        # Join the arrays of each column: otherwise Parquet pages would end at the ends of the chunks' arrays.
        table = table.combine_chunks()
        if self._writer is None:
            self._schema = table.schema
            repeating = [name for name in table.column_names if _repeats(table.column(name))]
            self._writer = pq.ParquetWriter(
                self._file, table.schema, compression="zstd", compression_level=1, use_dictionary=repeating
            )
        self._writer.write_table(table, row_group_size=max(1, len(table)))


def _repeats(column: Any) -> bool:
    """True if values repeat often enough in the first rows to write a dictionary, which takes time to build."""
    import pyarrow as pa

    if not (pa.types.is_primitive(column.type) or pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        return True
    first = column.slice(0, _SAMPLE_ROWS)
    return len(first.unique()) * 2 <= len(first)


class ChunksWriter:
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
