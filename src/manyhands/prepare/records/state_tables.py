"""Tables of counts and sums of groups, which are merged by addition.

A table has the column `key`, and a column `0`, `1`, and so on for each aggregate. All states are below `SMALL`, so
that the states of all tasks can be added in 64 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.prepare.records.keys import KeyedLists, KeyedTable
from manyhands.prepare.records.table_order import order_and_starts, order_of

KEY = "key"

KEY_TYPES = {str: pa.string(), int: pa.int64(), bytes: pa.binary()}

ADDED_KINDS = {"count", "sum"}  # the kinds of aggregates whose states are merged by addition

SMALL = 2**40  # states below this limit can be added across millions of tasks without overflowing 64 bits

SAFE = 2**47  # a chunk has at most 65,536 rows, and the sum of that many integers below this limit fits in 64 bits

FEW_ROWS = 1024  # tables with fewer rows are combined by Python, which takes less time than Arrow takes to start

_MOST_BYTES = 2**31  # an Arrow array of text or bytes has 32-bit offsets


def combine_few(key: Any, columns: Sequence[Any]) -> KeyedTable | None:
    """Return the counts and sums of the groups of a few rows as the sorted table that Arrow would compute.

    key: the key column, of one of `KEY_TYPES`. columns: for each aggregate, the column of integers to add; None to
    count the rows. Returns None for nulls, for large numbers, and for text that Python can't hold.
    """
    try:
        keys = key.to_pylist()
    except UnicodeDecodeError:  # a Parquet file may declare any bytes as text
        return None
    counts = Counter(keys)
    ordered = sorted(counts)  # text is sorted as its UTF-8 bytes
    states = []
    for column in columns:
        sums = counts if column is None else _small_sums(keys, column)
        if sums is None:
            return None
        states.append(pa.array(list(map(sums.__getitem__, ordered)), pa.int64()))
    names = [KEY, *map(str, range(len(states)))]
    return KeyedTable(pa.Table.from_arrays([pa.array(ordered, key.type), *states], names), (KEY,), is_sorted=True)


def _small_sums(keys: list[Any], column: Any) -> dict[Any, int] | None:
    """Return the sum of each key; None if there are nulls or large numbers."""
    if column.null_count:
        return None
    values = column.to_pylist()
    if not -SAFE < min(values) <= max(values) < SAFE:
        return None
    sums: dict[Any, int] = {}
    get = sums.get
    for key, value in zip(keys, values, strict=True):
        sums[key] = get(key, 0) + value
    return sums if all(-SMALL < total < SMALL for total in sums.values()) else None


def states_table(combined: KeyedLists) -> pa.Table | None:
    """Return counts and sums of groups as a table; None if it could not hold them, or if sums might overflow."""
    if set(map(type, combined.keys)) not in ({str}, {int}, {bytes}):
        return None
    for column in combined.columns:
        if set(map(type, column)) != {int} or not -SMALL < min(column) <= max(column) < SMALL:
            return None
    try:
        columns = {str(number): pa.array(column, pa.int64()) for number, column in enumerate(combined.columns)}
        return pa.table({KEY: pa.array(combined.keys), **columns})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def merge_states(tables: Sequence[pa.Table]) -> pa.Table | None:
    """Add the states of equal keys. Return the sums in the order of the keys, or None if the schemas differ."""
    if any(table.schema != tables[0].schema for table in tables):
        return None
    names = tables[0].column_names[1:]
    table = pa.concat_tables(tables)
    keys = table.column(KEY)
    sorted_keys = order_and_starts(keys) if keys.nbytes < _MOST_BYTES else None
    if sorted_keys is None:
        grouped = table.group_by(KEY, use_threads=False).aggregate([(name, "sum") for name in names])
        merged = grouped.select([KEY, *(f"{name}_sum" for name in names)]).rename_columns([KEY, *names])
        return merged.take(order_of(merged, (KEY,), descending=False))
    order, starts = sorted_keys
    sums = {name: np.add.reduceat(table.column(name).to_numpy()[order], starts) for name in names}
    return pa.table({KEY: keys.take(pa.array(order[starts])), **sums})


def states_are_small(table: pa.Table) -> bool:
    """Return True if the states of a run are so small that the states of all runs can be added in 64 bits."""
    ends = [pc.min_max(table.column(name)) for name in table.column_names[1:]]
    return all(-SMALL < end["min"].as_py() <= end["max"].as_py() < SMALL for end in ends)
