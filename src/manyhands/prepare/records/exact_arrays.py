"""Exact sums, means, variances, and extremes of many floats at a time, computed by NumPy.

The states are those of `exact_sums` and `extremes`. `codes` has the number of each value's group, from 0 to `groups` -
1. Each group has at least one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manyhands.numerics.exact_sums import (
    LARGE,
    LARGE_ROOT,
    SMALL_ROOT,
    WHOLE,
    ExactSum,
    add_sums,
    exact_state,
    square_and_error,
    square_of,
    two_sum,
    whole_state,
)
from manyhands.prepare.records.extremes import plain_choice

if TYPE_CHECKING:
    import pyarrow as pa

Floats: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.intp]

NUMBER_KINDS = {"sum", "mean", "variance", "min", "max"}  # the kinds of aggregates that this file computes

_FEW = 32  # for fewer values than this, Python is faster

_PAIRS = {float, complex}
_FLOATS = {*_PAIRS, ExactSum}

# Adding these values to a state of floats changes nothing, whereas 0.0 would change the sign of negative zero.
_NOTHING: dict[str, Any] = {"sum": -0.0, "mean": (-0.0, 0), "variance": (-0.0, -0.0, 0)}


def floats_in(table: pa.Table, kind: str, of: Any) -> Floats | None:
    """Return the column to aggregate as an array, or None if its values are not floats or if some are missing."""
    import pyarrow as pa

    if kind not in NUMBER_KINDS or not isinstance(of, str) or of not in table.column_names:
        return None
    column = table.column(of)
    if column.null_count or not pa.types.is_floating(column.type):
        return None
    return np.asarray(column.cast(pa.float64()).to_numpy())


def row_codes(rows: pa.ChunkedArray) -> Codes:
    """Return the number of each row's group, from the lists of the groups' row numbers."""
    lists = rows.combine_chunks()
    numbers = lists.flatten().to_numpy()
    codes = np.empty(len(numbers), np.intp)
    codes[numbers] = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    return codes


def float_states(kind: str, codes: Codes, groups: int, values: Floats) -> list[Any]:
    """Return the states of an aggregate of this kind, one for each group."""
    if kind in ("min", "max"):
        return float_extremes(codes, groups, values, kind)
    sums = float_sums(codes, groups, values)
    if kind == "sum":
        return sums
    counts = np.bincount(codes, minlength=groups).tolist()
    if kind == "mean":
        return list(zip(sums, counts, strict=True))
    return list(zip(sums, float_squares(codes, groups, values), counts, strict=True))


def combined_floats(kind: str, keys: list[Any], values: list[Any]) -> dict[Any, Any] | None:
    """Return the state of each key's sum, mean or variance, or None if NumPy can't compute them or would not be
    faster.
    """
    if kind not in _NOTHING or len(values) < _FEW:
        return None
    floats = floats_of(values)
    if floats is None:
        return None
    codes, distinct = codes_of(keys)
    states = float_states(kind, codes, len(distinct), floats)
    if kind == "sum" and int in set(map(type, values)):
        # A sum is a float only if one of its values is.
        with_float = set(codes[[type(value) is float for value in values]].tolist())
        states = [state if code in with_float else whole_state(state) for code, state in enumerate(states)]
    return dict(zip(distinct, states, strict=True))


def faster_functions(kind: str, values: list[Any]) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]] | None:
    """Return faster equivalents, for these values, of the aggregate's functions `start` and `add`."""
    if len(values) < _FEW:
        return None
    if kind in ("min", "max"):
        choose = plain_choice(kind, values)
        return None if choose is None else (_unchanged, choose)
    return (_unchanged, add) if kind == "sum" and set(map(type, values)) == {int} else None


def _unchanged(value: Any) -> Any:
    return value


def merged_floats(kind: str, states: Mapping[Any, Any], keys: list[Any], others: list[Any]) -> list[Any] | None:
    """Return the sums of the states of `keys` and of `others`, with the same results as `add_sums` and `merge_means`.

    Returns None if `others` are not sums, means or variances of floats, if they are few, or if some can't be added.
    """
    if kind not in _NOTHING or len(others) < _FEW:
        return None
    if not set(map(type, others if kind == "sum" else map(itemgetter(0), others))) <= _FLOATS:
        return None
    nothing = _NOTHING[kind]
    known = [states.get(key, nothing) for key in keys]
    try:
        if kind == "sum":
            return _added(known, others)
        # `zip(*known)` would create an iterator for each state, which is slow.
        *sums, count = map(itemgetter, range(len(nothing)))
        columns = [_added(list(map(part, known)), list(map(part, others))) for part in sums]
    except TypeError:
        return None
    return list(zip(*columns, map(add, map(count, known), map(count, others)), strict=True))


def float_sums(codes: Codes, groups: int, values: Floats) -> list[Any]:
    """Return the state of the sum of each group."""
    usual = np.abs(values) < LARGE  # this is false for NaN
    if usual.all():
        return _usual_sums(codes, groups, values)
    states = _usual_sums(codes, groups, np.where(usual, values, 0.0))
    finite = np.isfinite(values)
    for rows in (np.flatnonzero(~usual & finite), np.flatnonzero(~finite)):
        for code, value in zip(codes[rows].tolist(), values[rows].tolist(), strict=True):
            states[code] = add_sums(states[code], value)
    return states


def float_squares(codes: Codes, groups: int, values: Floats) -> list[Any]:
    """Return the state of the sum of the squares of each group."""
    usual = (values == 0.0) | ((np.abs(values) < LARGE_ROOT) & (np.abs(values) > SMALL_ROOT))
    squares, errors = square_and_error(np.where(usual, values, 0.0))
    states = float_sums(np.concatenate([codes, codes]), groups, np.concatenate([squares, errors]))
    rows = np.flatnonzero(~usual)
    for code, value in zip(codes[rows].tolist(), values[rows].tolist(), strict=True):
        states[code] = add_sums(states[code], square_of(value))
    return states


def _usual_sums(codes: Codes, groups: int, values: Floats) -> list[Any]:
    """Return the sums of values whose magnitude is below `LARGE`."""
    columns = _partial_sums(codes, groups, values)
    for _ in range(len(columns) - 1):
        for index in range(len(columns) - 1, 0, -1):
            columns[index - 1], columns[index] = two_sum(columns[index - 1], columns[index])
    if not columns:
        columns = [np.zeros(groups)]
    negative_zeros = (values == 0.0) & np.signbit(values)
    if negative_zeros.any():
        columns[0][np.bincount(codes, ~negative_zeros, groups) == 0] = -0.0
    if len(columns) < 2:
        return list(columns[0].tolist())
    states = _pairs(columns[0], columns[1])
    if len(columns) > 2:
        for code in np.flatnonzero(np.any(columns[2:], axis=0)).tolist():
            states[code] = exact_state([float(column[code]) for column in columns])
    return states


def _pairs(high: Floats, low: Floats) -> list[Any]:
    """Return the states of sums with two parts. States whose second part is zero are floats."""
    exact = np.flatnonzero(low == 0.0)
    if len(exact) == len(low):
        return list(high.tolist())
    pairs = np.empty(len(high), np.complex128)
    pairs.real, pairs.imag = high, low
    states: list[Any] = pairs.tolist()
    for row, value in zip(exact.tolist(), high[exact].tolist(), strict=True):
        states[row] = value
    return states


def _added(states: list[Any], others: list[Any]) -> list[Any]:
    """Return the sums of two lists of states."""
    kinds = set(map(type, states)) | set(map(type, others))
    if not kinds & _PAIRS:
        return list(map(add_sums, states, others))
    rows = []
    one, other = states, others
    if not kinds <= _PAIRS:
        rows = [row for row, pair in enumerate(zip(states, others, strict=True)) if not set(map(type, pair)) <= _PAIRS]
        one, other = list(states), list(others)
        for row in rows:
            one[row] = other[row] = 0.0
    found, is_exact = _added_pairs(np.array(one, np.complex128), np.array(other, np.complex128))
    for row in {*rows, *np.flatnonzero(~is_exact).tolist()}:
        found[row] = add_sums(states[row], others[row])
    return found


def _added_pairs(one: NDArray[np.complex128], other: NDArray[np.complex128]) -> tuple[list[Any], NDArray[np.bool_]]:
    """Return the sums of pairs, and a mask of the exact sums. A float is a pair whose second part is zero."""
    with np.errstate(invalid="ignore", over="ignore"):  # sums with infinities and NaN are not exact
        total, middle = two_sum(one.real, other.real)
        low, lowest = two_sum(one.imag, other.imag)
        middle, lower = two_sum(middle, low)
        high, low = two_sum(total, middle)
        high = np.where(middle == 0.0, total, high)  # adding zero would change the sign of negative zero
        return _pairs(high, low), (lowest == 0.0) & (lower == 0.0) & np.isfinite(low)


def _partial_sums(codes: Codes, groups: int, values: Floats) -> list[Floats]:
    """Return columns of floats, the largest first, whose exact sum is the exact sum of each group.

    In each round, `values + anchor` rounds all values to multiples of one power of two. The power is chosen so that
    every sum of these multiples has at most 53 bits, so the sums are exact in any order. The next round adds the
    remainders.
    """
    columns: list[Floats] = []
    most = int(np.bincount(codes, minlength=groups).max()) if len(values) else 0
    while largest := max(float(values.max()), -float(values.min())) if len(values) else 0.0:
        # |values| < 2**exponent, and a sum of `most` of them has `(most - 1).bit_length()` more bits. Subnormal numbers
        # are multiples of 2**-1074.
        exponent = math.frexp(largest)[1] + max(1, (most - 1).bit_length() - 1)
        anchor = math.ldexp(1.5, max(exponent, -1022))
        multiples = values + anchor
        multiples -= anchor
        values = values - multiples
        columns.append(np.asarray(np.bincount(codes, multiples, groups), np.float64))
    return columns


def float_extremes(codes: Codes, groups: int, values: Floats, kind: str) -> list[float]:
    """Return the least or greatest value of each group, for kind "min" or "max"."""
    # NumPy sorts 16-bit numbers by radix, which is faster.
    order = np.argsort(codes.astype(np.uint16) if groups <= 2**16 else codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(groups))
    # fmin ignores NaN unless all values are NaN, and maximum returns NaN if any value is.
    found = (np.fmin if kind == "min" else np.maximum).reduceat(values[order], starts)
    zeros = np.flatnonzero(values == 0.0)
    if np.signbit(values[zeros]).any():
        # NumPy may return either of 0.0 and -0.0, which are equal.
        with_zero, first = np.unique(codes[zeros], return_index=True)
        found[with_zero] = np.where(found[with_zero] == 0.0, values[zeros[first]], found[with_zero])
    found[np.isnan(found)] = math.nan
    return list(found.tolist())


def codes_of(keys: list[Any]) -> tuple[Codes, list[Any]]:
    """Return the group of each key, and the distinct keys in the order of their first occurrence."""
    distinct = dict.fromkeys(keys)
    number = dict(zip(distinct, range(len(distinct)), strict=True))
    return np.fromiter(map(number.__getitem__, keys), np.intp, len(keys)), list(distinct)


def floats_of(values: list[Any]) -> Floats | None:
    """Return floats and integers as an array of floats, or None if this isn't exact or if there is no float."""
    kinds = set(map(type, values))
    if float not in kinds or not kinds <= {float, int}:
        return None
    try:
        array = np.array(values, np.float64)
    except OverflowError:
        return None
    if int in kinds and any(type(values[row]) is int for row in np.flatnonzero(np.abs(array) >= WHOLE).tolist()):
        return None
    return array
