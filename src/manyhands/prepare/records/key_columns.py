"""Checks the key columns of Arrow tables, and converts them to a form that Arrow can sort, and to Python keys.

The Python keys are those of `key_order`, so rows of tables and Python records are compared in one order. The keys never
depend on whether pandas is installed, although Arrow's own conversions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc

from manyhands.prepare.records.array_columns import is_tensor
from manyhands.prepare.records.columns import with_unit
from manyhands.prepare.records.key_order import (
    DATE,
    DURATION,
    NANOSECONDS_PER_DAY,
    TIME,
    TIME_OF_DAY,
    ZONED_TIME,
    group_keys,
    time_of,
)
from manyhands.prepare.records.pipeline import BadKey

_STORED = {"arrow.uuid": pa.binary(16), "arrow.json": pa.string()}  # extension types whose storage has the same order

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def checked_columns(table: pa.Table, by: Sequence[str]) -> list[Any]:
    """Return the key columns in a form that Arrow can sort and group.

    Raises BadKey for a column that is missing, has a null or NaN, or a type without a total order.
    """
    columns = []
    for name in by:
        if name not in table.column_names:
            raise BadKey(f"the record has no column {name!r}")
        column = sortable(table.column(name), name)
        if column.null_count:
            raise BadKey("the key is None: drop such records, or give them another key")
        if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
            raise BadKey("the key is NaN, which equals no other key: drop such records, or give them another key")
        columns.append(column)
    return columns


def sortable(column: Any, name: str) -> Any:
    """Return the values of a column with a type that Arrow can sort. Raises BadKey for a type without a total order."""
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        return sortable(column.cast(kind.value_type), name)
    if getattr(kind, "extension_name", None) in _STORED:
        return pa.chunked_array([chunk.storage for chunk in column.chunks], _STORED[kind.extension_name])
    if types.is_float16(kind):
        return column.cast(pa.float32())
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        return column.cast(pa.decimal128(kind.precision, kind.scale))
    decoded = takeable(column)
    if decoded is not column:
        return sortable(decoded, name)
    if is_tensor(kind):
        raise BadKey(
            f"the key column {name!r} has arrays, which have no order: use a function as the key, for example "
            f"lambda row: row[{name!r}].tobytes()"
        )
    if types.is_nested(kind) or types.is_interval(kind) or isinstance(kind, pa.BaseExtensionType):
        raise BadKey(
            f"the key column {name!r} has the type {kind}, which has no order: use a function as the key, for example "
            f"lambda row: str(row[{name!r}])"
        )
    return column


def takeable(column: Any) -> Any:
    """Return the values of a column with a type that Arrow's `take` accepts, or the same column if its type is
    accepted.
    """
    kind = column.type
    if kind == pa.string_view():
        return column.cast(pa.string())
    if kind == pa.binary_view():
        return column.cast(pa.binary())
    return pc.run_end_decode(column) if pa.types.is_run_end_encoded(kind) else column


def keys_of_columns(columns: Sequence[Any]) -> list[Any]:
    """Return the keys as `ordered_keys` does: the values of one column, or a tuple per row for several columns."""
    return _rows([_compared(column) for column in columns])


def group_keys_of_columns(columns: Sequence[Any], kinds: Sequence[pa.DataType]) -> list[Any]:
    """Return the keys as `group_keys` does.

    columns: the result of `checked_columns`. kinds: the types of the original columns. Raises BadKey for a time that
    Python's types can't hold, because the result could not show it.
    """
    originals = [_restored(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return group_keys(_rows([_shown(column) for column in originals]))


def _restored(column: Any, kind: pa.DataType) -> Any:
    """Return a column from `checked_columns` with the type that it has for Python, where a UUID is not bytes."""
    if getattr(kind, "extension_name", None) != "arrow.uuid":
        return column
    return pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in column.chunks], kind)


def _rows(columns: list[list[Any]]) -> list[Any]:
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def key_at(columns: Sequence[Any], index: int) -> Any:
    """Return the key of one row. See `keys_of_columns`."""
    keys = [_compared(column.slice(index, 1))[0] for column in columns]
    return keys[0] if len(keys) == 1 else tuple(keys)


def _compared(column: Any) -> list[Any]:
    """Return the values as Python values that are compared as Arrow compares the column."""
    kind = column.type
    if getattr(kind, "extension_name", None) == "arrow.uuid":
        return [UUID(bytes=value) for value in _storage(column).to_pylist()]
    time_kind = _time_kind(kind)
    if time_kind is None:
        return list(column.to_pylist())
    if time_kind == ZONED_TIME:
        column = column.cast(pa.timestamp(kind.unit, "+00:00"))  # the same instants
    found = _in_microseconds(column)
    if found is None:
        factor, numbers = _as_numbers(column)
        return [time_of(time_kind, value * factor) for value in numbers.to_pylist()]
    return found


def _as_numbers(column: Any) -> tuple[int, Any]:
    """Return times as integers, and the number of nanoseconds in one unit."""
    if pa.types.is_date(column.type):
        return NANOSECONDS_PER_DAY, column.cast(pa.date32()).cast(pa.int32())
    return 10**9 // _PER_SECOND[column.type.unit], column.cast(pa.int64())


def _storage(column: Any) -> Any:
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def _shown(column: Any) -> list[Any]:
    if _time_kind(column.type) is None:
        return list(column.to_pylist())
    found = _in_microseconds(column)
    if found is None:
        raise BadKey(
            f"the key is a time of the type {column.type} that Python can't show exactly: it is finer than a "
            "microsecond or beyond the year 9999; use map_batches to cast the column to int64 or to microseconds"
        )
    return found


def _in_microseconds(column: Any) -> list[Any] | None:
    """Return times as Python values, or None if one of them can't be represented exactly."""
    kind = column.type
    try:
        if getattr(kind, "unit", "") == "ns":
            column = column.cast(with_unit(kind, "us"))
        return list(column.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError):
        return None


def _time_kind(kind: Any) -> str | None:
    if pa.types.is_timestamp(kind):
        return TIME if kind.tz is None else ZONED_TIME
    if pa.types.is_duration(kind):
        return DURATION
    if pa.types.is_date(kind):
        return DATE
    return TIME_OF_DAY if pa.types.is_time(kind) else None
