"""Finds zarr stores and netCDF files, and divides them into splits: groups of complete chunks along one dimension.

The division is made from metadata alone. Each step along the dimension becomes a record.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import has_magic
from typing import Any, TypedDict

from manyhands.errors import ConfigError, DataError
from manyhands.prepare.gridded.description import Described, check_same, common_types, describe, slab_of
from manyhands.prepare.gridded.sources import Source, file_of, is_zarr_store, open_source
from manyhands.prepare.io.listing import ArrayRead, InputFile, Split, files_below, matching_folders
from manyhands.storage.files import join_path
from manyhands.storage.location import is_local

_MOST_STEPS = 4  # partitions of more than this many times `partition_bytes` are avoided, if chunks don't fit together

NETCDF_SUFFIXES = (".nc", ".nc4", ".cdf")


class ArrayOptions(TypedDict, total=False):
    """The keyword arguments of `Dataset.read` for zarr stores and netCDF files.

    record: the dimension whose steps are the records. The default is the dimension of time, or the first dimension
        that all variables share.
    tolerance: the largest difference between equal coordinates of several files (default: 0).
    absent: "fill" if chunks that were never written have the fill value of their array, and are counted in the summary;
        "error" if they end the job.
    fill_value: "value" or "missing": the meaning of the fill value of a zarr array of format 2 that has no attribute
        for missing values. By default, the job ends if such an array holds its fill value, unless that is 0 or NaN.
    integers: "keep" or "float". Integers with missing values can't keep their type, so the job ends; with "float",
        variables that may have missing values become floats with NaN.
    """

    record: str
    tolerance: float
    absent: str
    fill_value: str
    integers: str


def checked_options(options: Mapping[str, Any]) -> ArrayOptions:
    """Return the options with their defaults. Raises ConfigError if one is unknown or has a wrong value."""
    choices = {"absent": ("fill", "error"), "fill_value": ("value", "missing"), "integers": ("keep", "float")}
    for name, value in options.items():
        if name in choices and value not in choices[name]:
            raise ConfigError(
                f"{name} of read can't be used", expected=" or ".join(choices[name]), got=repr(value)[:100]
            )
        if name == "record" and not isinstance(value, str):
            raise ConfigError("record of read can't be used", expected="the name of a dimension", got=repr(value)[:100])
        if name == "tolerance" and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise ConfigError(
                "tolerance of read can't be used", expected="a number of at least 0", got=repr(value)[:100]
            )
        if name not in ArrayOptions.__annotations__:
            raise ConfigError(f"read has no argument {name!r}", expected=", ".join(ArrayOptions.__annotations__))
    return ArrayOptions(**{"tolerance": 0.0, "absent": "fill", "integers": "keep", **options})  # type: ignore[typeddict-item]


def check_no_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if there are options for arrays, because the input has none."""
    checked_options(options)
    if options:
        hint = "leave it out, or set format='zarr' or format='netcdf'"
        raise ConfigError("an argument of read applies to zarr and netCDF only", got=", ".join(options), hint=hint)


def is_netcdf(path: str) -> bool:
    """Return True if the suffix is that of a netCDF file."""
    return os.path.splitext(path)[1].lower() in NETCDF_SUFFIXES


def zarr_stores(patterns: Sequence[str], given: str | None) -> list[str] | None:
    """Return the folders of the zarr stores that these paths and globs name, or None if they name other files.

    given: the format, if the caller specified it. Raises ConfigError for the address of a netCDF file.
    """
    away = next((path for path in patterns if not is_local(path) and (given == "netcdf" or is_netcdf(path))), None)
    if away is not None:
        hint = "copy the file to this machine, or convert it to zarr"
        raise ConfigError("netCDF files are read from disks only", where=away, hint=hint)
    if given not in (None, "zarr"):
        return None
    stores: list[str] = []
    for pattern in patterns:
        found = [pattern.rstrip("/")]
        if is_local(pattern) and has_magic(pattern) and not os.path.lexists(pattern):
            found = [folder for folder in matching_folders(pattern) if is_zarr_store(folder)]
        named = given == "zarr" or pattern.rstrip("/").lower().endswith(".zarr")
        if not named and not all(is_local(folder) and is_zarr_store(folder) for folder in found):
            return None
        stores += found
    if not stores and given == "zarr":
        raise DataError(
            "no zarr store matches", where=", ".join(patterns)[:200], expected="folders with .zgroup or zarr.json"
        )
    return stores or None


def plan_arrays(
    paths: Sequence[str], form: str, columns: Sequence[str] | None, partition_bytes: int, options: ArrayOptions
) -> tuple[list[InputFile], list[Split], tuple[str, ...]]:
    """Return the files that identify the input, its splits, and the names of the columns.

    paths: the folders of stores, or netCDF files. Raises DataError if they can't be read together.
    """
    files: list[InputFile] = []
    splits: list[Split] = []
    described: list[Described] = []
    for path in paths:
        with open_source(path, form) as source:
            columns = columns if not described else described[0].columns
            record = options.get("record") if not described else described[0].record
            described.append(
                describe(
                    source,
                    columns,
                    record,
                    fill_value=options.get("fill_value"),
                    integers=options["integers"],
                )
            )
            if options["absent"] == "error":
                _refuse_shards(described[-1])
            check_same(described[0], described[-1], options["tolerance"])
            files.append(_identifying(source, form, described[-1]))
            splits += _splits(
                source, form, described[-1], partition_bytes, options, sum(each.size for each in described[:-1])
            )
    types = common_types(described, options["integers"])
    text_times = any(each.has_text_times for each in described)
    settled = [
        replace(split, arrays=replace(split.arrays, types=types, text_times=text_times))
        for split in splits
        if split.arrays is not None
    ]
    first = described[0]
    return files, settled, (first.record, *(name for name in first.columns if name != first.record))


def _refuse_shards(described: Described) -> None:
    sharded = next((name for name in described.columns if described.variables[name].has_shards), None)
    if sharded is not None:
        raise DataError(
            f"absent chunks of {sharded!r} can't be found, because it has shards",
            where=described.path,
            expected="an array without shards, because of absent='error'",
            hint="leave out absent='error'; then the cells of absent chunks have the fill value of the array",
        )


def _splits(
    source: Source, form: str, described: Described, partition_bytes: int, options: ArrayOptions, before: int
) -> list[Split]:
    """Divide a source into splits. before: the number of steps in earlier files."""
    record = described.record
    step_bytes = max(1, described.step_bytes)
    unit = math.lcm(*described.units)
    if unit * step_bytes > _MOST_STEPS * partition_bytes:
        unit = max(described.units)  # chunks that lie across two splits are read twice
    steps = unit * max(1, partition_bytes // (unit * step_bytes))
    splits = []
    for start in range(0, described.size, steps):
        end = min(start + steps, described.size)
        read = ArrayRead(
            record=record,
            before=before,
            unit=unit,
            step_bytes=step_bytes,
            version=slab_version(source, described.columns, record, start, end),
            absent=options["absent"],
            fill_value=options.get("fill_value"),
            integers=options["integers"],
        )
        splits.append(
            Split(
                path=file_of(source.path, form),
                format=form,
                compression=None,
                start=start,
                end=end,
                size_bytes=(end - start) * step_bytes,
                arrays=read,
            )
        )
    return splits


def slab_version(source: Source, columns: Sequence[str], record: str, start: int, end: int) -> str:
    """Return a hash of the sizes and times of the files of some steps: chunks and metadata of the columns.

    Return "" for a store at an address, and for a netCDF file, which is checked as a whole.
    """
    if not is_local(source.path) or os.path.isfile(source.path):
        return ""
    digest = hashlib.sha256()
    for name in dict.fromkeys((record, *columns)):
        if name not in source.variables:
            continue
        keys = [key for key, _ in source.chunk_keys(name, slab_of(source.variables[name], record, start, end))]
        for key in (*(f"{name}/{file}" for file in (".zarray", ".zattrs", "zarr.json")), *keys):
            try:
                info = os.stat(join_path(source.path, key))
                digest.update(f"{key} {info.st_size} {info.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(f"{key} absent\n".encode())
    return digest.hexdigest()


def _identifying(source: Source, form: str, described: Described) -> InputFile:
    """Return the netCDF file, or the root metadata of a store, which identifies a source together with its splits."""
    if form == "zarr" and not is_local(source.path):
        return _remote_version(source, described)
    path = file_of(source.path, form)
    info = os.stat(path)
    return InputFile(path, info.st_size, str(info.st_mtime_ns))


def _remote_version(source: Source, described: Described) -> InputFile:
    """Return the root metadata of a store at an address, with the versions of all files of its columns."""
    digest, size = hashlib.sha256(), 0
    for name in (*described.columns, *([described.record] if described.record in source.variables else [])):
        for file in files_below(join_path(source.path, name)):
            digest.update(f"{file.path} {file.size_bytes} {file.version}\n".encode())
            size += file.size_bytes
    return InputFile(file_of(source.path, "zarr"), size, digest.hexdigest())
