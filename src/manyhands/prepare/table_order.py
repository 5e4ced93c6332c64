"""In which order a table's rows are by a key: by NumPy for numbers, and for text and bytes by numbers made of their
beginnings; else by Arrow's kernel.

Comparing 64-bit numbers is many times faster than comparing text. Keys that begin alike are compared as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MANY_ALIKE = 8  # if more than one in so many is or begins like another, all are compared in another way
_FEW_RUNS = 64  # of so many neighbours at most one is in disorder


def order_of(table: pa.Table, by: tuple[str, ...], *, descending: bool) -> Any:
    """The indices that put the rows in order; rows with equal keys stay as they are."""
    if len(by) == 1 and len(table):
        column = table.column(by[0])
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
            order = _by_beginnings(column.combine_chunks().cast(pa.large_binary()), descending=descending)
            if order is not None:
                return order
        elif pa.types.is_integer(kind) and not column.null_count:
            keys = column.to_numpy()
            return pa.array(_stable_order(~keys if descending else keys))
    how = "descending" if descending else "ascending"
    return pc.sort_indices(table, sort_keys=[(name, how) for name in by])


def _by_beginnings(keys: Any, *, descending: bool) -> Any:
    """The order of `keys` (large_binary, no nulls), or None if too many begin alike."""
    beginnings = _beginnings(keys)
    order = _stable_order(~beginnings if descending else beginnings)
    ordered = beginnings[order]
    alike = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(alike) * _MANY_ALIKE > len(ordered):
        return None
    for start, stop in _groups(alike):  # each with the same first 8 bytes
        members = order[start:stop].tolist()
        members.sort(key=lambda index: keys[index].as_py(), reverse=descending)
        order[start:stop] = members
    return pa.array(order)


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


def _beginnings(keys: Any) -> Any:
    """The first 8 bytes of each as a number, most significant first; what is shorter is padded with zeros."""
    _, offsets_buffer, data_buffer = keys.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[keys.offset : keys.offset + len(keys) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    data = np.concatenate((data[: offsets[-1]], np.zeros(8, np.uint8)))
    starts, lengths = offsets[:-1], np.diff(offsets)
    beginnings = np.zeros(len(keys), np.uint64)
    for index in range(8):
        byte = data[starts + index].astype(np.uint64)
        byte[lengths <= index] = 0
        beginnings |= byte << np.uint64(56 - 8 * index)
    return beginnings
