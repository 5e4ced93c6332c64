"""The map side of a shuffle, at the end of a stage: sorts records by key and spills them to a file as sorted runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records.aggregate import MANY, Grouping
from manyhands.prepare.records.chunks import Chunk, is_table, num_records, records_of
from manyhands.prepare.records.key_order import check_hashable, ordered_keys
from manyhands.prepare.records.keys import (
    ORDER_COLUMN,
    Key,
    Keyed,
    KeyedLists,
    KeyedTable,
    concatenate_keyed,
    keys_of,
)
from manyhands.prepare.records.state_tables import merge_states, states_are_small, states_table

_MAX_TABLES = 256  # at this number, tables of group states are merged: even a table with few rows takes some KiB

GROUP_COLUMN = "key"  # the key column in tables of group states

_POSITION_BITS = 40  # the low bits of an order key hold the position, and the high bits hold the partition's number


class Arrangement(Protocol):
    """The key by which a shuffle orders records, and the writer of the sorted runs."""

    def keyer(self, partition: int) -> Callable[[Chunk], Keyed]:
        """Return a function that adds keys to a chunk.

        Call it for the partition's chunks in order. It raises BadKey.
        """
        ...

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        """Return a writer of keyed chunks as runs of about `run_bytes`, estimated from the records."""
        ...

    def describe(self) -> str:
        """Return a short description for `explain`."""
        ...


class RunWriter(Protocol):
    """Collects keyed chunks and writes them as runs."""

    def add(self, keyed: Any) -> None:
        """Add a chunk. The boundaries of runs depend only on the chunks, not on the available memory."""
        ...

    def flush(self) -> None:
        """Write the remaining records as the last run."""
        ...

    @property
    def records(self) -> int:
        """Return the number of records, or of states of groups, that the runs must hold after `flush`."""
        ...


class SortingWriter:
    """Collects records and writes them as sorted runs."""

    def __init__(self, file: RunFileWriter, run_bytes: int) -> None:
        self._file, self._run_bytes = file, run_bytes
        self._parts: list[Keyed] = []
        self._bytes = 0
        self.records = 0

    def add(self, keyed: Keyed) -> None:
        self.records += len(keyed)
        if len(keyed):
            self._parts.append(keyed)
            self._bytes += keyed.size_bytes()
            if self._bytes >= self._run_bytes:
                self.flush()

    def flush(self) -> None:
        if self._parts:
            parts, self._parts, self._bytes = self._parts, [], 0
            self._file.add(concatenate_keyed(parts).in_order(), in_order=True)


class CombiningWriter:
    """Merges the states of groups and writes runs in key order, as Arrow tables if additions in 64 bits are exact."""

    def __init__(self, file: RunFileWriter, run_bytes: int, grouping: Grouping) -> None:
        self._file, self._run_bytes, self._grouping = file, run_bytes, grouping
        # States that are merged by addition are held as tables as long as tables can represent all of them. Lists with
        # few groups are collected until they have MANY groups in total, because Arrow is slow for small tables.
        self._tables: list[KeyedTable] = []
        self._pending: list[KeyedLists] = []
        self._pending_groups = 0
        self._states: list[dict[Any, Any]] = [{} for _ in grouping.aggregates]
        self._bytes = 0
        self.records = 0

    def add(self, keyed: Keyed) -> None:
        if not len(keyed):
            return
        if self._states[0] or not self._grouping.merges_by_addition:
            self._merge(keyed)
        elif isinstance(keyed, KeyedTable):
            self._tables.append(keyed)
            if len(self._tables) >= _MAX_TABLES:
                self._merge_tables()
        else:
            self._pending.append(keyed)
            self._pending_groups += len(keyed)
            if self._pending_groups >= MANY:
                self._pending_to_tables()
        self._bytes += keyed.size_bytes()
        if self._bytes >= self._run_bytes:
            self.flush()

    def flush(self) -> None:
        if self._tables:
            self._pending_to_tables()
            self._merge_tables()
        if self._tables:
            self._write(self._tables[0])
            self._tables, self._bytes = [], 0
            return
        self._all_to_states()
        states, self._states, self._bytes = self._states, [{} for _ in self._states], 0
        if states[0]:
            self._write(in_key_order(states))

    def _write(self, states: Keyed) -> None:
        self.records += len(states)
        self._file.add(states, in_order=True)

    def _merge_tables(self) -> None:
        """Merge all tables into one, or into dicts of states if sums in 64 bits might overflow."""
        if len(self._tables) == 1 and self._tables[0].is_sorted:
            return
        merged = merge_states([keyed.table for keyed in self._tables]) if self._tables else None
        if merged is not None and states_are_small(merged):
            self._tables = [KeyedTable(merged, (GROUP_COLUMN,), is_sorted=True)]
        else:
            self._all_to_states()

    def _pending_to_tables(self) -> None:
        tables = list(map(states_table, self._pending))
        if all(table is not None for table in tables):
            self._tables += [KeyedTable(table, (GROUP_COLUMN,)) for table in tables]
            self._pending, self._pending_groups = [], 0
        else:
            self._all_to_states()

    def _all_to_states(self) -> None:
        held: list[Keyed] = [*self._tables, *self._pending]
        for keyed in held:
            self._merge(keyed)
        self._tables, self._pending, self._pending_groups = [], [], 0

    def _merge(self, keyed: Keyed) -> None:
        self._grouping.merge_into(self._states, states_of(keyed.table) if isinstance(keyed, KeyedTable) else keyed)


def states_of(table: Any) -> KeyedLists:
    """Convert a table of group states to lists."""
    keys, *columns = (column.to_pylist() for column in table.columns)
    return KeyedLists(keys, columns)


def in_key_order(states: list[dict[Any, Any]]) -> KeyedLists:
    """Convert dicts of states by key, one dict for each aggregate, to columns in the order of the keys."""
    keys = list(states[0])
    ordered = KeyedLists(keys, [keys]).in_order().keys
    return KeyedLists(ordered, [list(map(column.__getitem__, ordered)) for column in states])


@dataclass(frozen=True)
class ByKey:
    """Sorts records by a key, for `sort_by`."""

    key: Key
    what: str

    def keyer(self, partition: int) -> Callable[[Chunk], Keyed]:
        return self._add_keys

    def _add_keys(self, chunk: Chunk) -> Keyed:
        if not isinstance(chunk, list) and isinstance(self.key, tuple):
            return _checked_table(chunk, self.key)
        keys = ordered_keys(keys_of(chunk, self.key))
        return KeyedLists(keys, [records_of(chunk)])

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return SortingWriter(file, run_bytes)

    def describe(self) -> str:
        return self.what


def _checked_table(table: Any, by: tuple[str, ...]) -> KeyedTable:
    """Check the key columns of a table and decode dictionaries in them. Raises BadKey."""
    import pyarrow as pa

    from manyhands.prepare.records.key_columns import checked_columns

    checked_columns(table, by)
    for name in by:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            table = table.set_column(table.column_names.index(name), name, column.cast(column.type.value_type))
    return KeyedTable(table, by)


@dataclass(frozen=True)
class ByJoinKey(ByKey):
    """Sorts records by a key for `join`, which also needs hashable keys, and rows that Python can hold.

    After the shuffle, pairs of Python objects are created. The location of a bad row is no longer known then.
    """

    def _add_keys(self, chunk: Chunk) -> Keyed:
        keyed = super()._add_keys(chunk)
        if isinstance(keyed, KeyedLists):
            check_hashable(keyed.keys)
        else:
            from manyhands.prepare.records.columns import check_rows

            check_rows(keyed.table)
        return keyed


@dataclass(frozen=True)
class ByGroup:
    """Combines records with equal keys into states of aggregates, for `aggregate` and `distinct`."""

    grouping: Grouping
    what: str

    def keyer(self, partition: int) -> Callable[[Chunk], Keyed]:
        return self.grouping.combine

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return CombiningWriter(file, run_bytes, self.grouping)

    def describe(self) -> str:
        return self.what


@dataclass(frozen=True)
class ByPosition:
    """Orders records by random words computed from their positions, or by position if the seed is None."""

    seed: int | None
    what: str

    def keyer(self, partition: int) -> Callable[[Chunk], Keyed]:
        """Return a function that counts its records, so each chunk must be passed to it exactly once.

        The pipeline passes a chunk a second time only after an exception, and this function never raises.
        """
        seen = 0

        def add_keys(chunk: Chunk) -> Keyed:
            nonlocal seen
            count = num_records(chunk)
            start, seen = seen, seen + count
            if self.seed is None:
                first = (partition << _POSITION_BITS) + start
                keys = list(range(first, first + count))
            else:
                from manyhands.numerics.counters import words_at

                words = words_at(self.seed, "shuffle", partition, start, count)
                if is_table(chunk):
                    return KeyedTable(_with_order(chunk, words), (ORDER_COLUMN,))
                keys = words.tolist()
            if is_table(chunk):
                return KeyedTable(_with_order(chunk, keys), (ORDER_COLUMN,))
            return KeyedLists(keys, [records_of(chunk)])

        return add_keys

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return SortingWriter(file, run_bytes)

    def describe(self) -> str:
        return self.what


def _with_order(table: Any, order: Any) -> Any:
    import pyarrow as pa

    return table.append_column(ORDER_COLUMN, pa.array(order, pa.uint64()))
