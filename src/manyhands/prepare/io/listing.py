"""Finds input files and divides them into splits.

Splits come from the data alone, never from the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import pairwise
from typing import Any

from manyhands.errors import ConfigError, DataError
from manyhands.storage.files import join_path, names_in, open_to_read
from manyhands.storage.location import file_system, is_local

FORMATS = ("text", "jsonl", "parquet", "csv")

_SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
}

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one task reads: bytes `start` to `end` of a file (end None: all), or some row groups of it."""

    path: str
    format: str
    compression: str | None
    start: int
    end: int | None
    size_bytes: int
    row_groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputFile:
    """A file that was found. `version`: changes when its content does (time, etag), as far as the storage tells."""

    path: str
    size_bytes: int
    version: str


def find_files(patterns: Sequence[str]) -> list[InputFile]:
    """The files that paths, folders and globs name, in the order of the patterns and then of their names.

    Of a folder, all files that aren't hidden (names that begin with `.` or `_`). Raises DataError if there are none.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        files = _local_files(pattern) if is_local(pattern) else _remote_files(pattern)
        if not files:
            raise DataError(
                "no file matches",
                where=pattern if not is_local(pattern) else os.path.abspath(pattern),
                expected="a file, a folder with files, or a glob that matches some",
                hint="check the path; globs are *, ?, [...] and ** for folders in folders",
            )
        found += files
    return found


def _local_files(pattern: str) -> list[InputFile]:
    if os.path.isdir(pattern):
        paths = [join_path(pattern, name) for name in names_in(pattern) if name[0] not in "._"]
    elif has_magic(pattern) and not os.path.exists(pattern):
        paths = sorted(path for path in glob(pattern, recursive=True) if _is_meant(path, pattern))
    else:
        paths = [pattern]
    return [
        InputFile(path, info.st_size, str(info.st_mtime_ns))
        for path in paths
        if os.path.isfile(path)
        for info in (os.stat(path),)
    ]


def _is_meant(path: str, pattern: str) -> bool:
    """A file whose name begins with _ is about the others (manifests, events), unless it's asked for by that."""
    return path.rpartition("/")[2][:1] != "_" or pattern.rpartition("/")[2][:1] == "_"


def _remote_files(pattern: str) -> list[InputFile]:
    system, inner = file_system(pattern)
    if system.isdir(inner):
        paths = [path for path in system.find(inner, maxdepth=1) if path.rpartition("/")[2][0] not in "._"]
    else:
        found = system.glob(inner) if has_magic(inner) else [inner] if system.isfile(inner) else []
        paths = [path for path in found if _is_meant(path, inner)]
    files = []
    for path in sorted(paths):
        info = system.info(path)
        if info["type"] == "file":
            told = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), "")
            files.append(InputFile(system.unstrip_protocol(path), int(info["size"]), str(told)))
    return files


def format_of(path: str, given: str | None) -> tuple[str, str | None]:
    """(format, compression) by the file's name, or the format that was given. Raises ConfigError for an unknown one."""
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    found = given or _SUFFIXES.get(suffix.lower())
    if found not in FORMATS:
        raise ConfigError(
            "the format of a file isn't known",
            where=path,
            expected=", ".join(FORMATS),
            got=repr(given) if given else f"the suffix {suffix!r}",
            hint='say it: Dataset.read(..., format="jsonl")',
        )
    return found, compression


def split_files(files: Iterable[InputFile], given: str | None, partition_bytes: int) -> list[Split]:
    """The splits of all files. Lines that cross a split's end belong to the split that they begin in.

    Compressed files and CSV (a quoted field may hold line ends) are one split each. Raises DataError for Parquet files
    that can't be read or whose columns differ.
    """
    splits: list[Split] = []
    first_schema: tuple[str, Any] | None = None
    for file in files:
        form, compression = format_of(file.path, given)
        if not file.size_bytes and form != "parquet":
            continue
        if form == "parquet":
            parts, schema = _row_groups(file, partition_bytes)
            first_schema = first_schema or (file.path, schema)
            _same_columns(first_schema, file.path, schema)
            splits += parts
        elif compression or form == "csv":
            splits.append(
                Split(
                    path=file.path, format=form, compression=compression, start=0, end=None, size_bytes=file.size_bytes
                )
            )
        else:
            count = max(1, round(file.size_bytes / partition_bytes))
            edges = [file.size_bytes * index // count for index in range(count + 1)]
            splits += [
                Split(path=file.path, format=form, compression=None, start=start, end=end, size_bytes=end - start)
                for start, end in pairwise(edges)
            ]
    return splits


def _row_groups(file: InputFile, partition_bytes: int) -> tuple[list[Split], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_to_read(file.path) as opened:
            reader = pq.ParquetFile(opened)
            metadata, schema = reader.metadata, reader.schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a Parquet file can't be read: {error}", where=file.path) from error
    splits: list[Split] = []
    groups: list[int] = []
    size = 0
    for index in range(metadata.num_row_groups):
        groups.append(index)
        size += metadata.row_group(index).total_byte_size
        if size >= partition_bytes or index == metadata.num_row_groups - 1:
            splits.append(
                Split(
                    path=file.path,
                    format="parquet",
                    compression=None,
                    start=0,
                    end=None,
                    size_bytes=size,
                    row_groups=tuple(groups),
                )
            )
            groups, size = [], 0
    return splits, schema


def _same_columns(first: tuple[str, Any], path: str, schema: Any) -> None:
    if not first[1].equals(schema):
        expected, got = (", ".join(f"{field.name}: {field.type}" for field in one) for one in (first[1], schema))
        raise DataError(
            "a Parquet file has other columns than the first one",
            where=path,
            expected=f"{expected} (as in {first[0]})",
            got=got,
            hint="read files of one kind together; bring others to the same columns first",
        )
