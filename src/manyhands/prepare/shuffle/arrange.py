"""The end of a stage before a shuffle: sorts records into runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records.aggregate import MANY, Grouping
from manyhands.prepare.records.chunks import Chunk, is_table, num_records, records_of
from manyhands.prepare.records.keys import ORDER_COLUMN, Key, Keyed, KeyedLists, KeyedTable, check_keys, joined, keys_of
from manyhands.prepare.records.pipeline import BadKey

_TABLES = 256  # of groups' states, before they become one: each takes some KiB, however few rows it has

GROUP_COLUMN = "key"  # in tables of groups' states

_POSITION_BITS = 40  # of a position in a partition


class Arrangement(Protocol):
    """How records are arranged for the next stage."""

    def keyed(self, partition: int) -> Callable[[Chunk], Keyed]:
        """What gives the chunks of a partition, one after the other, their keys. Raises BadKey."""
        ...

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        """What writes keyed chunks as runs of about this size, as estimated from the records."""
        ...

    def describe(self) -> str:
        """In a few words, for `explain`."""
        ...


class RunWriter(Protocol):
    """Takes keyed chunks and writes runs."""

    def add(self, keyed: Any) -> None:
        """Take a chunk. Where runs end depends on the chunks only, not on the memory that there is."""
        ...

    def flush(self) -> None:
        """Write what is left."""
        ...


class SortingWriter:
    """Collects records, and writes them in order."""

    def __init__(self, file: RunFileWriter, run_bytes: int) -> None:
        self._file, self._run_bytes = file, run_bytes
        self._parts: list[Keyed] = []
        self._bytes = 0

    def add(self, keyed: Keyed) -> None:
        if len(keyed):
            self._parts.append(keyed)
            self._bytes += keyed.size_bytes()
            if self._bytes >= self._run_bytes:
                self.flush()

    def flush(self) -> None:
        if self._parts:
            parts, self._parts, self._bytes = self._parts, [], 0
            self._file.add(joined(parts).in_order())


class CombiningWriter:
    """Merges the states of groups, and writes them in the order of their keys: as a table where that is exact."""

    def __init__(self, file: RunFileWriter, run_bytes: int, grouping: Grouping) -> None:
        self._file, self._run_bytes, self._grouping = file, run_bytes, grouping
        # States that are added are kept as tables, as long as all can be tables; few groups wait until there are many.
        self._tables: list[Any] = []
        self._waiting: list[KeyedLists] = []
        self._groups_waiting = 0
        self._states: list[dict[Any, Any]] = [{} for _ in grouping.aggregates]
        self._bytes = 0

    def add(self, keyed: Keyed) -> None:
        if not len(keyed):
            return
        if self._states[0] or not self._grouping.adds:
            self._merge(keyed)
        elif isinstance(keyed, KeyedTable):
            self._tables.append(keyed.table)
            if len(self._tables) >= _TABLES:
                self._merge_tables()
        else:
            self._waiting.append(keyed)
            self._groups_waiting += len(keyed)
            if self._groups_waiting >= MANY:
                self._waiting_to_tables()
        self._bytes += keyed.size_bytes()
        if self._bytes >= self._run_bytes:
            self.flush()

    def flush(self) -> None:
        if self._tables:
            self._waiting_to_tables()
            self._merge_tables()
        if self._tables:
            self._file.add(KeyedTable(self._tables[0], (GROUP_COLUMN,)))
            self._tables, self._bytes = [], 0
            return
        self._all_to_states()
        states, self._states, self._bytes = self._states, [{} for _ in self._states], 0
        if states[0]:
            self._file.add(in_key_order(states))

    def _merge_tables(self) -> None:
        """All tables become one; or states, where that isn't exact."""
        from manyhands.prepare.records.aggregate import are_small, merged_states

        merged = merged_states(self._tables) if self._tables else None
        if merged is not None and are_small(merged):
            self._tables = [merged]
        else:
            self._all_to_states()

    def _waiting_to_tables(self) -> None:
        from manyhands.prepare.records.aggregate import states_table

        aggregates = list(self._grouping.aggregates.values())
        tables = [states_table(lists, aggregates) for lists in self._waiting]
        if all(table is not None for table in tables):
            self._tables += tables
            self._waiting, self._groups_waiting = [], 0
        else:
            self._all_to_states()

    def _all_to_states(self) -> None:
        for table in self._tables:
            self._merge(KeyedTable(table, (GROUP_COLUMN,)))
        for lists in self._waiting:
            self._merge(lists)
        self._tables, self._waiting, self._groups_waiting = [], [], 0

    def _merge(self, keyed: Keyed) -> None:
        self._grouping.merge_into(self._states, states_of(keyed.table) if isinstance(keyed, KeyedTable) else keyed)


def states_of(table: Any) -> KeyedLists:
    """A table of states as lists."""
    keys, *columns = (column.to_pylist() for column in table.columns)
    return KeyedLists(keys, columns)


def in_key_order(states: list[dict[Any, Any]]) -> KeyedLists:
    """Groups' states by key, as columns in the order of the keys."""
    keys = list(states[0])
    ordered = KeyedLists(keys, [keys]).in_order().keys
    return KeyedLists(ordered, [list(map(column.__getitem__, ordered)) for column in states])


@dataclass(frozen=True)
class ByKey:
    """Sorted by a key: for sort_by and join."""

    key: Key
    what: str

    def keyed(self, partition: int) -> Callable[[Chunk], Keyed]:
        return self._keyed

    def _keyed(self, chunk: Chunk) -> Keyed:
        if not isinstance(chunk, list) and isinstance(self.key, tuple):
            return _checked_table(chunk, self.key)
        keys = keys_of(chunk, self.key)
        check_keys(keys)
        return KeyedLists(keys, [records_of(chunk)])

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return SortingWriter(file, run_bytes)

    def describe(self) -> str:
        return self.what


def _checked_table(table: Any, by: tuple[str, ...]) -> KeyedTable:
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in by:
        if name not in table.column_names:
            raise BadKey(f"the record has no column {name!r}")
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
            table = table.set_column(table.column_names.index(name), name, column)
        if column.null_count:
            raise BadKey("the key is None: leave such records out, or give them a key of their own")
        if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
            raise BadKey("the key is NaN, which equals nothing: leave such records out, or give them another key")
    return KeyedTable(table, by)


@dataclass(frozen=True)
class ByGroup:
    """Combined by key."""

    grouping: Grouping
    what: str

    def keyed(self, partition: int) -> Callable[[Chunk], Keyed]:
        return self.grouping.combine

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return CombiningWriter(file, run_bytes, self.grouping)

    def describe(self) -> str:
        return self.what


@dataclass(frozen=True)
class ByPosition:
    """In an order that only positions decide: shuffled (by counted random words), or as they are (seed None)."""

    seed: int | None
    what: str

    def keyed(self, partition: int) -> Callable[[Chunk], Keyed]:
        """Stateful: counts the records that it has seen. It never fails, so each is seen once."""
        seen = 0

        def keyed(chunk: Chunk) -> Keyed:
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

        return keyed

    def writer(self, file: RunFileWriter, run_bytes: int) -> RunWriter:
        return SortingWriter(file, run_bytes)

    def describe(self) -> str:
        return self.what


def _with_order(table: Any, order: Any) -> Any:
    import pyarrow as pa

    return table.append_column(ORDER_COLUMN, pa.array(order, pa.uint64()))
