"""Combines a table's groups by Arrow's kernels, where they compute exactly what the plain functions would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from manyhands.prepare.keyed import KeyedLists
from manyhands.prepare.keys import Key

if TYPE_CHECKING:
    from manyhands.prepare.aggregate import Aggregate

_FUNCTIONS = {"count": ("count_all",), "sum": ("sum",), "min": ("min",), "max": ("max",), "mean": ("sum", "count")}
_SAFE = 2**47  # the sum of a chunk of at most 65,536 whole numbers below it stays in 64 bits


def combine_table(table: pa.Table, key: Key, aggregates: Sequence[Aggregate]) -> KeyedLists | None:
    """The states of a table's groups by key columns; None if Arrow has no exact way, and rows are looked at instead."""
    if not isinstance(key, tuple) or not set(key) <= set(table.column_names) or len(table) > 65_536:
        return None
    if any(table.column(name).null_count or pa.types.is_floating(table.schema.field(name).type) for name in key):
        return None
    wanted: list[Any] = []
    for aggregate in aggregates:
        if aggregate.kind not in _FUNCTIONS or (aggregate.kind != "count" and not _exact(table, aggregate.of)):
            return None
        wanted += [([] if name == "count_all" else aggregate.of, name) for name in _FUNCTIONS[aggregate.kind]]
    grouped = table.group_by(list(key), use_threads=False).aggregate(wanted)
    columns = [column.to_pylist() for column in grouped.columns]
    names = grouped.column_names
    key_columns = [columns[names.index(name)] for name in key]
    keys = key_columns[0] if len(key) == 1 else list(zip(*key_columns, strict=True))
    states = []
    for aggregate in aggregates:
        of = "" if aggregate.kind == "count" else f"{aggregate.of}_"
        parts = [columns[names.index(of + name)] for name in _FUNCTIONS[aggregate.kind]]
        states.append(parts[0] if len(parts) == 1 else list(zip(*parts, strict=True)))
    return KeyedLists(keys, states)


def _exact(table: pa.Table, of: Any) -> bool:
    """The column is there, has no nulls, and its numbers can be added in 64 bits."""
    if not isinstance(of, str) or of not in table.column_names or table.column(of).null_count:
        return False
    column = table.column(of)
    if not pa.types.is_integer(column.type):
        return False  # floats: one order of addition for all ways
    ends = pc.min_max(column)
    return ends["min"].as_py() is None or max(abs(ends["min"].as_py()), abs(ends["max"].as_py())) < _SAFE
