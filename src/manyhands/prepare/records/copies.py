"""Copies records, so that a function which changes one record can't change another record.

Two records must never share an object that can be changed. Otherwise the result would depend on the record that is
processed first.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import pickle
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from manyhands.errors import DataError

_UNCHANGEABLE = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, uuid.UUID),
    )
)


def own_copy(value: Any) -> Any:
    """Return a copy that shares no changeable object with `value`, or `value` itself if it can't be changed.

    A value that can be neither pickled nor copied is returned unchanged.
    """
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return value
    if kind is dict:
        if _UNCHANGEABLE.issuperset(map(type, value.values())):
            return value.copy()
    elif kind is tuple and _UNCHANGEABLE.issuperset(map(type, value)):
        return value
    return _deep_copy(value)


def copier_of(value: Any) -> Callable[[], Any]:
    """Return a function that makes an `own_copy` of the value, but faster.

    The value must not be changed afterwards.
    """
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return lambda: value
    if kind is dict and _UNCHANGEABLE.issuperset(map(type, value.values())):
        return value.copy  # type: ignore[no-any-return]
    try:
        return partial(pickle.loads, pickle.dumps(value, protocol=5))
    except Exception:
        return partial(_deep_copy, value)


def own_items(items: Iterable[Any]) -> list[Any]:
    """Return an `own_copy` of each item. Each copy is made before the next item is requested."""
    return [item if type(item) in _UNCHANGEABLE else own_copy(item) for item in items]


def own_copies(values: list[Any]) -> list[Any]:
    """Return an `own_copy` of each value, or the same list if the values can't be changed."""
    return [own_copy(value) for value in values] if can_change(values) else values


def can_change(values: list[Any]) -> bool:
    """Return True if one of the values is an object that can be changed."""
    return not _UNCHANGEABLE.issuperset(map(type, values))


def separated(values: list[Any]) -> list[Any]:
    """Return the values, with a copy in place of each object that has occurred before."""
    if not can_change(values) or len(set(map(id, values))) == len(values):
        return values
    seen: set[int] = set()
    found = []
    for value in values:
        found.append(own_copy(value) if id(value) in seen else value)
        seen.add(id(value))
    return found


def _deep_copy(value: Any) -> Any:
    # A pickle is several times faster than deepcopy, and records that are written to files are pickled, too.
    try:
        return pickle.loads(pickle.dumps(value, protocol=5))
    except Exception:
        try:
            return copy.deepcopy(value)
        except Exception:
            return value


def pack_records(records: list[Any]) -> bytes:
    """Return the caller's records as bytes, so that later changes to these records have no effect.

    Records that share an object are separated. Raises DataError for a record that can't be pickled.
    """
    try:
        return bytes(cloudpickle.dumps(own_copies(records)))
    except Exception as error:
        raise DataError(
            f"records can't be serialized: {type(error).__name__}: {error}",
            hint="use records of numbers, text and bytes, and dicts, lists and tuples of these",
        ) from error


def unpack_records(packed: bytes) -> list[Any]:
    """Return new copies of the records that `pack_records` received."""
    records: list[Any] = pickle.loads(packed)
    return records
