"""Aggregates, by plain functions or Arrow kernels.

Combines and merges groups by Arrow's kernels, where they compute exactly what the plain functions would.

What `group_by(...).aggregate(...)` makes of a group's records, and how it is made a chunk at a time.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.prepare.records.chunks import Chunk, records_of
from manyhands.prepare.records.keys import Key, Keyed, KeyedLists, KeyedTable, check_keys, keys_of, values_of
from manyhands.prepare.records.pipeline import BadKey
from manyhands.prepare.records.table_order import order_and_starts, order_of

_FUNCTIONS = {"count": ("count_all",), "sum": ("sum",), "min": ("min",), "max": ("max",), "mean": ("sum", "count")}

_MERGED_KINDS = {"count", "sum"}

_KEY = "key"

_KEY_TYPES = {str: pa.string(), int: pa.int64(), bytes: pa.binary()}

_MOST_BYTES = 2**31  # of text in one array of Arrow's

_SMALL = 2**40  # sums of states below it stay in 64 bits, however many tasks there are

_SAFE = 2**47  # the sum of a chunk of at most 65,536 whole numbers below it stays in 64 bits


def combine_table(table: pa.Table, key: Key, aggregates: Sequence[Aggregate]) -> Keyed | None:
    """The states of a table's groups by key columns; None if Arrow has no exact way, and rows are looked at instead."""
    if not isinstance(key, tuple) or not set(key) <= set(table.column_names) or len(table) > 65_536:
        return None
    if any(table.column(name).null_count or pa.types.is_floating(table.schema.field(name).type) for name in key):
        return None
    if any(aggregate.kind not in _FUNCTIONS for aggregate in aggregates):
        return None
    if not all(aggregate.kind == "count" or _exact(table, aggregate.of) for aggregate in aggregates):
        return None
    if not len(table):
        return KeyedLists([], [[] for _ in aggregates])
    keys, found = _grouped(table, key, aggregates)
    if len(key) == 1 and {aggregate.kind for aggregate in aggregates} <= _MERGED_KINDS:
        states = {str(number): columns[0].cast(pa.int64()) for number, columns in enumerate(found)}
        keyed = pa.table({_KEY: keys[0], **states})
        if keyed.schema.field(_KEY).type in _KEY_TYPES.values() and are_small(keyed):
            return KeyedTable(keyed, (_KEY,))
    return KeyedLists(_rows(keys), [_rows(columns) for columns in found])


def _grouped(table: pa.Table, key: tuple[str, ...], aggregates: Sequence[Aggregate]) -> tuple[list[Any], list[Any]]:
    """The columns of the distinct keys; and of each aggregate, those that its state is made of."""
    inputs = {f"key {number}": table.column(name) for number, name in enumerate(key)}
    keys = list(inputs)
    wanted: list[list[Any]] = []
    for aggregate in aggregates:
        if aggregate.kind == "count":
            wanted.append([([], "count_all")])
            continue
        name = f"of {aggregate.of}"  # in our own words: a column's name might be one that Arrow gives a result
        inputs[name] = table.column(aggregate.of)
        wanted.append([(name, function) for function in _FUNCTIONS[aggregate.kind]])
    once = {str(pair): pair for pairs in wanted for pair in pairs}
    grouped = pa.table(inputs).group_by(keys, use_threads=False).aggregate(list(once.values()))
    made = dict(zip(once, (name for name in grouped.column_names if name not in keys), strict=True))
    found = [[grouped.column(made[str(pair)]) for pair in pairs] for pairs in wanted]
    return [grouped.column(name) for name in keys], found


def _rows(columns: Sequence[Any]) -> list[Any]:
    """The values of one column, or tuples of those of several."""
    lists = [column.to_pylist() for column in columns]
    return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))


def count_keys(keys: list[Any], columns: int) -> KeyedTable | None:
    """How often each key is there, in that many columns of states; None if Arrow doesn't know such keys exactly."""
    kinds = set(map(type, keys))
    if len(kinds) != 1 or not kinds <= _KEY_TYPES.keys():
        return None
    try:
        counts = pa.array(keys, _KEY_TYPES[kinds.pop()]).value_counts()
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None
    states = {str(number): counts.field(1) for number in range(columns)}
    return KeyedTable(pa.table({_KEY: counts.field(0), **states}), (_KEY,))


def _exact(table: pa.Table, of: Any) -> bool:
    """The column is there, has no nulls, and its numbers can be added in 64 bits."""
    if not isinstance(of, str) or of not in table.column_names or table.column(of).null_count:
        return False
    column = table.column(of)
    if not pa.types.is_integer(column.type):
        return False  # floats: one order of addition for all ways
    ends = pc.min_max(column)
    return ends["min"].as_py() is None or max(abs(ends["min"].as_py()), abs(ends["max"].as_py())) < _SAFE


def states_table(combined: KeyedLists, aggregates: Sequence[Aggregate]) -> pa.Table | None:
    """Groups' states as a table of `key`, `0`, `1`, ...; None if it couldn't hold them or add them exactly."""
    if not all(aggregate.kind in _MERGED_KINDS for aggregate in aggregates):
        return None
    if set(map(type, combined.keys)) not in ({str}, {int}, {bytes}):
        return None
    for column in combined.columns:
        if set(map(type, column)) != {int} or not -_SMALL < min(column) <= max(column) < _SMALL:
            return None
    try:
        columns = {str(number): pa.array(column, pa.int64()) for number, column in enumerate(combined.columns)}
        return pa.table({_KEY: pa.array(combined.keys), **columns})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def merged_states(tables: Sequence[pa.Table]) -> pa.Table | None:
    """Tables of states with equal keys added, in the order of the keys; None if they are of different types."""
    if any(table.schema != tables[0].schema for table in tables):
        return None
    names = tables[0].column_names[1:]
    table = pa.concat_tables(tables)
    keys = table.column(_KEY)
    found = order_and_starts(keys) if keys.nbytes < _MOST_BYTES else None
    if found is None:
        grouped = table.group_by(_KEY, use_threads=False).aggregate([(name, "sum") for name in names])
        merged = grouped.select([_KEY, *(f"{name}_sum" for name in names)]).rename_columns([_KEY, *names])
        return merged.take(order_of(merged, (_KEY,), descending=False))
    order, starts = found
    sums = {name: np.add.reduceat(table.column(name).to_numpy()[order], starts) for name in names}
    return pa.table({_KEY: keys.take(pa.array(order[starts])), **sums})


def are_small(table: pa.Table) -> bool:
    """All states of a run are so small that those of all runs can be added in 64 bits."""
    ends = [pc.min_max(table.column(name)) for name in table.column_names[1:]]
    return all(-_SMALL < end["min"].as_py() <= end["max"].as_py() < _SMALL for end in ends)


MANY = 4096  # groups or keys; for fewer, Arrow is slower than Python, and loading it takes longer than the work


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One value from all records of a group: by plain functions, evaluated where the records are.

    start: a group's first value to a state. add: (state, value) to the state with that value. merge: (state, state) to
    one of both, in the order of the records. finish: the last state to the result. of: which value of the record (a
    function of it, or the name of a column); the record itself if it isn't given.

    The functions see the same states in the same order whatever the workers and the memory, so also sums of floats have
    the same bits. `count()`, `sum`, `mean`, `minimum`, `maximum`, `first` and `collect` are ready-made.

    Example: `.group_by("user").aggregate(posts=mh.Aggregate.count(), longest=mh.Aggregate.maximum(of="length"))`
    """

    start: Callable[[Any], Any]
    add: Callable[[Any, Any], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any] | None = None
    of: Callable[[Any], Any] | str | None = None
    kind: str = "custom"  # what Arrow or C has a faster way for; or "custom"

    @classmethod
    def count(cls) -> Aggregate:
        """How many records."""
        return cls(start=_one, add=_one_more, merge=operator.add, kind="count")

    @classmethod
    def sum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """The sum of the values."""
        return cls(start=_itself, add=operator.add, merge=operator.add, of=of, kind="sum")

    @classmethod
    def mean(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """The mean of the values."""
        return cls(start=_with_one, add=_add_to_mean, merge=_merge_means, finish=_divide, of=of, kind="mean")

    @classmethod
    def minimum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """The least value."""
        return cls(start=_itself, add=min, merge=min, of=of, kind="min")

    @classmethod
    def maximum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """The greatest value."""
        return cls(start=_itself, add=max, merge=max, of=of, kind="max")

    @classmethod
    def first(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """The value of the first record, in the order of the input."""
        return cls(start=_itself, add=_keep, merge=_keep, of=of, kind="first")

    @classmethod
    def collect(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """A list of all values, in the order of the input. A group must fit into memory."""
        return cls(start=_in_list, add=_append, merge=operator.add, of=of, kind="collect")


def _one(_: Any) -> int:
    return 1


def _one_more(count: int, _: Any) -> int:
    return count + 1


def _itself(value: Any) -> Any:
    return value


def _keep(first: Any, _: Any) -> Any:
    return first


def _with_one(value: Any) -> tuple[Any, int]:
    return value, 1


def _add_to_mean(state: tuple[Any, int], value: Any) -> tuple[Any, int]:
    return state[0] + value, state[1] + 1


def _merge_means(state: tuple[Any, int], other: tuple[Any, int]) -> tuple[Any, int]:
    return state[0] + other[0], state[1] + other[1]


def _divide(state: tuple[Any, int]) -> Any:
    return state[0] / state[1]


def _in_list(value: Any) -> list[Any]:
    return [value]


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


@dataclass(frozen=True)
class Grouping:
    """A key and named aggregates: what a chunk is combined by before it leaves its task."""

    key: Key
    aggregates: Mapping[str, Aggregate]

    @property
    def adds(self) -> bool:
        """All states are merged by adding them."""
        return all(aggregate.kind in ("count", "sum") for aggregate in self.aggregates.values())

    def combine(self, chunk: Chunk) -> Keyed:
        """The states of the chunk's groups: distinct keys, and a column of states per aggregate; or a table of both.

        Raises what the functions raise, and BadKey for a key that is None or NaN or can't be looked up.
        """
        if not isinstance(chunk, list):
            combined = combine_table(chunk, self.key, list(self.aggregates.values()))
            if combined is not None:
                return combined
        keys = keys_of(chunk, self.key)
        if len(keys) >= MANY and all(aggregate.kind == "count" for aggregate in self.aggregates.values()):
            counted = count_keys(keys, len(self.aggregates))
            if counted is not None:
                return counted
        records = records_of(chunk)
        try:
            states = [_states(aggregate, keys, records) for aggregate in self.aggregates.values()]
        except TypeError as error:
            if "unhashable" in str(error):
                raise BadKey(
                    f"a key can't be looked up ({error}): use numbers, text, bytes or tuples of them"
                ) from error
            raise
        distinct = list(states[0])
        check_keys(distinct)
        return KeyedLists(distinct, [list(column.values()) for column in states])

    def merge_into(self, states: list[dict[Any, Any]], combined: KeyedLists) -> None:
        """Add a chunk's states, or a run's, to `states`: a dict by key for each aggregate."""
        for aggregate, into, column in zip(self.aggregates.values(), states, combined.columns, strict=True):
            if aggregate.kind in ("count", "sum") and not into:
                into.update(zip(combined.keys, column, strict=True))
            elif aggregate.kind == "count":
                get = into.get
                for key, count in zip(combined.keys, column, strict=True):
                    into[key] = get(key, 0) + count
            else:
                merge = aggregate.merge
                for key, state in zip(combined.keys, column, strict=True):
                    into[key] = merge(into[key], state) if key in into else state


def _states(aggregate: Aggregate, keys: list[Any], records: list[Any]) -> dict[Any, Any]:
    if aggregate.kind == "count":
        return Counter(keys)
    values = values_of(records, aggregate.of)
    if aggregate.kind in ("sum", "mean", "min", "max") and None in values:
        raise BadKey(f"the value to aggregate ({aggregate.kind}) is None")
    states: dict[Any, Any] = {}
    start, add = aggregate.start, aggregate.add
    for key, value in zip(keys, values, strict=True):
        states[key] = add(states[key], value) if key in states else start(value)
    return states
