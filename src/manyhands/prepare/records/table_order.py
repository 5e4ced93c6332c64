"""Sorts the rows of a table by key.

Comparing 64-bit integers is many times faster than comparing text. Text and bytes are therefore sorted by their first
eight bytes as an integer. Keys with equal prefixes are sorted by the next bytes, up to `_MAX_PREFIX_BYTES`. The few
keys that are still equal are compared as complete values. Keys of other types, several key columns, and keys with long
common prefixes are sorted by Arrow's kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.prepare.records.key_columns import sortable, takeable

_MIN_KEYS_PER_TIE = 8  # the limit of ties: with more than one tie per this many keys, another method is used

_MAX_PREFIX_BYTES = 64  # at most this many bytes of a key are compared as integers

_LEFT_BITS = 5  # bits for the number of bytes left, biased by 8 (see _Words.left): at most 8 + 7 + 1 = 16

_MIN_RUN_LENGTH = 64  # numbers are considered mostly sorted if their sorted runs are at least this long on average


def order_of(table: pa.Table, by: tuple[str, ...], *, descending: bool) -> Any:
    """Return the indices that sort the rows by the columns `by`. The sort is stable."""
    keys = {str(number): sortable(table.column(name), name) for number, name in enumerate(by)}
    if len(by) == 1 and len(table):
        found = _order_and_changes(keys["0"], descending=descending)
        if found is not None:
            return pa.array(found[0])
    direction = "descending" if descending else "ascending"
    return pc.sort_indices(pa.table(keys), sort_keys=[(name, direction) for name in keys])


def in_order(table: pa.Table, by: tuple[str, ...], *, descending: bool) -> pa.Table:
    """Return the rows sorted by the columns `by`. The sort is stable.

    View columns and run-end encoded columns are decoded, because Arrow can't rearrange them.
    """
    order = order_of(table, by, descending=descending)
    columns = [takeable(column) for column in table.columns]
    if any(found is not column for found, column in zip(columns, table.columns, strict=True)):
        fields = [field.with_type(column.type) for field, column in zip(table.schema, columns, strict=True)]
        table = pa.table(columns, schema=pa.schema(fields, table.schema.metadata))
    return table.take(order)


def order_and_starts(column: Any) -> tuple[Any, Any] | None:
    """Return the indices that sort a column, and the positions in that order at which a new value starts.

    Returns None if the values can't be sorted by integer prefixes. The column must not be empty.
    """
    found = _order_and_changes(column, descending=False)
    return None if found is None else (found[0], np.flatnonzero(found[1]))


def _order_and_changes(column: Any, *, descending: bool) -> tuple[Any, Any] | None:
    """Return the order, and for each position in it whether the value differs from the previous value.

    Returns None if the values can't be sorted by integer prefixes.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _by_words(column.cast(pa.large_binary()).combine_chunks(), descending=descending)
    if pa.types.is_integer(kind) and not column.null_count:
        keys = column.to_numpy()
        order = _stable_order(~keys if descending else keys)  # ~ reverses the order and, unlike -, cannot overflow
        return order, _changes(keys[order])
    return None


def _by_words(keys: Any, *, descending: bool) -> tuple[Any, Any] | None:
    """Do the same as `_order_and_changes` for `keys` (large_binary, no nulls).

    Returns None if too many keys share a long prefix.
    """
    words = _Words(keys)
    prefixes = ~words.at(0) if descending else words.at(0)
    order = _stable_order(prefixes)
    # changes[i]: the key at position i of the order differs from the previous key. tied[i]: these two keys are equal in
    # the first `depth` bytes (padded with zeros) and may differ later or in length. The extra entry at the end closes
    # the last group.
    changes = np.append(_changes(prefixes[order]), True)
    tied = ~changes
    depth = 8
    while depth < _MAX_PREFIX_BYTES:
        positions = np.flatnonzero(tied[:-1] | tied[1:])  # every member of a group of ties, including its first
        if not len(positions):
            break
        # Each key becomes one integer. From the most significant bit on, it holds the number of the key's group of
        # ties, `count` further bytes (as many as fit), and the number of bytes left. Sorting these integers sorts all
        # groups.
        group, rows = np.cumsum(~tied[positions]), order[positions]
        count = (64 - _LEFT_BITS - int(group[-1]).bit_length()) // 8
        bits, left = 8 * count + _LEFT_BITS, words.left(depth, rows, count)
        number = words.at(depth, rows) >> np.uint64(64 - 8 * count) << np.uint64(_LEFT_BITS) | left
        if descending:
            number ^= np.uint64((1 << bits) - 1)
        number |= group.astype(np.uint64) << np.uint64(bits)
        inner = _stable_order(number)
        order[positions], number = rows[inner], number[inner]
        changes[positions] = _changes(number)
        tied[positions] = ~changes[positions] & (left[inner] > count + 8)  # more than `count` bytes were left
        depth += count
    if np.count_nonzero(tied) * _MIN_KEYS_PER_TIE > len(keys):
        return None
    for start, stop in _groups(np.flatnonzero(tied) - 1):
        members = order[start:stop].tolist()
        members.sort(key=lambda index: keys[index].as_py(), reverse=descending)
        order[start:stop] = members
        changes[start + 1 : stop] = [keys[one] != keys[other] for one, other in pairwise(members)]
    return order, changes[:-1]


def _changes(ordered: Any) -> Any:
    """Return for each position whether its value differs from the previous value. The first entry is true."""
    return np.concatenate(([True], ordered[1:] != ordered[:-1]))


def _stable_order(keys: Any) -> Any:
    """Return the indices that sort integers. The sort is stable.

    NumPy's stable sort is fast for numbers that consist of long sorted runs. For other numbers, its unstable sort is
    several times faster, even if the indices of equal numbers must be sorted afterwards.
    """
    if np.count_nonzero(keys[1:] < keys[:-1]) * _MIN_RUN_LENGTH < len(keys):
        return np.argsort(keys, kind="stable")
    order = np.argsort(keys)
    ordered = keys[order]
    tied = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(tied) * _MIN_KEYS_PER_TIE > len(ordered):
        return np.argsort(keys, kind="stable")
    for start, stop in _groups(tied):
        order[start:stop].sort()
    return order


def _groups(tied: Any) -> list[tuple[int, int]]:
    """Return the [start, stop) of each group of equal neighbours.

    tied: the positions, in ascending order, at which the value equals the next value.
    """
    if not len(tied):
        return []
    breaks = np.flatnonzero(np.diff(tied) > 1)
    starts = np.concatenate(([tied[0]], tied[breaks + 1]))
    stops = np.concatenate((tied[breaks], [tied[-1]])) + 2  # the last member is at tied + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


class _Words:
    """Reads eight bytes of each key as a big-endian integer. Shorter keys are padded with zeros."""

    def __init__(self, keys: Any) -> None:
        _, offsets_buffer, data_buffer = keys.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
        data = np.concatenate((data[: offsets[-1]], np.zeros(8, np.uint8)))  # every key has 8 readable bytes
        self._starts, self._lengths = offsets[:-1], np.diff(offsets)
        self._windows = np.ndarray(
            len(data) - 7, np.dtype(">u8"), data, strides=(1,)
        )  # element i is the word that starts at byte i

    def at(self, depth: int, rows: Any = slice(None)) -> Any:
        """Return the word that starts at byte `depth` of each of these rows."""
        starts = np.minimum(self._starts[rows] + depth, len(self._windows) - 1)
        unused = 64 - 8 * np.clip(self._lengths[rows] - depth, 0, 8).astype(np.uint64)
        return self._windows[starts].astype(np.uint64) >> unused << unused

    def left(self, depth: int, rows: Any, count: int) -> Any:
        """Return the number of bytes from `depth` on, at most `count` + 1, plus 8 so that it is not negative.

        The number is below 8 for keys that ended before `depth`. It is needed because zero padding alone does not show
        where a key ends.
        """
        return (np.clip(self._lengths[rows] - depth, -8, count + 1) + 8).astype(np.uint64)
