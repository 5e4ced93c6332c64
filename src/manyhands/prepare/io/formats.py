"""The table of file formats: suffixes, and how files are divided, read and written.

To add a format, add an entry to `FORMATS`, with a reader (see `Reader`) or a writer (see `Writer`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from manyhands.errors import ConfigError, InvariantError
from manyhands.prepare.io.array_files import array_tables, read_arrays, split_arrays
from manyhands.prepare.io.array_writing import ArraysWriter, NpzWriter
from manyhands.prepare.io.compression import COMPRESSIONS
from manyhands.prepare.io.csv_files import check_same_names, is_csv_type, read_csv, split_csv
from manyhands.prepare.io.gridded_input import NETCDF_SUFFIXES
from manyhands.prepare.io.gridded_reading import read_gridded
from manyhands.prepare.io.listing import (
    InputFile,
    Split,
    split_into_row_groups,
    split_lines,
    with_common_schema,
)
from manyhands.prepare.io.npz_files import npz_tables, read_npz, split_npz
from manyhands.prepare.io.reading import read_json_lines, read_parquet, read_text
from manyhands.prepare.io.token_writing import TokensWriter
from manyhands.prepare.io.writing import (
    ChunksWriter,
    LinesWriter,
    ParquetWriter,
    Writer,
    json_lines,
    parquet_tables,
    rewrite,
    text_lines,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from manyhands.prepare.records.chunks import Chunk
    from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk

Splitter = Callable[[InputFile, str, str | None, int], tuple[list[Split], Any]]
"""A function (file, format, compression, partition_bytes) -> the splits of a file, and its schema if it has one."""

Reader = Callable[[Split, "BadRecords", tuple[str, ...] | None, Mapping[str, str]], Iterator["SourcedChunk"]]
"""A function (split, bad, columns, types) -> the records of a split.

Records that can't be parsed are added to `bad`.
"""

WriterFactory = Callable[[IO[bytes], "pa.Schema | None", str], Writer]
"""A function (file, schema, name) -> a writer to an open file. name: the file and task, for error messages."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """The functions that divide files of a format into splits, and read a split.

    check_same: called with the path and schema of the first file, and with those of another file. It raises DataError
    unless these files can be read together. It is None if `with_common_schema` checks this, or if there is no schema.
    has_columns: True if records are rows, so that columns can be selected.
    """

    split: Splitter
    read: Reader
    check_same: Callable[[tuple[str, Any], str, Any], None] | None = None
    has_columns: bool = True


@dataclass(frozen=True, kw_only=True)
class Output:
    """The function that writes files of a format.

    is_compressible: True if they may be compressed, as in `jsonl.gz`. tables: returns the records of a file as tables,
    if the records determine the schema of a file, so that it may be written again with the schema of all files.
    """

    write: WriterFactory
    tables: Callable[[str], Iterator[pa.Table]] | None = None
    is_compressible: bool = False


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A file format.

    suffixes: the suffixes of file names; the first suffix is used for output.
    input, output: None if the format can't be read or written.
    is_internal: True if the format is not offered to users.
    needs: a package that must be installed to use the format. extra: the extra of Manyhands that installs it.
    """

    suffixes: tuple[str, ...]
    input: Input | None = None
    output: Output | None = None
    is_internal: bool = False
    needs: str | None = None
    extra: str | None = None


def no_splitter(file: InputFile, form: str, compression: str | None, partition_bytes: int) -> tuple[list[Split], Any]:
    """Raise ConfigError: stores and netCDF files are divided together, by `plan_arrays`."""
    raise ConfigError(
        f"files of format {form} can't be read together with other files",
        where=file.path,
        hint="read them separately, uncompressed, and give the folder of a zarr store instead of its files",
    )


def no_writer(file: IO[bytes], schema: pa.Schema | None, name: str) -> Writer:
    """Raise InvariantError: the tasks of a zarr store write many files (see `store_parts`)."""
    raise InvariantError("a zarr store was opened as a file", got=name)


CHUNKS = "chunks"  # the internal format of cache(), which holds any records

FORMATS = {
    "parquet": FileFormat(
        suffixes=(".parquet", ".pq"),
        input=Input(split=split_into_row_groups, read=read_parquet),
        output=Output(write=ParquetWriter, tables=parquet_tables),
    ),
    "arrays": FileFormat(
        suffixes=(".arrays",),
        input=Input(split=split_arrays, read=read_arrays),
        output=Output(write=ArraysWriter, tables=array_tables),
    ),
    "npz": FileFormat(
        suffixes=(".npz",),
        input=Input(split=split_npz, read=read_npz),
        output=Output(write=NpzWriter, tables=npz_tables),
    ),
    "jsonl": FileFormat(
        suffixes=(".jsonl", ".ndjson"),
        input=Input(split=split_lines, read=read_json_lines),
        output=Output(write=partial(LinesWriter, json_lines), is_compressible=True),
    ),
    "text": FileFormat(
        suffixes=(".txt", ".text"),
        input=Input(split=split_lines, read=read_text, has_columns=False),
        output=Output(write=partial(LinesWriter, text_lines), is_compressible=True),
    ),
    "csv": FileFormat(
        suffixes=(".csv",),
        input=Input(split=split_csv, read=read_csv, check_same=check_same_names),
    ),
    "zarr": FileFormat(
        suffixes=(".zarr",),
        input=Input(split=no_splitter, read=read_gridded),
        output=Output(write=no_writer),
        needs="zarr",
        extra="arrays",
    ),
    "netcdf": FileFormat(
        suffixes=NETCDF_SUFFIXES,
        input=Input(split=no_splitter, read=read_gridded),
        needs="netCDF4",
        extra="arrays",
    ),
    "tokens": FileFormat(suffixes=(".tokens",), output=Output(write=TokensWriter)),
    CHUNKS: FileFormat(suffixes=(".chunks",), output=Output(write=ChunksWriter), is_internal=True),
}


def input_formats() -> list[str]:
    """Return the names of the formats that can be read."""
    return [name for name, each in FORMATS.items() if each.input is not None and not each.is_internal]


def output_formats() -> list[str]:
    """Return the names of the formats that can be written, including compressed ones such as `jsonl.gz`."""
    found = []
    for name, each in FORMATS.items():
        if each.output is not None and not each.is_internal:
            found.append(name)
            if each.output.is_compressible:
                found += [name + compression.suffixes[0] for compression in COMPRESSIONS.values()]
    return found


def find_input(name: str) -> Input:
    """Return the `Input` of a format.

    Raises ConfigError if it is not an input format, or if its package is not installed.
    """
    entry = FORMATS.get(name)
    if entry is None or entry.input is None:
        raise ConfigError("unknown input format", expected=", ".join(input_formats()), got=repr(name))
    _check_installed(name, entry)
    return entry.input


def check_output_format(name: str) -> str:
    """Return `name` if it is an output format whose package is installed. Raises ConfigError otherwise."""
    if name not in (*output_formats(), CHUNKS):
        raise ConfigError("unknown output format", expected=", ".join(output_formats()), got=repr(name))
    plain = name.partition(".")[0]
    _check_installed(plain, FORMATS[plain])
    return name


def _check_installed(name: str, entry: FileFormat) -> None:
    if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
        raise ConfigError(
            f"the format {name!r} needs a package that isn't installed",
            expected=entry.needs,
            hint=f"pip install 'manyhands[{entry.extra}]', here and on all workers",
        )


def format_of(path: str, given: str | None) -> tuple[str, str | None]:
    """Return (format, compression) of a file, from its suffixes.

    given: the format, if the caller specified it. It overrides the suffix. Raises ConfigError if the format is unknown.
    """
    stem, suffix = os.path.splitext(path)
    compression = next((name for name, each in COMPRESSIONS.items() if suffix.lower() in each.suffixes), None)
    if compression:
        suffix = os.path.splitext(stem)[1]
    found = given or next((name for name in input_formats() if suffix.lower() in FORMATS[name].suffixes), None)
    if found not in input_formats():
        raise ConfigError(
            "the format of a file isn't known",
            where=path,
            expected=", ".join(input_formats()),
            got=repr(given) if given else f"the suffix {suffix!r}",
            hint='pass the format: Dataset.read(..., format="jsonl")',
        )
    return found, compression


def split_files(
    files: Iterable[InputFile], given: str | None, partition_bytes: int
) -> tuple[list[Split], tuple[str, ...] | None]:
    """Divide files into splits of about `partition_bytes`. Empty files have no splits.

    If CSV files have the same columns in different orders, also return the names of the columns in the order of the
    first file, and otherwise None.

    given: the format, if the caller specified it. Raises DataError if Parquet or CSV files can't be read or have
    different columns, and ConfigError if a format is unknown.
    """
    splits: list[Split] = []
    first: dict[str, tuple[str, Any]] = {}  # for each format, the path and the schema of the first file
    schemas: dict[str, Any] = {}  # the schemas of Parquet files, by path
    columns: tuple[str, ...] | None = None
    for file in files:
        name, compression = format_of(file.path, given)
        form = find_input(name)
        found, schema = form.split(file, name, compression, partition_bytes)
        splits += found
        if schema is not None:
            if form.check_same is None:
                schemas[file.path] = schema
                continue
            path, expected = first.setdefault(name, (file.path, schema))
            form.check_same((path, expected), file.path, schema)
            if schema != expected:
                columns = expected
    return with_common_schema(splits, schemas), columns


def check_selection(
    formats: Iterable[str], columns: Sequence[str] | None, types: Mapping[str, str] | None
) -> tuple[str, ...] | None:
    """Return the columns to read. Raises ConfigError if `columns` or `types` is invalid for files of these formats."""
    formats = set(formats)
    if types and formats and "csv" not in formats:
        raise ConfigError(
            "types apply to CSV files only", got=", ".join(sorted(formats)), hint="convert values with map"
        )
    for name, kind in (types or {}).items():
        if not is_csv_type(kind):
            expected = "int64, float64, bool, date32, timestamp[us] or another alias of Arrow"
            raise ConfigError(f"the type of column {name!r} is unknown", expected=expected, got=repr(kind))
    if columns is None:
        return None
    without = sorted(form for form in formats if not find_input(form).has_columns)
    names = list(columns) if isinstance(columns, Iterable) and not isinstance(columns, (str, bytes)) else []
    if without or not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "columns can't be selected",
            expected="a list of different column names, for files that have columns",
            got=f"{columns!r}"[:200] + "".join(f", for files of format {form}" for form in without),
        )
    return tuple(names)


def read_split(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the records of a split.

    columns: the columns to read (None: all). types: the types of CSV columns. Records that can't be
    parsed are added to `bad`. Raises DataError if the file can't be read, is truncated or damaged, or lacks a requested
    column.
    """
    return find_input(split.format).read(split, bad, columns, types)


def is_of_lines(form: str) -> bool:
    """Return True if an output format writes Python objects, one per line."""
    return "." in form or form in ("jsonl", "text")


def output_file_name(partition: int, form: str) -> str:
    """Return the name of the output file of a partition."""
    name, dot, compression = form.partition(".")
    return f"part-{partition:05d}{FORMATS[name].suffixes[0]}{dot}{compression}"


def open_writer(form: str, file: IO[bytes], schema: pa.Schema | None, name: str) -> Writer:
    """Return a writer of this format to an open file.

    schema: the schema of Parquet and token files, or None to infer it from the records. name: the file and task, for
    error messages.
    """
    plain, dot, suffix = form.partition(".")
    output = FORMATS[plain].output
    if output is None:
        raise InvariantError("an input format was opened for output", got=form)
    if not dot:
        return output.write(file, schema, name)
    compression = next(each for each in COMPRESSIONS.values() if each.suffixes[0] == dot + suffix)
    stream = compression.writer(file)
    return _CompressedWriter(stream, output.write(stream, schema, name))


def rewrite_file(form: str, path: str, file: IO[bytes], schema: pa.Schema, name: str) -> int:
    """Write the records of a file into another file with this schema. Return the number of records.

    Raises DataError if a value can't have its column's type.
    """
    output = FORMATS[form].output
    if output is None or output.tables is None:
        raise InvariantError("a file was written again whose format has no schema", got=form)
    return rewrite(output.tables(path), output.write(file, schema, name))


class _CompressedWriter(Writer):
    """A writer to a stream that compresses. Closing the writer closes the stream."""

    def __init__(self, stream: IO[bytes], writer: Writer) -> None:
        self._stream, self._writer = stream, writer

    def add(self, chunk: Chunk) -> None:
        self._writer.add(chunk)

    def close(self) -> None:
        self._writer.close()
        self._stream.close()
