"""The start of a stage after a shuffle: merges the runs of a range of keys.

The range is worked on in parts that fit: each is loaded, put in order and let go. Where the parts are cut changes
nothing in what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from manyhands.errors import InvariantError
from manyhands.prepare.io.run_file import Block, cuts_by_size, read_blocks, read_index, trimmed
from manyhands.prepare.records.aggregate import Grouping
from manyhands.prepare.records.chunks import TABLE_CHUNK_BYTES, Chunk, concatenate, in_one_piece, num_records, part_of
from manyhands.prepare.records.keys import ORDER_COLUMN, Cut, Keyed, KeyedLists, KeyedTable, joined
from manyhands.prepare.shuffle.arrange import GROUP_COLUMN, in_key_order, states_of


class KeyRange(NamedTuple):
    """From one cut to another."""

    start: Cut | None
    stop: Cut | None

    @property
    def is_one_key(self) -> bool:
        """It holds the records of a single key."""
        return self.start is not None and self.stop == (self.start[0], 1) and self.start[1] == 0


EVERYTHING = KeyRange(None, None)


class RangeReader:
    """Reads one range of keys out of run files, in the order of the files and their runs.

    by: the key columns of tables. limit_bytes: how large a part may be, as estimated from its records.
    """

    def __init__(self, paths: Sequence[str], by: tuple[str, ...], wanted: KeyRange, limit_bytes: int) -> None:
        self._by, self._wanted, self.limit_bytes = by, wanted, limit_bytes
        self._runs: list[tuple[str, list[Block]]] = []
        for path in paths:
            for run in read_index(path):
                touched = [block for block in run if block.touches(*wanted)]
                if touched:
                    self._runs.append((path, touched))
        self._is_uniform = len({block.form for block in self.blocks}) <= 1

    @property
    def blocks(self) -> list[Block]:
        """All that touch the range."""
        return [block for _, run in self._runs for block in run]

    @property
    def all_tables(self) -> bool:
        """All that it reads are tables with the same columns."""
        return self._is_uniform and all(block.form for block in self.blocks)

    def parts(self, others: Sequence[RangeReader] = ()) -> list[KeyRange]:
        """The range, cut into parts that fit in memory together with the same parts of `others`."""
        blocks = [block for reader in (self, *others) for block in reader.blocks]
        start, stop = self._wanted
        cuts = [
            cut
            for cut in cuts_by_size(blocks, self.limit_bytes)
            if (start is None or cut > start) and (stop is None or cut < stop)
        ]
        edges: list[Cut | None] = [start, *cuts, stop]
        return [KeyRange(low, high) for low, high in pairwise(edges)]

    def stream(self, part: KeyRange, *, as_written: bool = False) -> Iterator[Keyed]:
        """The records of a part, run after run, a few blocks at a time: as tables only if all of the range are alike.

        So it depends on the range and not on its parts, and thereby not on the memory, what comes out. as_written: what
        was written as a table comes as one, whatever the others are.
        """
        for path, run in self._runs:
            touched = [block for block in run if block.touches(*part)]
            for block in touched:
                for keyed in read_blocks(path, [block], self._by):
                    found = keyed if block.lies_in(*part) else trimmed(keyed, *part)
                    if len(found):
                        if isinstance(found, KeyedTable) and not (as_written or self._is_uniform):
                            found = found.as_lists()
                        yield found


class Reduction(Protocol):
    """What is done with the records of a range of keys."""

    @property
    def by(self) -> tuple[str, ...]:
        """The key columns of tables."""
        ...

    @property
    def descending(self) -> bool:
        """The first partition has the greatest keys."""
        ...

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        """The chunks that come out; a reader for each side."""
        ...


@dataclass(frozen=True)
class Sorted:
    """The records in the order of their keys; equal keys in the order of the input."""

    by: tuple[str, ...]
    descending: bool = False

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        (reader,) = readers
        parts = reader.parts()
        for part in reversed(parts) if self.descending else parts:
            if part.is_one_key:  # perhaps more than fits: all have the same key, and the runs are in the order wanted
                for keyed in reader.stream(part):
                    yield self._records(keyed)
            elif found := list(reader.stream(part)):
                yield self._records(joined(found).in_order(descending=self.descending))

    def _records(self, keyed: Keyed) -> Chunk:
        if isinstance(keyed, KeyedTable) and self.by == (ORDER_COLUMN,):
            return keyed.table.drop_columns([ORDER_COLUMN])
        return keyed.chunk


@dataclass(frozen=True)
class Grouped:
    """A record per group: a dict of the key's columns and the aggregates; or the only aggregate itself, if `bare`."""

    grouping: Grouping
    key_names: tuple[str, ...]
    bare: bool = False
    by: tuple[str, ...] = (GROUP_COLUMN,)
    descending: bool = False

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        (reader,) = readers
        if reader.all_tables:
            yield from self._merge_tables(reader)
            return
        for part in reader.parts():
            states: list[dict[Any, Any]] = [{} for _ in self.grouping.aggregates]
            for keyed in reader.stream(part, as_written=True):
                lists = states_of(keyed.table) if isinstance(keyed, KeyedTable) else keyed
                self.grouping.merge_into(states, lists)
            if states[0]:
                yield self._records(in_key_order(states))

    def _merge_tables(self, reader: RangeReader) -> Iterator[Chunk]:
        from manyhands.prepare.records.aggregate import merged_states

        for part in reader.parts():
            tables = [keyed.chunk for keyed in reader.stream(part)]
            merged = merged_states(tables) if tables else None
            if merged is None and tables:
                raise InvariantError("tables of groups' states with the same columns couldn't be merged")
            if merged is not None:
                yield merged.rename_columns([*self.key_names, *self.grouping.aggregates])

    def _records(self, groups: KeyedLists) -> Chunk:
        columns = []
        for aggregate, states in zip(self.grouping.aggregates.values(), groups.columns, strict=True):
            columns.append(states if aggregate.finish is None else list(map(aggregate.finish, states)))
        if self.bare:
            return columns[0]
        names = (*self.key_names, *self.grouping.aggregates)
        if len(self.key_names) == 1:
            return [dict(zip(names, row, strict=True)) for row in zip(groups.keys, *columns, strict=True)]
        return [dict(zip(names, (*key, *row), strict=True)) for key, *row in zip(groups.keys, *columns, strict=True)]


@dataclass(frozen=True)
class Joined:
    """Pairs (left, right) of records with the same key; `how`: whether one side may be missing, as None."""

    how: str
    by: tuple[str, ...] = ()
    descending: bool = False

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        left, right = readers
        for part in left.parts([right]):
            if part.is_one_key:
                yield from self._of_one_key(left, right, part)
                continue
            groups = [_groups(reader, part) for reader in readers]
            keys = list({**groups[0], **groups[1]})
            for key in KeyedLists(keys, [keys]).in_order().keys:
                yield from self._pairs(groups[0].get(key), groups[1].get(key))

    def _of_one_key(self, left: RangeReader, right: RangeReader, part: KeyRange) -> Iterator[Chunk]:
        """Perhaps more than fits on both sides: then the right is read again for each record of the left. As many
        pairs as that come out, so it costs no more than writing them does."""
        sizes = [sum(block.size_bytes for block in reader.blocks if block.touches(*part)) for reader in (left, right)]
        held = list(_records(right, part)) if sizes[1] <= right.limit_bytes // 2 else None
        is_empty = not held if held is not None else next(_records(right, part), None) is None
        if is_empty and self.how in ("inner", "right"):
            return
        found = False
        for lefts in _records(left, part):
            found = True
            for one in lefts:
                if is_empty:
                    yield [(one, None)]
                for rights in held if held is not None else _records(right, part):
                    yield [(one, other) for other in rights]
        if not found and self.how in ("right", "outer"):
            for rights in _records(right, part):
                yield [(None, other) for other in rights]

    def _pairs(self, lefts: list[Any] | None, rights: list[Any] | None) -> Iterator[Chunk]:
        if lefts is None:
            lefts = [None] if self.how in ("right", "outer") else []
        if rights is None:
            rights = [None] if self.how in ("left", "outer") else []
        for left in lefts:
            yield [(left, right) for right in rights]


def _records(reader: RangeReader, part: KeyRange) -> Iterator[list[Any]]:
    """A few blocks at a time, none of them empty."""
    for keyed in reader.stream(part):
        lists = keyed.as_lists() if isinstance(keyed, KeyedTable) else keyed
        yield lists.columns[0]


def _groups(reader: RangeReader, part: KeyRange) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for keyed in reader.stream(part):
        lists = keyed.as_lists() if isinstance(keyed, KeyedTable) else keyed
        for key, record in zip(lists.keys, lists.columns[0], strict=True):
            groups.setdefault(key, []).append(record)
    return groups


def rebatched(chunks: Iterator[Chunk], readers: Sequence[RangeReader]) -> Iterator[Chunk]:
    """The same records in chunks of a size that doesn't depend on memory: batches that functions see stay the same."""
    blocks = [block for reader in readers for block in reader.blocks]
    records, size = sum(block.records for block in blocks), sum(block.size_bytes for block in blocks)
    want = max(1, min(65_536, records * TABLE_CHUNK_BYTES // max(1, size)))
    waiting: list[Chunk] = []
    count = 0
    for chunk in chunks:
        start, total = 0, num_records(chunk)
        while count + total - start >= want:
            waiting.append(part_of(chunk, start, start + want - count))
            start += want - count
            yield in_one_piece(concatenate(waiting))
            waiting, count = [], 0
        if start < total:
            waiting.append(part_of(chunk, start, total))
            count += total - start
    if waiting:
        yield in_one_piece(concatenate(waiting))
