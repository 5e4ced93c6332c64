"""What the records of a zarr store or a netCDF file are: the dimension of records, and the columns with their types.

Files that are read together must have the same columns, dimensions, coordinates, units and calendar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import DataError
from manyhands.prepare.gridded.coordinates import STANDARD_CALENDARS, calendar_of, decode_coordinate
from manyhands.prepare.gridded.decoding import decoded, reading_attributes
from manyhands.prepare.gridded.sources import Source, Variable
from manyhands.storage.files import join_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_COORDINATES = 1 << 27
"""The maximum number of values of a coordinate that is read as a whole: 1 GiB of float64."""

MOST_CHUNKS = 1 << 28
"""The maximum number of chunks of a variable. Planning takes a time proportional to it."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """The columns of one source.

    size: the number of steps of `record`. types: the types of the columns' values. units: the number of steps in each
    column's chunks. step_bytes: the size of one record. coordinates: the values along the other dimensions.
    calendar: that of the record dimension, or None. has_text_times: True if its times have no NumPy type.
    """

    path: str
    record: str
    size: int
    columns: tuple[str, ...]
    variables: Mapping[str, Variable]
    types: Mapping[str, np.dtype[Any]]
    units: tuple[int, ...]
    step_bytes: int
    coordinates: Mapping[str, NDArray[Any]]
    calendar: str | None
    has_text_times: bool


def slab_of(variable: Variable, record: str, start: int, end: int) -> tuple[slice, ...]:
    """Return the part of a variable that holds some steps."""
    return tuple(
        slice(start, end) if dim == record else slice(0, size)
        for dim, size in zip(variable.dims, variable.shape, strict=True)
    )


def describe(
    source: Source,
    columns: Sequence[str] | None,
    record: str | None,
    *,
    fill_value: str | None = None,
    integers: str = "keep",
) -> Described:
    """Describe the columns of a source.

    columns: their names, or None for all variables with the dimension of records that are no coordinates. record: the
    dimension of records, or None to choose it. fill_value, integers: see `ArrayOptions`; they decide the types.
    Raises DataError.
    """
    names = _chosen(source, columns)
    record = _record(source, names, record)
    if columns is None:
        names = tuple(name for name in names if record in source.variables[name].dims)
    found = [source.variables[name] for name in names]
    _check_columns(found, record, source)
    sizes = {size for each in found for dim, size in zip(each.dims, each.shape, strict=True) if dim == record}
    if len(sizes) > 1:
        raise DataError(f"variables have different sizes along {record!r}", where=source.path, got=str(sorted(sizes)))
    types = {each.name: _type_of(each, fill_value, integers) for each in found}
    inner = sorted({dim for each in found for dim in each.dims if dim != record})
    units = [1]
    for each in found:
        if each.units is not None:
            units.append(max(1, each.units[each.dims.index(record)]))
    times = source.variables.get(record)
    calendar = None if times is None else calendar_of(times.attributes)
    return Described(
        path=source.path,
        record=record,
        size=sizes.pop(),
        columns=names,
        variables={name: source.variables[name] for name in (*names, *inner, record) if name in source.variables},
        types=types,
        units=tuple(units),
        step_bytes=sum(types[each.name].itemsize * prod(_inner_shape(each, record)) for each in found),
        coordinates={dim: _values(source, dim) for dim in inner if dim in source.variables},
        calendar=calendar,
        has_text_times=_has_text_times(source, record, calendar),
    )


def _chosen(source: Source, columns: Sequence[str] | None) -> tuple[str, ...]:
    if columns is not None:
        unknown = next((name for name in columns if name not in source.variables), None)
        if unknown is not None:
            known = ", ".join(source.variables)[:300]
            raise DataError(f"there is no variable {unknown!r}", where=source.path, expected=f"one of {known}")
        return tuple(columns)
    described: set[str] = set()
    for attributes in (source.attributes, *(each.attributes for each in source.variables.values())):
        for name in ("coordinates", "bounds", "climatology", "grid_mapping"):
            described.update(str(attributes.get(name, "")).split())
    dims = {dim for each in source.variables.values() for dim in each.dims}
    return tuple(
        name for name, each in source.variables.items() if name not in dims and name not in described and each.dims
    )


def _record(source: Source, names: Sequence[str], given: str | None) -> str:
    """Return the dimension of records: the given one, the first with times, or the first that all variables share."""
    variables = [source.variables[name] for name in names]
    dims = list(dict.fromkeys(dim for each in variables for dim in each.dims))
    if given is not None:
        if given not in dims:
            raise DataError(
                f"no variable has the dimension {given!r}", where=source.path, got=", ".join(dims) or "none"
            )
        return given
    shared = [dim for dim in dims if all(dim in each.dims for each in variables)]
    times = [dim for dim in dims if dim in source.variables and calendar_of(source.variables[dim].attributes)]
    found = next((dim for dim in [*times, *shared] if dim in shared or dim in times), None)
    if found is None:
        raise DataError(
            "the variables share no dimension, so there are no records",
            where=source.path,
            got="; ".join(f"{each.name}: {', '.join(each.dims) or 'no dimension'}" for each in variables)[:300]
            or "none",
            hint="choose variables with columns=[...], and the dimension of records with record='...'",
        )
    return found


def _check_columns(variables: Sequence[Variable], record: str, source: Source) -> None:
    if not variables:
        raise DataError(f"no variable has the dimension {record!r}", where=source.path, got=", ".join(source.variables))
    for each in variables:
        if record not in each.dims:
            raise DataError(
                f"variable {each.name!r} has no dimension {record!r}, so it has no value for each record",
                where=source.path,
                got=", ".join(each.dims) or "no dimension",
                hint="leave it out with columns=[...], or choose another dimension with record='...'",
            )
        chunks = prod(-(-size // unit) for size, unit in zip(each.shape, each.units or each.shape, strict=True) if size)
        if chunks > MOST_CHUNKS:
            raise DataError(
                f"variable {each.name!r} has too many chunks",
                where=source.path,
                expected=f"at most {MOST_CHUNKS:,}",
                got=f"the shape {each.shape}, in chunks of {each.units}",
                hint="the metadata may be damaged; leave the variable out with columns=[...]",
            )
        if each.dtype.kind not in "biuf" and each.dims != (record,):
            raise DataError(
                f"variable {each.name!r} holds no numbers",
                where=source.path,
                got=str(each.dtype),
                hint="leave it out with columns=[...]",
            )


def _inner_shape(variable: Variable, record: str) -> list[int]:
    return [size for dim, size in zip(variable.dims, variable.shape, strict=True) if dim != record]


def _type_of(variable: Variable, fill_value: str | None, integers: str) -> np.dtype[Any]:
    """Return the type of a variable's decoded values."""
    if variable.dtype.kind not in "biuf":
        return variable.dtype
    none = np.empty((0,), variable.dtype.newbyteorder("="))
    attributes = reading_attributes(variable.attributes, none.dtype, variable.fill, fill_value)
    return decoded(none, attributes, integers_as_floats=integers == "float").dtype


def coordinate_numbers(source: Source, name: str) -> NDArray[Any]:
    """Return all values of a coordinate, with missing values decoded, but times still as numbers.

    Raises DataError for a coordinate with too many values, and for values along a dimension that were never written.
    """
    variable = source.variables[name]
    if prod(variable.shape) > MOST_COORDINATES:
        raise DataError(
            f"coordinate {name!r} has too many values",
            where=source.path,
            expected=f"at most {MOST_COORDINATES:,}",
            got=f"the shape {variable.shape}",
            hint="the metadata may be damaged; leave out variables with this dimension with columns=[...]",
        )
    cells = tuple(slice(0, size) for size in variable.shape)
    source.absent.clear()
    values = source.read(name, cells)
    if variable.dims == (name,):
        _check_written(source, variable, cells)
    return decoded(values, variable.attributes) if values.dtype.kind in "iuf" else values


def _check_written(source: Source, variable: Variable, cells: tuple[slice, ...]) -> None:
    """Raise DataError if two or more values along a dimension were never written.

    A single one may be equal to the fill value. Writers don't store such a chunk, for example of the coordinate [0].
    """
    absent = [(key, start) for key, start in source.chunk_keys(variable.name, cells) if key in source.absent]
    unit, size = (variable.units or (1,))[0], variable.shape[0]
    if sum(min(unit, size - start) for _, (start,) in absent) > 1:
        raise DataError(
            f"values of the coordinate {variable.name!r} were never written",
            where=join_path(source.path, absent[0][0]),
            expected="a file for each chunk of a coordinate, because its values differ",
            hint="write the coordinate again, or restore the file from a copy of the store",
        )


def _values(source: Source, dim: str) -> NDArray[Any]:
    """Return the values along a dimension."""
    return decode_coordinate(coordinate_numbers(source, dim), source.variables[dim].attributes)


def _has_text_times(source: Source, record: str, calendar: str | None) -> bool:
    """Return True if the first or the last time can't be a NumPy time, because of the calendar or the year."""
    if calendar is None:
        return False
    if calendar not in STANDARD_CALENDARS:
        return True
    variable = source.variables[record]
    last = variable.shape[0] - 1 if variable.shape else -1
    ends = [source.read(record, (slice(at, at + 1),)) for at in {0, last} if last >= 0]
    return any(decode_coordinate(each, variable.attributes).dtype.kind != "M" for each in ends)


def check_same(first: Described, other: Described, tolerance: float) -> None:
    """Raise DataError unless two sources have the same dimensions, coordinates, units and calendar.

    tolerance: the largest difference between coordinates that count as equal.
    """
    calendars = [_family(each.calendar) for each in (first, other)]
    if calendars[0] != calendars[1]:
        raise _differs("calendars of", first.record, first, other, (str(first.calendar), str(other.calendar)))
    for name in first.columns:
        one, two = ((each.variables[name], each.record) for each in (first, other))
        if _inner_dims(*one) != _inner_dims(*two):
            raise _differs("dimensions of", name, first, other, (_inner_dims(*one), _inner_dims(*two)))
    for name in first.variables:
        units = [
            each.variables[name].attributes.get("units") if name in each.variables else None for each in (first, other)
        ]
        if units[0] != units[1] and not (name == first.record and first.calendar):
            raise _differs("units of", name, first, other, (str(units[0]), str(units[1])))
    for dim, values in first.coordinates.items():
        found = other.coordinates.get(dim)
        if found is None or found.shape != values.shape:
            raise _differs(
                "coordinates of", dim, first, other, (str(values.shape), str(getattr(found, "shape", "none")))
            )
        _check_close(dim, values, found, first, other, tolerance)


def _check_close(
    dim: str, values: NDArray[Any], found: NDArray[Any], first: Described, other: Described, tolerance: float
) -> None:
    if values.dtype.kind in "iuf" and found.dtype.kind in "iuf":
        difference = np.abs(values.astype("f8") - found.astype("f8"))
        wrong = ~((values == found) | (difference <= tolerance))
    else:
        wrong = np.atleast_1d(values != found)
    if not wrong.any():
        return
    at = tuple(int(each) for each in np.argwhere(wrong)[0])
    got = f"{found[at]!s} in {other.path}"
    hint = "use a regridded file, or read the files separately"
    if values.dtype.kind in "iuf" and found.dtype.kind in "iuf":
        got += f"; the difference is {difference[at]:.3g}, and the largest is {np.nanmax(difference):.3g}"
        hint = (
            f"if they differ by rounding only, use tolerance={np.nanmax(difference) * 2:.1g}; otherwise, regrid a file"
        )
    raise DataError(
        f"two files have different coordinates along {dim!r}",
        where=f"position {', '.join(map(str, at))} of {dim!r}",
        expected=f"{values[at]!s}, as in {first.path}",
        got=got,
        hint=hint,
    )


def _family(calendar: str | None) -> str | None:
    return "standard" if calendar in STANDARD_CALENDARS else calendar


def _inner_dims(variable: Variable, record: str) -> str:
    pairs = zip(variable.dims, variable.shape, strict=True)
    return ", ".join(f"{dim} {size}" for dim, size in pairs if dim != record)


def _differs(what: str, name: str, first: Described, other: Described, values: tuple[str, str]) -> DataError:
    return DataError(
        f"two files have different {what} {name!r}",
        where=other.path,
        expected=f"{values[0]}, as in {first.path}",
        got=values[1],
        hint="read the files separately, or convert one of them",
    )


def common_types(described: Sequence[Described], integers: str) -> tuple[tuple[str, str], ...]:
    """Return the types of the columns whose types differ between sources: the widest of floats, or of integers.

    integers: "float" if integers become floats where another file has floats. Otherwise, a column of floats in one file
    and integers in another raises DataError.
    """
    found = []
    for name in described[0].columns:
        kinds = [each.types[name] for each in described]
        if all(kind == kinds[0] for kind in kinds):
            continue
        other = next((each for each in described if each.types[name].kind != kinds[0].kind), None)
        mixed = integers == "float" and any(kind.kind == "f" for kind in kinds)
        if other is not None and not (mixed and all(kind.kind in "iuf" for kind in kinds)):
            raise _differs("types of", name, described[0], other, (str(kinds[0]), str(other.types[name])))
        found.append((name, np.result_type(*kinds).str))
    return tuple(found)
