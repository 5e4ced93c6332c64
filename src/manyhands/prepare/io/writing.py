"""Output files: Parquet, JSON lines, text, tokens.

Output files of tokens: documents one after the other, and where each ends.

Output files: Parquet, JSON lines, text, tokens; gzip or zstd. The bytes depend on the records only.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.data.token_format import padding, tail, token_type
from manyhands.errors import ConfigError, DataError
from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records.chunks import (
    CHUNK_BYTES,
    Chunk,
    concatenate,
    num_records,
    records_of,
    shared,
    size_bytes,
    table_of,
)
from manyhands.prepare.records.keys import KeyedLists, KeyedTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COLUMN = "tokens"

_VOCABULARY = b"vocabulary"


def token_schema(vocabulary: int) -> pa.Schema:
    """Of documents as lists of tokens; for a vocabulary of up to 65,536 tokens, of two bytes each."""
    kind = pa.list_(pa.from_numpy_dtype(token_type(vocabulary)))
    return pa.schema([(_COLUMN, kind)], metadata={_VOCABULARY: str(vocabulary)})


class TokensWriter:
    """Writes a column `tokens` of lists. Without a schema, tokens take four bytes."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._name, self._schema = file, name, schema or token_schema(0)
        self._vocabulary = int((self._schema.metadata or {}).get(_VOCABULARY, 0))
        self._type = token_type(self._vocabulary)
        self._lengths: list[NDArray[np.uint64]] = []
        self._written = 0

    def add(self, chunk: Chunk) -> None:
        """Write the documents of a chunk. Raises DataError for records that aren't lists of tokens."""
        if not num_records(chunk):
            return
        try:
            column = table_of(chunk, self._schema).column(_COLUMN)
        except (DataError, KeyError) as error:
            raise self._unfit(str(error.what if isinstance(error, DataError) else error)) from error
        for part in column.chunks:
            tokens = part.flatten()
            if part.null_count or tokens.null_count:
                raise self._unfit("a document or a token is missing (null)")
            values = tokens.to_numpy(zero_copy_only=False)
            if self._vocabulary and len(values) and int(values.max()) >= self._vocabulary:
                raise self._unfit(f"token {values.max()} is outside of a vocabulary of {self._vocabulary}")
            self._file.write(values.astype(self._type, copy=False).tobytes())
            self._lengths.append(pc.list_value_length(part).to_numpy(zero_copy_only=False).astype(np.uint64))
            self._written += len(values)

    def close(self) -> None:
        """Write where the documents end, and the tail."""
        ends = np.cumsum(np.concatenate(self._lengths), dtype=np.uint64) if self._lengths else np.empty(0, np.uint64)
        self._file.write(bytes(padding(self._written * self._type.itemsize)))
        self._file.write(ends.astype("<u8").tobytes())
        self._file.write(tail(self._written, len(ends), self._vocabulary, self._type.itemsize))

    def _unfit(self, why: Any) -> DataError:
        return DataError(
            f"records can't be written as tokens: {why}",
            where=self._name,
            expected="a column `tokens` of lists of whole numbers",
            hint="map the records to {'tokens': [...]}, one record a document",
        )


_ROW_GROUP, _ROW_GROUP_BYTES = 131_072, 2**25  # rows and bytes, whichever comes first

_SAMPLED = 4096  # rows that tell whether a column's values come again

_LINES = 512  # encoded at once: orjson takes 1 KiB for each, which then stays in the cache

CHUNKS = "chunks"  # between two jobs: any records, for cache()

TOKENS = "tokens"

FORMATS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "text", "text.gz", "text.zst", TOKENS)

_SUFFIXES = {"parquet": ".parquet", CHUNKS: ".chunks"}


class Writer(Protocol):
    """Writes chunks into one file."""

    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises DataError for records that the format can't hold."""
        ...

    def close(self) -> None:
        """Write what is left; the file itself stays open."""
        ...


def check_format(name: str) -> str:
    """`name`, if it is a format of output files. Raises ConfigError."""
    if name not in (*FORMATS, CHUNKS):
        raise ConfigError("there is no such output format", expected=", ".join(FORMATS), got=repr(name))
    return name


def output_file_name(partition: int, form: str) -> str:
    """The name of a partition's output file."""
    return f"part-{partition:05d}{_SUFFIXES.get(form, '.' + form.replace('text', 'txt'))}"


def open_writer(form: str, file: IO[bytes], schema: pa.Schema | None, name: str) -> Writer:
    """A writer of the format into an open file. `name`: where, for messages."""
    if form == "parquet":
        return _ParquetWriter(file, schema, name)
    if form == CHUNKS:
        return _ChunksWriter(file)
    if form == TOKENS:
        return TokensWriter(file, schema, name)
    form, _, compression = form.partition(".")
    encode = _json_lines if form == "jsonl" else _text_lines
    if compression == "gz":
        # Level 6 of zlib, and neither a name nor a time in the header: the same bytes every time.
        return _LinesWriter(gzip.GzipFile("", "wb", 6, file, mtime=0), encode, name, closes=True)
    if compression == "zst":
        import pyarrow as pa

        return _LinesWriter(
            pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), "w"), "zstd"), encode, name, closes=True
        )
    return _LinesWriter(file, encode, name, closes=False)


class _LinesWriter:
    def __init__(self, file: Any, encode: Callable[[Chunk, str], bytes], name: str, *, closes: bool) -> None:
        self._file, self._encode, self._name, self._closes = file, encode, name, closes

    def add(self, chunk: Chunk) -> None:
        if num_records(chunk):
            self._file.write(self._encode(chunk, self._name))

    def close(self) -> None:
        if self._closes:
            self._file.close()


class _KeptOpen:
    """A file whose `close` does nothing: Arrow closes what it writes into."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush, self.tell = file.write, file.flush, file.tell
        self.closed = False

    def close(self) -> None:
        pass


def _json_lines(chunk: Chunk, name: str) -> bytes:
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    records = records_of(chunk)
    parts = []
    for start in range(0, len(records), _LINES):
        some = records[start : start + _LINES]
        try:
            parts.append(b"".join([orjson.dumps(record, None, options) for record in some]))
        except TypeError:
            parts.append(b"".join([_json_line(record, name) for record in some]))
    return b"".join(parts)


def _json_line(record: Any, name: str) -> bytes:
    """What orjson refuses: whole numbers beyond 64 bits; or an error that says what isn't JSON."""
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise _unfit("JSON", error, record, name) from error


def _text_lines(chunk: Chunk, name: str) -> bytes:
    records = records_of(chunk)
    try:
        text = "\n".join(records) + "\n"
    except TypeError as error:
        wrong = next((record for record in records if not isinstance(record, str)), None)
        raise _unfit("text", error, wrong, name) from error
    if text.count("\n") != len(records):
        wrong = next(record for record in records if "\n" in record)
        raise _unfit("a line of text", ValueError("it has a line end in it"), wrong, name)
    return text.encode()


def _unfit(kind: str, error: Exception, record: Any, name: str) -> DataError:
    return DataError(
        f"a record can't be written as {kind}: {error}",
        where=name,
        got=repr(record)[:200],
        hint="map the records to what the format holds, or write another format",
    )


class _ParquetWriter:
    """Row groups end with a chunk; the columns are those of the first group, or of the schema."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._schema, self._name = file, schema, name
        self._writer: Any = None
        self._waiting: list[Chunk] = []
        self._count = self._bytes = 0

    def add(self, chunk: Chunk) -> None:
        self._waiting.append(chunk)
        self._count += num_records(chunk)
        self._bytes += size_bytes(chunk)
        if self._count >= _ROW_GROUP or self._bytes >= _ROW_GROUP_BYTES:
            self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        import pyarrow.parquet as pq

        chunk = concatenate(self._waiting)
        self._waiting, self._count, self._bytes = [], 0, 0
        try:
            table = table_of(chunk, self._schema)
        except DataError as error:
            error.where = self._name
            raise
        table = table.combine_chunks()  # else pages end where its arrays do
        if self._writer is None:
            self._schema = table.schema
            repeating = [name for name in table.column_names if _repeats(table.column(name))]
            self._writer = pq.ParquetWriter(
                self._file, table.schema, compression="zstd", compression_level=1, use_dictionary=repeating
            )
        self._writer.write_table(table, row_group_size=max(1, len(table)))


def _repeats(column: Any) -> bool:
    """Its first values are so few different ones that a dictionary of them pays: making one takes time."""
    import pyarrow as pa

    if not (pa.types.is_primitive(column.type) or pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        return True
    first = column.slice(0, _SAMPLED)
    return len(first.unique()) * 2 <= len(first)


class _ChunksWriter:
    """Blocks of records as they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = RunFileWriter(file, CHUNK_BYTES)

    def add(self, chunk: Chunk) -> None:
        if not num_records(chunk):
            return
        if isinstance(chunk, list):
            self._file.add(KeyedLists([None] * len(chunk), [shared(chunk)]))
        else:
            self._file.add(KeyedTable(chunk, ()))

    def close(self) -> None:
        self._file.close()
