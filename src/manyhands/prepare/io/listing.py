"""Finds input files and divides them into splits.

The division depends only on the data and `partition_bytes`, not on the number of workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape, has_magic
from itertools import pairwise
from typing import Any

from manyhands.errors import ConfigError, DataError, ManyhandsError
from manyhands.prepare.io.manifest import read_output_manifest
from manyhands.prepare.records.data_frames import is_foreign_table
from manyhands.prepare.records.schemas import common_schema, schema_to_text
from manyhands.prepare.records.unfit import Unfit
from manyhands.storage.files import join_path, names_in, open_to_read
from manyhands.storage.http_file import http_info, is_http
from manyhands.storage.location import file_system, is_local, location_of


@dataclass(frozen=True, kw_only=True)
class ArrayRead:
    """How a split of a zarr store or a netCDF file is read. `Split.start` and `end` are steps along `record`.

    before: the number of steps in earlier files. unit: the number of steps that are read together, because chunks hold
    them. step_bytes: the size of a step. version: see `slab_version`. types: the types of columns whose types differ
    between files. text_times: True if times are text, because NumPy has no type for their calendar. absent, fill_value,
    integers: see `ArrayOptions`.
    """

    record: str
    before: int
    unit: int
    step_bytes: int
    version: str
    types: tuple[tuple[str, str], ...] = ()
    text_times: bool = False
    absent: str
    fill_value: str | None
    integers: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """The input of one task: bytes `start` to `end` of a file, or some of its row groups. If `end` is None, the split
    extends to the end of the file.

    schema: the columns to read, if the columns of the file have other types (see `schema_to_text`). arrays: how arrays
    are read.
    """

    path: str
    format: str
    compression: str | None
    start: int
    end: int | None
    size_bytes: int
    row_groups: tuple[int, ...] = ()
    schema: str | None = None
    arrays: ArrayRead | None = None


@dataclass(frozen=True)
class InputFile:
    """An input file.

    `version` (modification time or ETag) changes with its content, and is "" if the store has no version.
    """

    path: str
    size_bytes: int
    version: str


def check_unchanged(file: InputFile) -> None:
    """Raise DataError if a local file has changed since it was listed, because its splits and identity are then
    invalid.
    """
    if not is_local(file.path):
        return
    try:
        info = os.stat(file.path)
        found = InputFile(file.path, info.st_size, str(info.st_mtime_ns))
    except OSError:
        return  # reading the file will report the reason
    if found != file:
        raise DataError(
            "a file has changed since it was listed",
            where=file.path,
            expected=f"{file.size_bytes} bytes",
            got=f"{found.size_bytes} bytes" + ("" if found.size_bytes != file.size_bytes else ", written later"),
            hint="run the job again when nothing writes to its input",
        )


def folder_of(folder: str | os.PathLike[str]) -> str:
    """Return a folder as text: a path or an address. Raises ConfigError for other values."""
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError("a folder is not a path", expected="text or pathlib.Path", got=repr(folder)[:200])
    return folder if isinstance(folder, str) else str(location_of(folder))


def patterns_of(paths: Any) -> list[str]:
    """Return the paths that a caller passed, as a list of texts. A path is text, or an object such as pathlib.Path.

    Raises ConfigError if `paths` is neither a path nor a list of paths.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    hint = "pass a path, or a list of paths; for objects in memory use Dataset.from_records"
    if not isinstance(paths, Iterable) or isinstance(paths, (bytes, Mapping, Set)) or is_foreign_table(paths):
        raise ConfigError("read takes paths", expected="a path, or a list of paths", got=_kind(paths), hint=hint)
    given = list(paths)
    if not given:
        raise ConfigError("there are no paths to read", got=repr(paths)[:100], hint=hint)
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError("read takes paths", expected="a path, or a list of paths", got=_kind(path), hint=hint)
    # location_of refuses a Path of an address, which has lost one of its slashes.
    return [(path if isinstance(path, str) else str(location_of(path))).removeprefix("file://") for path in given]


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def find_files(patterns: Sequence[str]) -> list[InputFile]:
    """Find the files that paths, folders and globs match, ordered by pattern and then by name.

    A folder matches the files directly in it. A name that exists is never a glob, even if it contains brackets. Folders
    and wildcards do not match names that start with `.` or `_`, unless the pattern contains this character. Raises
    DataError if a pattern matches no file, unless it is the folder of an output without records.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        files = _local_files(pattern) if is_local(pattern) else _remote_files(pattern)
        if not files and not _is_empty_output(pattern):
            raise DataError(
                "no file matches",
                where=pattern if not is_local(pattern) else os.path.abspath(pattern),
                expected="a file, a folder with files, or a glob that matches files",
                hint="check the path; globs may contain *, ?, [...], and ** for nested folders; they don't match names "
                "that start with _ or . unless the pattern does, as in _*",
            )
        found += sorted(files, key=lambda file: _in_order(file.path))
    return found


def _is_empty_output(folder: str) -> bool:
    """Return True if the folder holds the output of a job that wrote no records, and therefore no files."""
    manifest = read_output_manifest(folder) or {}
    return manifest.get("files") == [] and manifest.get("records") == 0


def _local_files(pattern: str) -> list[InputFile]:
    if os.path.isdir(pattern):
        paths = [join_path(pattern, name) for name in names_in(pattern) if name[0] not in "._"]
    elif has_magic(pattern) and not os.path.lexists(pattern):
        paths = _matching_paths(pattern)
    else:
        paths = [pattern]
    files = []
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise DataError(
                "a link leads to no file",
                where=path,
                got=os.readlink(path),
                hint="remove the link, or restore its file",
            )
        if os.path.isfile(path):
            info = os.stat(path)
            files.append(InputFile(path, info.st_size, str(info.st_mtime_ns)))
    return files


def _matching_paths(pattern: str) -> list[str]:
    """Return the paths that a glob matches, sorted.

    Links are followed, unless they lead to a folder that contains the link.
    """
    folder = _literal_folder(pattern, os.path.isdir)
    parts = [part for part in pattern[len(folder) :].split("/") if part]
    try:
        return sorted(set(_expand(folder or ("/" if pattern.startswith("/") else ""), parts)))
    except OSError as error:
        raise DataError(
            f"a folder can't be listed: {error}", where=pattern, hint="allow reading the folder, or narrow the glob"
        ) from error


def matching_folders(pattern: str) -> list[str]:
    """Return the local folders that a glob matches, sorted."""
    return [path for path in _matching_paths(pattern) if os.path.isdir(path)]


def files_below(address: str) -> list[InputFile]:
    """Return all objects below an address of a store, at any depth, sorted. Raises DataError."""
    system, inner = file_system(address)
    try:
        system.invalidate_cache()
        found = system.find(inner, detail=True)
    except Exception as error:  # the packages of stores raise their own exceptions
        raise _not_listed(address, error) from error
    return [InputFile(path, int(info.get("size") or 0), _version(info)) for path, info in sorted(found.items())]


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the paths below a folder ("" is the working directory) that match the parts of a glob."""
    first, rest = parts[0], parts[1:]
    if not has_magic(first):
        path = os.path.join(folder, first)
        if not rest:
            yield from [path] if os.path.lexists(path) else []
        elif os.path.isdir(path):
            yield from _expand(path, rest)
        return
    if first == "**" and rest:
        yield from _expand(folder, rest)
    if not os.path.isdir(folder or "."):
        return  # the folder is missing or is a file, so nothing matches
    with os.scandir(folder or ".") as entries:
        found = [
            (os.path.join(folder, entry.name), entry.is_dir()) for entry in entries if _may_match(first, entry.name)
        ]
    for path, is_folder in found:
        if not rest:
            yield path
        if is_folder and (rest or first == "**") and not (first == "**" and _leads_up(path)):
            yield from _expand(path, parts if first == "**" else rest)


def _may_match(part: str, name: str) -> bool:
    """Return True if a wildcard matches the name of a file or folder.

    Names that start with `_` or `.` belong to tools (manifests, `_temporary`, `_delta_log`). Only a part that starts
    with the same character matches them.
    """
    if name[0] in "._" and name[0] != part[0]:
        return False
    return part == "**" or fnmatchcase(name, part)


def _leads_up(path: str) -> bool:
    """Return True if the path is a link to a folder that contains the link. Following the link would never end."""
    if not os.path.islink(path):
        return False
    return f"{os.path.realpath(os.path.dirname(path) or '.')}/".startswith(f"{os.path.realpath(path).rstrip('/')}/")


def _literal_folder(pattern: str, is_folder: Callable[[str], bool]) -> str:
    """Return the longest start of a glob that names an existing folder, such as `run[1]` in `run[1]/*.csv`."""
    position = pattern.rfind("/")
    while position > 0:
        if not has_magic(pattern[:position]) or is_folder(pattern[:position]):
            return pattern[:position]
        position = pattern.rfind("/", 0, position)
    return ""


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that returns False for a path in which a wildcard matches a name that `_may_match` excludes."""

    def matches(parts: Sequence[str], names: Sequence[str]) -> bool:
        if not parts or not names:
            return not names and all(part == "**" for part in parts)
        if parts[0] == "**":
            return matches(parts[1:], names) or (_may_match("**", names[0]) and matches(parts, names[1:]))
        fits = _may_match(parts[0], names[0]) if has_magic(parts[0]) else parts[0] == names[0]
        return fits and matches(parts[1:], names[1:])

    parts = [part for part in pattern.split("/") if part]
    return lambda path: matches(parts, [name for name in path.split("/") if name])


def _remote_files(pattern: str) -> list[InputFile]:
    try:
        return _listed(pattern)
    except ManyhandsError:
        raise
    except Exception as error:  # the packages of stores raise their own exceptions
        raise _not_listed(pattern, error) from error


def _not_listed(address: str, error: Exception) -> DataError:
    return DataError(
        f"the address can't be listed: {error or type(error).__name__}",
        where=address,
        hint="check the address, the network, and the credentials for the store",
    )


def _listed(pattern: str) -> list[InputFile]:
    system, inner = file_system(pattern)
    if is_http(system) and not pattern.endswith("/"):
        if (known := http_info(system, inner)) is not None:
            return [InputFile(pattern, *known)]
        if not has_magic(inner):
            return []
    system.invalidate_cache()  # this process may have listed the store before
    if system.isdir(inner):
        found = system.find(inner, maxdepth=1, detail=True)
        paths = [path for path in found if path.rstrip("/").rpartition("/")[2][:1] not in ("", ".", "_")]
    elif system.isfile(inner):
        found = {inner: system.info(inner)}
        paths = [inner]
    elif has_magic(inner):
        folder = _literal_folder(inner, system.isdir)
        escaped = escape(folder) + inner[len(folder) :]
        found = system.glob(escaped, detail=True)
        paths = list(filter(_matcher(escaped), found))
    else:
        return []
    files = []
    for path in sorted(paths):
        info = found[path] if found[path].get("size") is not None else system.info(path)
        if info["type"] == "file" and not _is_folder_marker(path, inner, info):
            files.append(InputFile(system.unstrip_protocol(path), int(info["size"]), _version(info)))
    return files


_PART_BEYOND_99999 = re.compile(r"(.*/)?part-([1-9]\d{5,})\.[^/]*")


def _in_order(path: str) -> tuple[str | int, ...]:
    """Return the key that sorts paths. It sorts paths as text, but output files by their number.

    The numbers have five digits or more, and as text 100000 would precede 99999.
    """
    match = _PART_BEYOND_99999.fullmatch(path)
    return (path,) if match is None else (f"{match[1] or ''}part-99999~", int(match[2]), path)


def _is_folder_marker(path: str, folder: str, info: Mapping[str, Any]) -> bool:
    """Return True if a path is an empty object that a tool has written so that a folder seems to exist."""
    return not info["size"] and (path.endswith(("/", "_$folder$")) or path.strip("/") == folder.strip("/"))


def _version(info: Mapping[str, Any]) -> str:
    """Return a value that changes with the content of an object. fsspec's file systems have different names for it."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "modified", "created")
    return str(next((info[key] for key in keys if info.get(key) is not None), ""))


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
    names = schema.names
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(
            f"a Parquet file has two columns named {twice!r}",
            where=file.path,
            hint="rename one: a record has one value of each name",
        )
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


def with_common_schema(splits: Sequence[Split], schemas: Mapping[str, Any]) -> list[Split]:
    """Return the splits, with the common schema for each split whose file has another schema.

    The order of columns, nullability and metadata may differ. Types may differ if one of them holds all values of the
    others, because all values are null, or because numbers or text have other widths.

    schemas: the schemas of all files by path, in the order of the files. Raises DataError if a file has
    different columns than the first file.
    """
    first = next(iter(schemas.items()), ("", None))
    common = first[1]
    for path, schema in schemas.items():
        if not schema.equals(common):
            common = _common_schema(first, common, path, schema)
    text = "" if common is None else schema_to_text(common)
    return [
        replace(split, schema=text) if split.path in schemas and not schemas[split.path].equals(common) else split
        for split in splits
    ]


def _common_schema(first: tuple[str, Any], common: Any, path: str, schema: Any) -> Any:
    try:
        if sorted(common.names) == sorted(schema.names) and len(set(schema.names)) == len(schema.names):
            return common_schema(common, schema, strict=True)
    except Unfit:
        pass
    expected, got = (", ".join(f"{field.name}: {field.type}" for field in one) for one in (common, schema))
    raise DataError(
        "a file has different columns than the first one",
        where=path,
        expected=f"{expected} (as in {first[0]})",
        got=got,
        hint="convert the files, or read them separately, because files that are read together need the same columns",
    )
