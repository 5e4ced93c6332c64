"""Sorts the rows of a table by key.

bytes each; else by Arrow's kernel.

Comparing 64-bit numbers is many times faster than comparing text. Of keys that begin alike the next bytes are compared;
if they go on like that, they are compared as a whole.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MANY_ALIKE = 8  # if more than one in so many is like another, all are compared in another way

_MOST_BYTES = 64  # that are compared as numbers

_LEFT_BITS = 5  # hold how many bytes are left, if not more than 8

_FEW_RUNS = 64  # of so many neighbours at most one is in disorder


def order_of(table: pa.Table, by: tuple[str, ...], *, descending: bool) -> Any:
    """The indices that put the rows in order; rows with equal keys stay as they are."""
    found = _order_and_news(table.column(by[0]), descending=descending) if len(by) == 1 and len(table) else None
    if found is not None:
        return pa.array(found[0])
    how = "descending" if descending else "ascending"
    return pc.sort_indices(table, sort_keys=[(name, how) for name in by])


def order_and_starts(column: Any) -> tuple[Any, Any] | None:
    """The indices that put a column's values in order, and at which places of that order another value begins; None
    where that isn't known without comparing them as a whole. The column isn't empty."""
    found = _order_and_news(column, descending=False)
    return None if found is None else (found[0], np.flatnonzero(found[1]))


def _order_and_news(column: Any, *, descending: bool) -> tuple[Any, Any] | None:
    """The order, and for each place in it whether the value there is another one than at the place before."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _by_words(column.cast(pa.large_binary()).combine_chunks(), descending=descending)
    if pa.types.is_integer(kind) and not column.null_count:
        keys = column.to_numpy()
        order = _stable_order(~keys if descending else keys)
        return order, _news(keys[order])
    return None


def _by_words(keys: Any, *, descending: bool) -> tuple[Any, Any] | None:
    """The same of `keys` (large_binary, no nulls); None if too many have many bytes in common."""
    words = _Words(keys)
    beginnings = ~words.at(0) if descending else words.at(0)
    order = _stable_order(beginnings)
    news = np.append(_news(beginnings[order]), True)  # the last stands for nothing
    alike, depth = ~news, 8  # as far as was looked
    while depth < _MOST_BYTES:
        places = np.flatnonzero(alike[:-1] | alike[1:])
        if not len(places):
            break
        # One number of each: which group of those that are alike, as many of the next bytes as there is room for, and
        # whether it has ended.
        group, rows = np.cumsum(~alike[places]), order[places]
        count = (64 - _LEFT_BITS - int(group[-1]).bit_length()) // 8
        bits, left = 8 * count + _LEFT_BITS, words.left(depth, rows, count)
        number = words.at(depth, rows) >> np.uint64(64 - 8 * count) << np.uint64(_LEFT_BITS) | left
        if descending:
            number ^= np.uint64((1 << bits) - 1)
        number |= group.astype(np.uint64) << np.uint64(bits)
        inner = _stable_order(number)
        order[places], number = rows[inner], number[inner]
        news[places] = _news(number)
        alike[places] = ~news[places] & (left[inner] > count + 8)
        depth += count
    if np.count_nonzero(alike) * _MANY_ALIKE > len(keys):
        return None
    for start, stop in _groups(np.flatnonzero(alike) - 1):
        members = order[start:stop].tolist()
        members.sort(key=lambda index: keys[index].as_py(), reverse=descending)
        order[start:stop] = members
        news[start + 1 : stop] = [keys[one] != keys[other] for one, other in pairwise(members)]
    return order, news[:-1]


def _news(ordered: Any) -> Any:
    return np.concatenate(([True], ordered[1:] != ordered[:-1]))


def _stable_order(keys: Any) -> Any:
    """The order of numbers, equal ones as they are. Of runs that are in order, NumPy's stable sort makes use; else its
    other one is several times faster, and what it does to equal numbers can be put right."""
    if np.count_nonzero(keys[1:] < keys[:-1]) * _FEW_RUNS < len(keys):
        return np.argsort(keys, kind="stable")
    order = np.argsort(keys)
    ordered = keys[order]
    alike = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(alike) * _MANY_ALIKE > len(ordered):
        return np.argsort(keys, kind="stable")
    for start, stop in _groups(alike):
        order[start:stop].sort()
    return order


def _groups(alike: Any) -> list[tuple[int, int]]:
    """Runs of neighbours, from positions that are equal to the one behind them."""
    if not len(alike):
        return []
    breaks = np.flatnonzero(np.diff(alike) > 1)
    starts = np.concatenate(([alike[0]], alike[breaks + 1]))
    stops = np.concatenate((alike[breaks], [alike[-1]])) + 2
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


class _Words:
    """Eight bytes of each key as a number, most significant first; what is shorter is padded with zeros."""

    def __init__(self, keys: Any) -> None:
        _, offsets_buffer, data_buffer = keys.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
        data = np.concatenate((data[: offsets[-1]], np.zeros(8, np.uint8)))
        self._starts, self._lengths = offsets[:-1], np.diff(offsets)
        self._windows = np.ndarray(len(data) - 7, np.dtype(">u8"), data, strides=(1,))  # from every byte on

    def at(self, depth: int, rows: Any = slice(None)) -> Any:
        """From that byte on, of these rows."""
        starts = np.minimum(self._starts[rows] + depth, len(self._windows) - 1)
        unused = 64 - 8 * np.clip(self._lengths[rows] - depth, 0, 8).astype(np.uint64)
        return self._windows[starts].astype(np.uint64) >> unused << unused

    def left(self, depth: int, rows: Any, count: int) -> Any:
        """How many bytes they have from there on, `count` + 1 at most, and 8 more: they may have ended before."""
        return (np.clip(self._lengths[rows] - depth, -8, count + 1) + 8).astype(np.uint64)
