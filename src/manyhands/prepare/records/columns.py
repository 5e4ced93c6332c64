"""Converts columns from Python values to Arrow arrays and back, without changing a value.

pyarrow silently converts many values: 1.7 to the integer 1, a datetime after a date to a date, text after bytes to
bytes. So the kinds of the values are checked before pyarrow converts them. The conversion back must not depend on
pandas, but pyarrow returns objects of pandas for nanoseconds if pandas is installed.
"""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from manyhands.errors import DataError
from manyhands.prepare.records.array_columns import arrays_of, is_array_column, is_tensor, tensors_of

_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (  # the first matching entry is used
    (type(None), "null"),
    ((bool, np.bool_), "true or false"),
    (np.datetime64, "NumPy datetimes"),
    (np.timedelta64, "NumPy time differences"),
    ((int, np.integer), "whole numbers"),
    ((float, np.floating), "floats"),
    (str, "text"),
    ((bytes, bytearray, memoryview), "bytes"),
    (decimal.Decimal, "decimals"),
    (dt.datetime, "datetimes"),
    (dt.date, "dates"),
    (dt.time, "times"),
    (dt.timedelta, "time differences"),
    (uuid.UUID, "UUIDs"),
    (Mapping, "dicts"),
    ((set, frozenset), "sets"),
    ((list, tuple, np.ndarray), "lists"),
)

_FORMS = "times in whole microseconds, in the years 1 to 9999"

_MIXED = ({"whole numbers", "floats"}, {"whole numbers", "decimals"})  # Arrow refuses values that it can't hold exactly

_HOLDS_DATES = (pat.is_date32, pat.is_date64)

_HOLDS_TEXT = (pat.is_string, pat.is_large_string, pat.is_string_view)

_HOLDS_BYTES = (pat.is_binary, pat.is_large_binary, pat.is_fixed_size_binary, pat.is_binary_view)

# The kinds of Arrow types that hold each kind of value. Whole numbers in columns of times are numbers of the column's
# unit.
_HOLD: dict[str, tuple[Callable[[Any], bool], ...]] = {
    "true or false": (pat.is_boolean,),
    "NumPy datetimes": (pat.is_timestamp,),
    "NumPy time differences": (pat.is_duration,),
    "whole numbers": (pat.is_integer, pat.is_floating, pat.is_decimal, pat.is_temporal),
    "floats": (pat.is_floating, pat.is_integer),
    "text": (*_HOLDS_TEXT, *_HOLDS_BYTES),
    "bytes": (*_HOLDS_BYTES, *_HOLDS_TEXT),
    "decimals": (pat.is_decimal, pat.is_integer),
    "datetimes": (pat.is_timestamp, *_HOLDS_DATES),
    "dates": _HOLDS_DATES,
    "times": (pat.is_time,),
    "time differences": (pat.is_duration,),
    "dicts": (pat.is_struct, pat.is_map),
    "lists": (
        pat.is_list,
        pat.is_large_list,
        pat.is_fixed_size_list,
        pat.is_list_view,
        pat.is_large_list_view,
        pat.is_map,
    ),
}


def array_of(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Return values as an Arrow array of this type, or of the type that pyarrow infers.

    NumPy arrays become a tensor column, unless the type is a type of lists.
    Raises ValueError, TypeError, OverflowError or ArrowException if the array would not hold the same values.
    """
    if is_tensor(kind) or (kind is None and is_array_column(values)):
        return tensors_of(values, kind)
    return lists_of(values, kind)


def lists_of(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Do the same as `array_of`, but treat NumPy arrays of one dimension as lists."""
    _check(values, kind)
    return pa.array(values, kind)


@lru_cache(maxsize=4096)
def _name_of_kind(kind: type) -> str:
    if kind.__name__ in ("NaTType", "NAType") and kind.__module__.startswith("pandas"):
        return "null"
    return next((name for types, name in _NAMES if issubclass(kind, types)), f"objects of type {kind.__name__}")


def _check(values: Sequence[Any], kind: pa.DataType | None) -> None:
    """Raise ValueError if pyarrow would change one of the values when it puts them into one array."""
    found = _kinds(values)
    kind = _checked_kind(found, kind)
    if _must_look(found, kind):
        _check_values(found, values, kind)


def _kinds(values: Iterable[Any]) -> set[str]:
    return {_name_of_kind(each) for each in set(map(type, values))} - {"null"}


def _checked_kind(found: set[str], kind: pa.DataType | None) -> Any:
    """Return the type of the values, or None if unknown.

    Raise ValueError if no type, or not the given type, holds these kinds.
    """
    if "sets" in found:  # pyarrow would write them in an order that differs between processes
        raise ValueError("it has sets, whose items have no fixed order: use sorted lists")
    if len(found) > 1 and found not in _MIXED:
        raise ValueError(f"it has {' and '.join(sorted(found))}, which have no common type")
    if kind is not None and pat.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        kind = None if found == {"UUIDs"} else kind.storage_type
    for name in found if kind is not None else ():
        # Kinds without an entry are left to pyarrow, except in columns of numbers and times.
        if not any(holds(kind) for holds in _HOLD.get(name, ())) and (name in _HOLD or pat.is_primitive(kind)):
            raise ValueError(f"it has {name}, and its type is {kind}")
    return kind


def _must_look(found: set[str], kind: Any) -> bool:
    """Return True if pyarrow may change one of the values, although their kinds fit."""
    if found <= {"text", "bytes", "true or false", "UUIDs"}:
        return False
    if found <= {"whole numbers", "floats"}:
        is_exact = found == {"whole numbers"} and not (kind is not None and pat.is_float16(kind))
        return not (is_exact or kind is None or pat.is_float64(kind))
    return True


def _check_values(found: set[str], values: Sequence[Any], kind: Any) -> None:
    """Raise ValueError for values of fitting kinds that pyarrow would change."""
    if "lists" in found:
        _check_lists([value for value in values if value is not None], kind)
    elif "dicts" in found:
        _check_dicts([value for value in values if value is not None], kind)
    elif kind is not None and pat.is_integer(kind):
        for value in values:
            # This is also true for NaN and infinities, whose quotient is NaN.
            if value is not None and value != value // 1:
                raise ValueError(f"it has {value!r}, which is not a whole number, and its type is {kind}")
    elif kind is not None and pat.is_floating(kind):
        _check_narrow_floats(found, values, kind)
    else:
        _check_times(found, values, kind)


def _check_lists(lists: list[Any], kind: Any) -> None:
    arrays = [each for each in lists if isinstance(each, np.ndarray)]
    if any(array.ndim != 1 for array in arrays):
        raise ValueError("it has arrays inside of lists or dicts, or in a column of lists: use a column for each array")
    if arrays:
        is_integer = kind is None or (not pat.is_map(kind) and pat.is_integer(kind.value_type))
        lists = [_listed(each, is_integer) if isinstance(each, np.ndarray) else each for each in lists]
    if kind is not None and pat.is_map(kind):
        pairs = list(chain.from_iterable(lists))
        _check([pair[0] for pair in pairs], kind.key_type)
        _check([pair[1] for pair in pairs], kind.item_type)
        return
    found = _kinds(chain.from_iterable(lists))
    inner = _checked_kind(found, None if kind is None else kind.value_type)
    if _must_look(found, inner):
        _check_values(found, list(chain.from_iterable(lists)), inner)


def _listed(array: Any, is_integer: bool) -> list[Any]:
    """Return a NumPy array as a list.

    For whole numbers in a column of integers, one item suffices to check their kind.
    """
    return list(array[:1].tolist() if is_integer and array.dtype.kind in "iu" else array.tolist())


def _check_dicts(dicts: list[Any], kind: Any) -> None:
    if kind is not None and pat.is_map(kind):
        _check(list(chain.from_iterable(dicts)), kind.key_type)
        _check(list(chain.from_iterable(each.values() for each in dicts)), kind.item_type)
        return
    names = dict.fromkeys(chain.from_iterable(dicts))
    other = next((name for name in names if not isinstance(name, str)), None)
    if other is not None:
        raise ValueError(f"it has dicts with keys that are not text, such as {other!r}")
    fields = None if kind is None else {field.name: field.type for field in kind}
    for name in names:
        if fields is not None and name not in fields:
            raise ValueError(f"it has dicts with a field {name!r}, which its type lacks: {kind}")
        try:
            _check([each.get(name) for each in dicts], None if fields is None else fields[name])
        except ValueError as error:
            raise ValueError(f"field {name!r}: {error}") from error


def _check_narrow_floats(found: set[str], values: Sequence[Any], kind: Any) -> None:
    """Raise ValueError for numbers that are too large for short floats. Other floats are rounded to short floats."""
    wide = pa.array(values, pa.float64())
    narrow = pa.array(values, kind).cast(pa.float64())
    is_same = pc.equal(pc.is_finite(wide), pc.is_finite(narrow))
    if "whole numbers" in found:
        is_whole = pa.array([isinstance(value, (int, np.integer)) for value in values])
        is_same = pc.and_(is_same, pc.or_(pc.invert(is_whole), pc.equal(wide, narrow)))
    if not pc.all(is_same).as_py():
        raise ValueError(f"it has numbers that its type {kind} can't hold")


def _check_times(found: set[str], values: Sequence[Any], kind: Any) -> None:
    if "datetimes" in found:
        _check_datetimes([value for value in values if value is not None], kind)
    if "times" in found and any(value is not None and value.tzinfo is not None for value in values):
        raise ValueError("it has times with a zone, which Arrow can't hold")
    if found & {"datetimes", "times", "time differences"} and getattr(kind, "unit", "us") in ("s", "ms"):
        pa.array(values, with_unit(kind, "us")).cast(kind)  # this raises if it would lose microseconds


def _check_datetimes(values: list[dt.datetime], kind: Any) -> None:
    zones = {value.tzinfo is not None for value in values}
    if len(zones) > 1:
        raise ValueError("it has datetimes with a zone and datetimes without one, which have no common type")
    if any(getattr(value, "nanosecond", 0) for value in values):
        raise ValueError("it has datetimes with nanoseconds, which would be lost: use NumPy datetimes")
    if kind is None:
        return
    if pat.is_date(kind):
        if zones == {True} or any(value.time() != dt.time.min for value in values):
            raise ValueError(f"it has datetimes, and their times would be lost: its type is {kind}")
    elif zones != {kind.tz is not None}:
        has = "with" if True in zones else "without"
        raise ValueError(f"it has datetimes {has} a zone, and its type is {kind}")


def with_unit(kind: Any, unit: str) -> pa.DataType:
    """Return the type of times or durations in another unit, "us" or "ns"."""
    if pat.is_timestamp(kind):
        return pa.timestamp(unit, kind.tz)
    return pa.duration(unit) if pat.is_duration(kind) else pa.time64(unit)


def first_failing(count: int, check: Callable[[int], object]) -> int:
    """Return the least n, the index of a value, for which `check(n + 1)` raises. `check(count)` must raise."""
    low, high = 0, count  # check(low) passes, check(high) raises
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check(middle)
            low = middle
        except (pa.ArrowException, ValueError, TypeError, ArithmeticError):
            high = middle
    return high - 1


def rows_of(table: pa.Table) -> list[Any]:
    """Return the rows as dicts of Python values, which are the same whether pandas is installed or not.

    Raises DataError for a value that Python can't hold, such as a time with odd nanoseconds or a year beyond 9999.
    """
    try:
        if not any(is_tensor(kind) for kind in table.schema.types):
            return list(_plain(table).to_pylist())
        columns = [_values(pa.table({name: table.column(name)})) for name in table.column_names]
        return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
    except (pa.ArrowException, ValueError, ArithmeticError, TypeError, NotImplementedError):
        for name, column in zip(table.column_names, table.columns, strict=True):
            values_of_column(column, name)
        raise


def values_of_column(column: Any, name: str) -> list[Any]:
    """Return the values of one column as Python values, as `rows_of` does. name: the column's name, for errors."""
    try:
        return _values(pa.table({name: column}))
    except (pa.ArrowException, ValueError, ArithmeticError, TypeError, NotImplementedError) as error:
        row = first_failing(len(column), lambda count: _values(pa.table({name: column.slice(0, count)})))
        raise DataError(
            f"a value of column {name!r} has no Python form",
            expected="arrays without missing elements" if is_tensor(column.type) else _FORMS,
            got=f"{_shown(column, row)} ({column.type})",
            where=f"row {row + 1} of the batch",
            hint="leave the column out with read(columns=...), or convert it with map_batches, whose function gets "
            "Arrow tables",
        ) from error


def _values(table: pa.Table) -> list[Any]:
    """Return the values of the only column of a table as Python values. Raises the errors of pyarrow."""
    column = table.column(0)
    return arrays_of(column) if is_tensor(column.type) else list(_plain(table).column(0).to_pylist())


def check_rows(table: pa.Table) -> None:
    """Raise DataError for a value that Python can't hold, as `rows_of` does, but convert as few values as possible."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not _has_times(column.type):
            continue
        try:
            plain = _plain(pa.table({name: column})).column(0)
            if pat.is_temporal(plain.type):
                pc.min_max(plain).as_py()  # the values between these two have a Python form, too
            else:
                plain.to_pylist()
        except (pa.ArrowException, ValueError, ArithmeticError, TypeError, NotImplementedError):
            values_of_column(column, name)


@lru_cache(maxsize=4096)
def _has_times(kind: Any) -> bool:
    if pat.is_dictionary(kind):
        return _has_times(kind.value_type)
    inner = [kind.field(index).type for index in range(kind.num_fields)] if pat.is_nested(kind) else []
    return pat.is_temporal(kind) or any(map(_has_times, inner))


def shown(table: pa.Table, index: int) -> str:
    """Return a row as text for messages, even if a value has no Python form."""
    fields = zip(table.column_names, table.columns, strict=True)
    return "{" + ", ".join(f"{name!r}: {_shown(column, index)}" for name, column in fields) + "}"


def _shown(column: Any, index: int) -> str:
    try:
        return repr(_value_or_text(column, index))
    except Exception:
        return f"a {column.type}"


def _value_or_text(column: Any, index: int) -> Any:
    """Return a value as a Python value, or as Arrow's text for it."""
    part = column.slice(index, 1)
    try:
        return _values(pa.table({"": part}))[0]
    except (pa.ArrowException, ValueError, ArithmeticError, TypeError, NotImplementedError):
        return part.cast(pa.string()).to_pylist()[0]


def _plain(table: pa.Table) -> pa.Table:
    """Return the table with times in microseconds instead of nanoseconds.

    Raises ArrowInvalid if this would lose nanoseconds.
    """
    kinds = [_plain_kind(field.type) for field in table.schema]
    if all(plain.equals(field.type) for plain, field in zip(kinds, table.schema, strict=True)):
        return table
    columns = [
        column if plain.equals(column.type) else cast_safely(_undictionaried(column), plain)
        for column, plain in zip(table.columns, kinds, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


def cast_safely(column: Any, kind: pa.DataType) -> Any:
    """Cast a column (ChunkedArray). Raises ArrowInvalid if a value does not fit."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        if not pat.is_nested(column.type):
            raise
        # Arrow casts all values inside lists, including the values of rows that a slice has left out.
        return column.take(pa.array(range(len(column)), pa.int64())).cast(kind)


def _undictionaried(column: Any) -> Any:
    return column.cast(column.type.value_type) if pat.is_dictionary(column.type) else column


@lru_cache(maxsize=4096)
def _plain_kind(kind: Any) -> Any:
    """Return the type with microseconds instead of nanoseconds, or an equal type if there are no nanoseconds."""
    if pat.is_temporal(kind) and getattr(kind, "unit", "") == "ns" and not pat.is_interval(kind):
        return with_unit(kind, "us")
    return with_inner(kind, _plain_kind)


def with_inner(kind: Any, change: Callable[[Any], Any]) -> Any:
    """Return a nested type with `change` applied to the types in it, or an equal type if nothing changes."""
    inner = [kind.field(index) for index in range(kind.num_fields)] if pat.is_nested(kind) else []
    changed = [field.with_type(change(field.type)) for field in inner]
    if pat.is_dictionary(kind):
        value = change(kind.value_type)
        return kind if value.equals(kind.value_type) else value
    if all(new.type.equals(old.type) for new, old in zip(changed, inner, strict=True)):
        return kind
    if pat.is_struct(kind):
        return pa.struct(changed)
    if pat.is_map(kind):
        key, item = (field.with_type(change(field.type)) for field in (kind.key_field, kind.item_field))
        return pa.map_(key, item)
    if pat.is_fixed_size_list(kind):
        return pa.list_(changed[0], kind.list_size)
    if pat.is_large_list(kind):
        return pa.large_list(changed[0])
    return pa.list_(changed[0]) if pat.is_list(kind) else kind


def without_views(table: pa.Table) -> pa.Table:
    """Return the table with plain columns instead of views, which most of Arrow's kernels can't process.

    Raises DataError for a list view inside another type, which Arrow can't convert.
    """
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        if pat.is_list_view(field.type) or pat.is_large_list_view(field.type):
            column = pa.chunked_array([_list_of(view) for view in column.chunks], pa.large_list(field.type.value_field))
        plain = _viewless(column.type)
        if _has_list_view(plain):
            raise DataError(
                f"column {field.name!r} has list views inside another type, which Arrow can't convert",
                got=str(field.type),
                hint="leave the column out with read(columns=...), or write the file with lists",
            )
        if not plain.equals(column.type):
            column = column.cast(plain)
        columns.append(column)
    if all(column.type.equals(field.type) for field, column in zip(table.schema, columns, strict=True)):
        return table
    # Create one new table, because each `set_column` would copy the list of all columns.
    fields = [field.with_type(column.type) for field, column in zip(table.schema, columns, strict=True)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, table.schema.metadata))


def _list_of(view: Any) -> pa.Array:
    """Return a list view as an array of lists. pyarrow's cast from views to lists gives invalid arrays."""
    lengths = view.value_lengths().fill_null(0).to_numpy()
    ends = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int64())
    kind = pa.large_list(view.type.value_field)
    return pa.LargeListArray.from_arrays(ends, view.flatten(), type=kind, mask=view.is_null())


def _has_list_view(kind: Any) -> bool:
    if pat.is_list_view(kind) or pat.is_large_list_view(kind):
        return True
    return pat.is_nested(kind) and any(_has_list_view(kind.field(index).type) for index in range(kind.num_fields))


@lru_cache(maxsize=4096)
def _viewless(kind: Any) -> Any:
    if pat.is_string_view(kind):
        return pa.string()
    return pa.binary() if pat.is_binary_view(kind) else with_inner(kind, _viewless)
