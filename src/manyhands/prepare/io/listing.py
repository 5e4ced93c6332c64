"""Finds input files and divides them into splits.

The division depends only on the data and `partition_bytes`, never on the number of workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import pairwise
from typing import Any

from manyhands.errors import DataError
from manyhands.storage.files import join_path, names_in, open_to_read
from manyhands.storage.location import file_system, is_local


@dataclass(frozen=True, kw_only=True)
class Split:
    """The input of one task: bytes `start` to `end` of a file (None: up to its end), or some of its row groups."""

    path: str
    format: str
    compression: str | None
    start: int
    end: int | None
    size_bytes: int
    row_groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputFile:
    """An input file. `version` (modification time or ETag) changes with its content; it is "" if the store has none."""

    path: str
    size_bytes: int
    version: str


def find_files(patterns: Sequence[str]) -> list[InputFile]:
    """Find the files that paths, folders and globs match, in the order of the patterns and then of the names.

    A folder stands for the files directly in it, except those whose names start with `.` or `_`. Raises DataError if a
    pattern matches no file.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        files = _local_files(pattern) if is_local(pattern) else _remote_files(pattern)
        if not files:
            raise DataError(
                "no file matches",
                where=pattern if not is_local(pattern) else os.path.abspath(pattern),
                expected="a file, a folder with files, or a glob that matches files",
                hint="check the path; globs may contain *, ?, [...], and ** for nested folders",
            )
        found += sorted(files, key=lambda file: _in_order(file.path))
    return found


def _local_files(pattern: str) -> list[InputFile]:
    if os.path.isdir(pattern):
        paths = [join_path(pattern, name) for name in names_in(pattern) if name[0] not in "._"]
    elif has_magic(pattern) and not os.path.exists(pattern):
        paths = sorted(path for path in glob(pattern, recursive=True) if _is_input(path, pattern))
    else:
        paths = [pattern]
    files = []
    for path in paths:
        if os.path.isfile(path):
            info = os.stat(path)
            files.append(InputFile(path, info.st_size, str(info.st_mtime_ns)))
    return files


def _is_input(path: str, pattern: str) -> bool:
    """False for names that start with _ (manifests, events), unless the last part of the pattern starts with _."""
    return path.rpartition("/")[2][:1] != "_" or pattern.rpartition("/")[2][:1] == "_"


def _remote_files(pattern: str) -> list[InputFile]:
    system, inner = file_system(pattern)
    if system.isdir(inner):
        paths = [path for path in system.find(inner, maxdepth=1) if path.rpartition("/")[2][0] not in "._"]
    else:
        if has_magic(inner):
            found = system.glob(inner)
        else:
            found = [inner] if system.isfile(inner) else []
        paths = [path for path in found if _is_input(path, inner)]
    files = []
    for path in sorted(paths):
        info = system.info(path)
        if info["type"] == "file":
            keys = ("ETag", "etag", "mtime", "LastModified", "created")  # the names that fsspec's file systems use
            version = next((info[key] for key in keys if key in info), "")
            files.append(InputFile(system.unstrip_protocol(path), int(info["size"]), str(version)))
    return files


_PART_BEYOND_99999 = re.compile(r"(.*/)?part-([1-9]\d{5,})\.[^/]*")


def _in_order(path: str) -> tuple[str | int, ...]:
    """The key that sorts paths: as text, but output files by their number.

    Their numbers have five digits or more, and as text 100000 would come before 99999.
    """
    match = _PART_BEYOND_99999.fullmatch(path)
    return (path,) if match is None else (f"{match[1] or ''}part-99999~", int(match[2]), path)


def undivided(file: InputFile, form: str, compression: str | None, partition_bytes: int) -> tuple[list[Split], None]:
    """Return one split for the complete file, or no split if the file is empty."""
    if not file.size_bytes:
        return [], None
    split = Split(path=file.path, format=form, compression=compression, start=0, end=None, size_bytes=file.size_bytes)
    return [split], None


def split_lines(file: InputFile, form: str, compression: str | None, partition_bytes: int) -> tuple[list[Split], None]:
    """Divide a file of lines by bytes. A line that crosses the end of a split belongs to the split in which it starts.

    A compressed file is one split.
    """
    if compression or not file.size_bytes:
        return undivided(file, form, compression, partition_bytes)
    count = max(1, round(file.size_bytes / partition_bytes))
    edges = [file.size_bytes * index // count for index in range(count + 1)]
    splits = [
        Split(path=file.path, format=form, compression=None, start=start, end=end, size_bytes=end - start)
        for start, end in pairwise(edges)
    ]
    return splits, None


def split_into_row_groups(
    file: InputFile, form: str, compression: str | None, partition_bytes: int
) -> tuple[list[Split], Any]:
    """Divide a Parquet file into splits of consecutive row groups. Return the splits and the file's schema."""
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
                    format=form,
                    compression=None,
                    start=0,
                    end=None,
                    size_bytes=size,
                    row_groups=tuple(groups),
                )
            )
            groups, size = [], 0
    return splits, schema


def check_same_columns(first: tuple[str, Any], path: str, schema: Any) -> None:
    """Raise DataError if a Parquet file has other columns than the first one. first: its path and schema."""
    if not first[1].equals(schema):
        expected, got = (", ".join(f"{field.name}: {field.type}" for field in one) for one in (first[1], schema))
        raise DataError(
            "a Parquet file has other columns than the first one",
            where=path,
            expected=f"{expected} (as in {first[0]})",
            got=got,
            hint="files that are read together need the same columns: convert them, or read them separately",
        )
