"""Least and greatest values, where NaN is greater than every number, as in DuckDB, Spark and PostgreSQL.

Of equal values, such as 1, 1.0 and True, or 0.0 and -0.0, the first in the order of the records is chosen. So the
result does not depend on how the records are divided.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from operator import ne
from typing import Any

import numpy as np

from manyhands.prepare.records.pipeline import BadKey

# Python's `min` and `max` give the right result for values of these types, unless a float is NaN.
_ORDERED = {int, float, bool, str, bytes}


def comparable(value: Any) -> Any:
    """Return a value for comparisons.

    Numbers of NumPy become Python numbers, which compare exactly, and all NaN become one.
    """
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if isinstance(value, float):
        return math.nan if value != value else value
    return Decimal("NaN") if isinstance(value, Decimal) and value.is_nan() else value


def least(one: Any, other: Any) -> Any:
    """Return the lesser of two values, or `one` if they are equal. Raises BadKey if they have no order."""
    try:
        if other < one:
            return other
        if one <= other:
            return one
    except decimal.InvalidOperation:  # a value is a decimal NaN
        pass
    return other if _compare(other, one) < 0 else one


def greatest(one: Any, other: Any) -> Any:
    """Return the greater of two values, or `one` if they are equal. Raises BadKey if they have no order."""
    try:
        if other > one:
            return other
        if one >= other:
            return one
    except decimal.InvalidOperation:
        pass
    return other if _compare(other, one) > 0 else one


def add_least(state: Any, value: Any) -> Any:
    """Return the lesser of a state and a value of any type."""
    return least(state, comparable(value))


def add_greatest(state: Any, value: Any) -> Any:
    """Return the greater of a state and a value of any type."""
    return greatest(state, comparable(value))


def plain_choice(kind: str, values: list[Any]) -> Callable[[Any, Any], Any] | None:
    """Return Python's `min` or `max` if it is correct for these values, because it is faster, and otherwise None."""
    if not set(map(type, values)) <= _ORDERED or any(map(ne, values, values)):  # only NaN differs from itself
        return None
    return min if kind == "min" else max


def _compare(one: Any, other: Any) -> int:
    """Return a negative number, zero or a positive number if `one` is less than, equal to or greater than `other`."""
    for kind in (tuple, list):
        if isinstance(one, kind) and isinstance(other, kind):
            for pair in zip(one, other, strict=False):
                if different := _compare(*pair):
                    return different
            return len(one) - len(other)
    nans = (_is_nan(one), _is_nan(other))
    if any(nans):
        return nans[0] - nans[1]
    if one < other:
        return -1
    if other < one:
        return 1
    if one == other:
        return 0
    raise BadKey(f"values have no order, because neither is less: {str(one)[:100]}, {str(other)[:100]}")


def _is_nan(value: Any) -> bool:
    return value.is_nan() if isinstance(value, Decimal) else bool(value != value)
