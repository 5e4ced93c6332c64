"""What `group_by(...).aggregate(...)` makes of a group's records, and how it is made a chunk at a time."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from manyhands.prepare.chunks import Chunk, records_of
from manyhands.prepare.keyed import Keyed, KeyedLists
from manyhands.prepare.keys import Key, check_keys, keys_of, values_of
from manyhands.prepare.pipeline import BadKey

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
            from manyhands.prepare.aggregate_table import combine_table

            combined = combine_table(chunk, self.key, list(self.aggregates.values()))
            if combined is not None:
                return combined
        keys = keys_of(chunk, self.key)
        if len(keys) >= MANY and all(aggregate.kind == "count" for aggregate in self.aggregates.values()):
            from manyhands.prepare.aggregate_table import count_keys

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
