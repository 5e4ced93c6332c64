"""Aggregates, computed by plain functions or Arrow kernels.

`group_by(...).aggregate(...)` combines the records of each chunk into one state per group, and merges the states of
equal keys later. Kernels of Arrow and NumPy are used only where their results equal those of the plain functions.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.errors import DataError, InvariantError
from manyhands.numerics.exact_sums import (
    add_sums,
    add_to_mean,
    add_to_variance,
    add_value,
    mean_of_state,
    merge_means,
    merge_variances,
    number_of,
    population_variance,
    sample_variance,
    start_mean,
    start_variance,
    total_of,
)
from manyhands.prepare.records.chunks import Chunk, records_of
from manyhands.prepare.records.copies import can_change, own_copies, own_copy
from manyhands.prepare.records.exact_arrays import (
    NUMBER_KINDS,
    combined_floats,
    faster_functions,
    float_states,
    floats_in,
    merged_floats,
    row_codes,
)
from manyhands.prepare.records.extremes import add_greatest, add_least, comparable, greatest, least
from manyhands.prepare.records.functions import BadResult, check_results, describe_error, is_for_user
from manyhands.prepare.records.key_columns import checked_columns, group_keys_of_columns
from manyhands.prepare.records.key_order import compared, group_keys
from manyhands.prepare.records.keys import Key, Keyed, KeyedLists, KeyedTable, keys_of, values_of
from manyhands.prepare.records.pipeline import BadKey
from manyhands.prepare.records.state_tables import (
    ADDED_KINDS,
    FEW_ROWS,
    KEY,
    KEY_TYPES,
    SAFE,
    combine_few,
    states_are_small,
)

_FUNCTIONS = {"count": ("count_all",), "sum": ("sum",), "min": ("min",), "max": ("max",), "mean": ("sum", "count")}

FEW_GROUPS = 128
"""Tables with fewer rows than this are combined by Python, which takes less time than Arrow takes to start.

Python may return the groups in a different order than Arrow. With more groups, `size_bytes` would depend on their
order.
"""

_ROWS = "rows"  # the column of row numbers in a table that Arrow groups


def combine_table(
    table: pa.Table, key: tuple[str, ...], key_columns: Sequence[Any], aggregates: Sequence[Aggregate]
) -> Keyed | None:
    """Return the states of a table's groups, or None if Arrow can't compute them exactly or faster than Python.

    key_columns: the columns of `key`, from `checked_columns`. If the result is None, the caller must combine the rows
    as Python objects.
    """
    if len(table) > 65_536 or any(pa.types.is_floating(column.type) for column in key_columns):
        return None
    if 0 < len(table) < FEW_ROWS and _makes_state_table(table, key, aggregates):
        added = [None if aggregate.kind == "count" else table.column(aggregate.of) for aggregate in aggregates]
        combined = combine_few(key_columns[0], added)
        if combined is not None:
            return combined
    elif 0 < len(table) < FEW_GROUPS:
        return None
    floats = [floats_in(table, aggregate.kind, aggregate.of) for aggregate in aggregates]
    by_arrow = [aggregate for aggregate, values in zip(aggregates, floats, strict=True) if values is None]
    if not all(_arrow_computes(table, aggregate) for aggregate in by_arrow):
        return None
    if not len(table):
        return KeyedLists([], [[] for _ in aggregates])
    kinds = [table.schema.field(name).type for name in key]
    keys, results, rows = _grouped(table, key_columns, by_arrow, with_rows=len(by_arrow) < len(aggregates))
    if rows is None and len(key) == 1 and {aggregate.kind for aggregate in aggregates} <= ADDED_KINDS:
        states = {str(number): columns[0].cast(pa.int64()) for number, columns in enumerate(results)}
        keyed = pa.table({KEY: keys[0], **states})
        if kinds[0] in KEY_TYPES.values() and states_are_small(keyed):
            return KeyedTable(keyed, (KEY,))
    distinct = group_keys_of_columns(keys, kinds)
    # Arrow distinguishes values that Python doesn't distinguish, such as parts of a day.
    if len(set(compared(distinct))) < len(distinct):
        return None
    if rows is None:
        return KeyedLists(distinct, [_rows(columns) for columns in results])
    codes, remaining = row_codes(rows), iter(results)
    columns = [
        _rows(next(remaining)) if values is None else float_states(aggregate.kind, codes, len(rows), values)
        for aggregate, values in zip(aggregates, floats, strict=True)
    ]
    return KeyedLists(distinct, columns)


def _makes_state_table(table: pa.Table, key: tuple[str, ...], aggregates: Sequence[Aggregate]) -> bool:
    """Return True if the groups' states are counts and sums of integers, which form a table unless they are large."""
    if len(key) > 1 or table.schema.field(key[0]).type not in KEY_TYPES.values():
        return False
    added = [aggregate.of for aggregate in aggregates if aggregate.kind == "sum"]
    return all(aggregate.kind in ADDED_KINDS for aggregate in aggregates) and all(
        isinstance(name, str) and name in table.column_names and pa.types.is_integer(table.schema.field(name).type)
        for name in added
    )


def _grouped(
    table: pa.Table, key_columns: Sequence[Any], aggregates: Sequence[Aggregate], *, with_rows: bool
) -> tuple[list[Any], list[Any], Any]:
    """Return the columns of distinct keys, and for each aggregate the result columns that form its state.

    The third result is a column with the list of each group's row numbers, or None unless `with_rows`.
    """
    inputs = {f"key {number}": column for number, column in enumerate(key_columns)}
    keys = list(inputs)
    requested: list[list[Any]] = []
    for aggregate in aggregates:
        if aggregate.kind == "count":
            requested.append([([], "count_all")])
            continue
        # The prefix is needed because a user's column may have the name of an Arrow result, such as x_sum.
        name = f"of {aggregate.of}"
        inputs[name] = table.column(aggregate.of)
        requested.append([(name, function) for function in _FUNCTIONS[aggregate.kind]])
    # Two aggregates may request the same function of the same column, which Arrow must compute only once.
    unique = {str(pair): pair for pairs in requested for pair in pairs}
    if with_rows:
        inputs[_ROWS] = pa.array(np.arange(len(table)))
        unique[_ROWS] = (_ROWS, "list")
    grouped = pa.table(inputs).group_by(keys, use_threads=False).aggregate(list(unique.values()))
    result_names = [name for name in grouped.column_names if name not in keys]
    name_of_pair = dict(zip(unique, result_names, strict=True))
    results = [[grouped.column(name_of_pair[str(pair)]) for pair in pairs] for pairs in requested]
    rows = grouped.column(name_of_pair[_ROWS]) if with_rows else None
    return [grouped.column(name) for name in keys], results, rows


def _rows(columns: Sequence[Any]) -> list[Any]:
    """Return the values of one column, or one tuple per row for several columns."""
    lists = [column.to_pylist() for column in columns]
    return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))


def count_keys(keys: list[Any], columns: int) -> KeyedTable | None:
    """Count the records of each key, and return a table with `columns` equal columns of counts.

    Returns None if Arrow can't hold the keys exactly.
    """
    kinds = set(map(type, keys))  # compare exact types, because True and 1 are one key in Python and two keys in Arrow
    if len(kinds) != 1 or not kinds <= KEY_TYPES.keys():
        return None
    try:
        counts = pa.array(keys, KEY_TYPES[kinds.pop()]).value_counts()
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None
    states = {str(number): counts.field(1) for number in range(columns)}
    return KeyedTable(pa.table({KEY: counts.field(0), **states}), (KEY,))


def _arrow_computes(table: pa.Table, aggregate: Aggregate) -> bool:
    return aggregate.kind == "count" or (aggregate.kind in _FUNCTIONS and _adds_exactly(table, aggregate.of))


def _adds_exactly(table: pa.Table, of: Any) -> bool:
    """Return True if the column exists, has no nulls, and its integers can be added in 64 bits."""
    if not isinstance(of, str) or of not in table.column_names or table.column(of).null_count:
        return False
    column = table.column(of)
    if not pa.types.is_integer(column.type):
        return False
    ends = pc.min_max(column)
    return ends["min"].as_py() is None or max(abs(ends["min"].as_py()), abs(ends["max"].as_py())) < SAFE


MANY = 4096  # for fewer groups or keys than this, Arrow is slower than Python


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Computes one value from all records of a group, with plain functions.

    start: takes a group's first value and returns a state. add: takes (state, value) and returns the new state. merge:
    takes (state, state) in the order of the records and returns the merged state. finish: converts the final state to
    the result. of: a function that returns a record's value, or the name of its column (default: the record itself).

    `start` and `add` run in the tasks that read the records, so only states are shuffled.

    The functions are called with the same states in the same order for any number of workers and any memory. `count()`,
    `sum`, `mean`, `variance`, `minimum`, `maximum`, `first` and `collect` are predefined.

    Example: `.group_by("user").aggregate(posts=mh.Aggregate.count(), longest=mh.Aggregate.maximum(of="length"))`
    """

    start: Callable[[Any], Any]
    add: Callable[[Any, Any], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any] | None = None
    of: Callable[[Any], Any] | str | None = None
    kind: str = "custom"  # the name of a predefined aggregate, for which there is a faster path in Arrow or C

    @classmethod
    def count(cls) -> Aggregate:
        """Return an aggregate that counts the records."""
        return cls(start=_one, add=_increment, merge=operator.add, kind="count")

    @classmethod
    def sum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that adds the values.

        Sums of floats are exact and rounded once, as by `math.fsum`. Sums of integers, decimals and fractions are
        exact. Other values, such as lists, are added by `+`. Text is refused, because Python would join it.
        """
        return cls(start=number_of, add=add_value, merge=add_sums, finish=total_of, of=of, kind="sum")

    @classmethod
    def mean(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that computes the mean of the values: the exact sum divided by the count, rounded once.

        The mean of decimals is rounded to the digits of their sum, but to at least 28 digits.
        """
        return cls(start=start_mean, add=add_to_mean, merge=merge_means, finish=mean_of_state, of=of, kind="mean")

    @classmethod
    def variance(cls, of: Callable[[Any], Any] | str | None = None, *, sample: bool = False) -> Aggregate:
        """Return an aggregate that computes the variance: the mean of the squared distances from the mean.

        It is exact and rounded once. sample: if True, divide by the number of values minus one instead of by their
        number. The result for a single value is then None.
        """
        finish = sample_variance if sample else population_variance
        return cls(
            start=start_variance, add=add_to_variance, merge=merge_variances, finish=finish, of=of, kind="variance"
        )

    @classmethod
    def minimum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that finds the least value. NaN is treated as greater than every number.

        Of equal values, such as 1 and 1.0, the first in the order of the input is chosen.
        """
        return cls(start=comparable, add=add_least, merge=least, of=of, kind="min")

    @classmethod
    def maximum(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that finds the greatest value. NaN is treated as greater than every number.

        Of equal values, such as 1 and 1.0, the first in the order of the input is chosen.
        """
        return cls(start=comparable, add=add_greatest, merge=greatest, of=of, kind="max")

    @classmethod
    def first(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that takes the value of the first record in the order of the input."""
        return cls(start=_unchanged, add=_first_of, merge=_first_of, of=of, kind="first")

    @classmethod
    def collect(cls, of: Callable[[Any], Any] | str | None = None) -> Aggregate:
        """Return an aggregate that lists all values in the order of the input. A group must fit into memory."""
        return cls(start=_start_list, add=_append, merge=operator.add, of=of, kind="collect")


def _one(_: Any) -> int:
    return 1


def _increment(count: int, _: Any) -> int:
    return count + 1


def _unchanged(value: Any) -> Any:
    return value


def _first_of(first: Any, _: Any) -> Any:
    return first


def _start_list(value: Any) -> list[Any]:
    return [value]


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


@dataclass(frozen=True)
class Grouping:
    """A key and named aggregates. Tasks combine the records of each chunk by key before the shuffle."""

    key: Key
    aggregates: Mapping[str, Aggregate]

    @property
    def merges_by_addition(self) -> bool:
        """Return True if all states are merged by addition."""
        return all(aggregate.kind in ADDED_KINDS for aggregate in self.aggregates.values())

    def combine(self, chunk: Chunk) -> Keyed:
        """Return the states of the chunk's groups: distinct keys with a column of states per aggregate, or one table.

        Raises any error of the functions, and BadKey for a key that is not hashable or has no total order.
        """
        if not isinstance(chunk, list) and isinstance(self.key, tuple):
            columns = checked_columns(chunk, self.key)
            combined = combine_table(chunk, self.key, columns, list(self.aggregates.values()))
            if combined is not None:
                return combined
            keys = group_keys_of_columns(columns, [chunk.schema.field(name).type for name in self.key])
        else:
            keys = group_keys(keys_of(chunk, self.key))
        if len(keys) >= MANY and all(aggregate.kind == "count" for aggregate in self.aggregates.values()):
            counted = count_keys(keys, len(self.aggregates))
            if counted is not None:
                return counted
        records = records_of(_with_values(chunk, list(self.aggregates.values())))
        try:
            states = [_states(self, name, keys, records) for name in self.aggregates]
        except TypeError as error:
            if "unhashable" in str(error):
                raise BadKey(f"a key is not hashable ({error}): use numbers, text, bytes or tuples of them") from error
            raise
        return KeyedLists(list(states[0]), [list(column.values()) for column in states])

    def merge_into(self, states: list[dict[Any, Any]], combined: KeyedLists) -> None:
        """Merge the states of a chunk or a run into `states`, which has a dict from keys to states for each aggregate.

        Raises a DataError that names the aggregate and the group if a function raises.
        """
        for (name, aggregate), into, column in zip(self.aggregates.items(), states, combined.columns, strict=True):
            # Shortcuts with the same result: the first states are copied, counts are added without a call, and sums of
            # floats are added by NumPy.
            if aggregate.kind in ADDED_KINDS and not into:
                into.update(zip(combined.keys, column, strict=True))
                if len(into) != len(combined.keys):
                    raise InvariantError("a run has several states for one key", got=len(combined.keys) - len(into))
            elif aggregate.kind == "count":
                get = into.get
                for key, count in zip(combined.keys, column, strict=True):
                    into[key] = get(key, 0) + count
            elif (merged := merged_floats(aggregate.kind, into, combined.keys, column)) is not None:
                into.update(zip(combined.keys, merged, strict=True))
            else:
                merge = aggregate.merge
                try:
                    for key, state in zip(combined.keys, column, strict=True):
                        into[key] = merge(into[key], state) if key in into else state
                except BaseException as error:
                    if not is_for_user(error):
                        raise
                    raise _failed(name, aggregate, "merge", key, error) from error

    def finish(self, groups: KeyedLists) -> list[list[Any]]:
        """Return the results of each aggregate, in the order of the groups.

        Raises a DataError that names the aggregate and the group if a function raises.
        """
        # Two aggregates, such as `first` and `collect`, may hold the same record.
        may_share = sum(map(can_change, groups.columns)) > 1
        columns = []
        for (name, aggregate), column in zip(self.aggregates.items(), groups.columns, strict=True):
            states = own_copies(column) if may_share else column
            if aggregate.finish is not None:
                states = list(self._finished(name, aggregate.finish, groups.keys, states))
            columns.append(states)
        return columns

    def _finished(
        self, name: str, finish: Callable[[Any], Any], keys: list[Any], states: list[Any]
    ) -> Iterator[list[Any]]:
        for key, state in zip(keys, states, strict=True):
            try:
                result = finish(state)
                if self.aggregates[name].kind == "custom":
                    check_results([result], finish, is_read=True)
            except BaseException as error:
                if not is_for_user(error):
                    raise
                raise _failed(name, self.aggregates[name], "finish", key, error) from error
            yield result


def _failed(name: str, aggregate: Aggregate, argument: str, key: Any, error: BaseException) -> DataError:
    """Return the error for an aggregate whose function raised an exception for the states of a group."""
    said = str(error) if isinstance(error, BadResult) else describe_error(error, aggregate.kind)
    return DataError(
        f"{argument} of the aggregate {name!r} failed: {said}",
        where=f"the group {repr(key)[:200]}",
        hint="the states of a group can't be set aside: change the function so that it accepts all values of the group",
    )


def _with_values(chunk: Chunk, aggregates: Sequence[Aggregate]) -> Chunk:
    """Return a table with only the columns that the aggregates use, or the chunk itself if they use complete
    records.
    """
    names = {aggregate.of for aggregate in aggregates if aggregate.kind != "count"}
    if isinstance(chunk, list) or not names.issubset(chunk.column_names):
        return chunk
    return chunk.select(sorted(map(str, names)))


def _states(grouping: Grouping, name: str, keys: list[Any], records: list[Any]) -> dict[Any, Any]:
    aggregate = grouping.aggregates[name]
    if aggregate.kind == "count":
        return Counter(keys)
    values = values_of(records, aggregate.of)
    if aggregate.kind in NUMBER_KINDS and type(None) in set(map(type, values)):  # `in values` would compare arrays
        raise BadKey(f"the value to aggregate ({aggregate.kind}) is None")
    if aggregate.kind in ("sum", "mean", "variance") and not {str, bytes}.isdisjoint(map(type, values)):
        # Python would join texts. Columns of CSV files are text by default, so a sum of texts is usually a mistake.
        raise BadKey(
            f"the value to aggregate ({aggregate.kind}) is text: convert it (for CSV files, with read(..., types=...))"
        )
    states: dict[Any, Any] = {}
    start, add = aggregate.start, aggregate.add
    if aggregate.kind in NUMBER_KINDS:
        floats = combined_floats(aggregate.kind, keys, values)
        if floats is not None:
            return floats
        start, add = faster_functions(aggregate.kind, values) or (start, add)
    # `add` may change a state that is the record itself, while other aggregates hold the record, too.
    key = None
    try:
        if aggregate.kind == "custom" and len(grouping.aggregates) > 1:
            for key, value in zip(keys, values, strict=True):
                if key in states:
                    state = add(states[key], value)
                    states[key] = own_copy(state) if state is value else state
                else:
                    states[key] = start(own_copy(value))
        else:
            for key, value in zip(keys, values, strict=True):
                states[key] = add(states[key], value) if key in states else start(value)
    except Exception as error:
        error.add_note(f"in the aggregate {name!r}, group {repr(key)[:200]}")
        raise
    if aggregate.kind == "custom":
        check_results(list(states.values()), start)
    return states
