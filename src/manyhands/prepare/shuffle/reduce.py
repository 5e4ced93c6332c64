"""The reduce side of a shuffle, at the start of the next stage: merges the sorted runs of a range of keys.

A range is processed in parts that fit into memory. Each part is loaded, sorted and released. The division into parts
does not affect the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from manyhands.errors import DataError, InvariantError
from manyhands.prepare.io.run_file import Block, cuts_by_size, read_blocks, read_index, trimmed
from manyhands.prepare.records.aggregate import Grouping
from manyhands.prepare.records.chunks import (
    TABLE_CHUNK_BYTES,
    Chunk,
    concatenate,
    num_records,
    part_of,
    with_contiguous_columns,
)
from manyhands.prepare.records.copies import copier_of
from manyhands.prepare.records.key_order import compare_keys, shown_keys
from manyhands.prepare.records.keys import (
    ORDER_COLUMN,
    Cut,
    Keyed,
    KeyedLists,
    KeyedTable,
    concatenate_keyed,
    cut_is_less,
)
from manyhands.prepare.records.state_tables import merge_states
from manyhands.prepare.shuffle.sort_runs import GROUP_COLUMN, in_key_order, states_of


class KeyRange(NamedTuple):
    """The keys from `start` (inclusive) to `stop` (exclusive). None means unbounded."""

    start: Cut | None
    stop: Cut | None

    @property
    def is_one_key(self) -> bool:
        """Return True if the range consists of a single key."""
        return self.start is not None and self.stop == (self.start[0], 1) and self.start[1] == 0


ALL_KEYS = KeyRange(None, None)


class RangeReader:
    """Reads one range of keys from run files, in the order of the files and of the runs in them.

    by: the key columns of tables. limit_bytes: the maximum size of a part, estimated from its records.
    """

    def __init__(self, paths: Sequence[str], by: tuple[str, ...], key_range: KeyRange, limit_bytes: int) -> None:
        self._by, self._key_range, self.limit_bytes = by, key_range, limit_bytes
        self._runs: list[tuple[str, list[Block]]] = []
        for path in paths:
            for run in read_index(path):
                overlapping = _overlapping(run, key_range)
                if overlapping:
                    self._runs.append((path, overlapping))
        self._is_uniform = len({block.form for block in self.blocks}) <= 1
        self._parts = [key_range]
        # For each block that lies only partly in a part: the number of its records in the part. The keys are the part's
        # position, and the block's path and offset.
        self._trimmed: dict[tuple[int, str, int], int] = {}

    @property
    def blocks(self) -> list[Block]:
        """Return all blocks that overlap the range."""
        return [block for _, run in self._runs for block in run]

    @property
    def all_tables(self) -> bool:
        """Return True if all blocks are tables with the same columns."""
        return self._is_uniform and all(block.form for block in self.blocks)

    def parts(self, others: Sequence[RangeReader] = ()) -> list[KeyRange]:
        """Divide the range into parts that fit into memory together with the same parts of `others`."""
        blocks = [block for reader in (self, *others) for block in reader.blocks]
        start, stop = self._key_range
        cuts = compare_keys(
            lambda: [
                cut
                for cut in cuts_by_size(blocks, self.limit_bytes)
                if (start is None or cut_is_less(start, cut)) and (stop is None or cut_is_less(cut, stop))
            ]
        )
        edges: list[Cut | None] = [start, *cuts, stop]
        parts = [KeyRange(low, high) for low, high in pairwise(edges)]
        for reader in (self, *others):
            reader._parts = parts
        return parts

    def stream(self, part: KeyRange, *, as_written: bool = False) -> Iterator[Keyed]:
        """Yield the records of a part, run after run and block by block.

        Tables are yielded only if all blocks of the range, not just of the part, are tables with the same columns.
        Otherwise all records are yielded as lists. So the output does not depend on the division into parts, which
        depends on the memory. as_written: if True, yield each block in the form in which it was written.
        """
        for path, runs in groupby(self._runs, itemgetter(0)):
            for found in self._read(path, _overlapping([block for _, run in runs for block in run], part), part):
                if len(found):
                    if isinstance(found, KeyedTable) and not (as_written or self._is_uniform):
                        found = found.as_lists()
                    yield found

    def _read(self, path: str, blocks: Sequence[Block], part: KeyRange) -> Iterator[Keyed]:
        """For each block, yield the records that belong to a part."""
        for block, keyed in zip(blocks, read_blocks(path, blocks, self._by), strict=True):
            if block.is_within(*part):
                yield keyed
            else:
                found = trimmed(keyed, *part)
                self._trimmed[self._position(part), path, block.offset] = len(found)
                yield found

    def _position(self, part: KeyRange) -> int:
        """Return the position of a part. Parts are compared by identity, because their keys may not be hashable."""
        return next((index for index, found in enumerate(self._parts) if found is part), -1)

    def count_records(self) -> int:
        """Return the number of records in all parts together. Call this after the parts have been read.

        Blocks that lie in one part are counted with the index. Other blocks are read unless they have been read before.
        Raises DataError if a block of the range has more or fewer records than its parts.
        """
        total = 0
        for path, run in self._runs:
            counts = dict.fromkeys((block.offset for block in run), 0)
            for position, part in enumerate(self._parts):
                for block in _overlapping(run, part):
                    if not block.is_within(*part) and (position, path, block.offset) not in self._trimmed:
                        list(self._read(path, [block], part))
                    counts[block.offset] += self._trimmed.get((position, path, block.offset), block.records)
            for block in run:
                if block.is_within(*self._key_range) and counts[block.offset] != block.records:
                    raise lost_records(
                        f"the block at byte {block.offset} of {path}", block.records, counts[block.offset]
                    )
            total += sum(counts.values())
        return total


def _overlapping(run: Sequence[Block], part: KeyRange) -> list[Block]:
    return compare_keys(lambda: [block for block in run if block.overlaps(*part)])


def lost_records(where: str, expected: int, got: int) -> DataError:
    """Return the error for records that a shuffle lost or duplicated."""
    return DataError(
        "records were lost or duplicated between two stages",
        where=where,
        expected=f"{expected} records",
        got=f"{got} records",
        hint="nothing was published. If the keys have a type of your own, its order may contradict itself: use keys of "
        "numbers, text, bytes or tuples of them; otherwise, please report this as a defect",
    )


class Reduction(Protocol):
    """Computes the output of a stage after a shuffle from the records of a range of keys."""

    @property
    def by(self) -> tuple[str, ...]:
        """Return the key columns of tables."""
        ...

    @property
    def descending(self) -> bool:
        """Return True if the first partition has the greatest keys."""
        ...

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        """Yield the output chunks. `readers` has one reader, or two for a join (left, right)."""
        ...


@dataclass(frozen=True)
class Sorted:
    """Yields the records sorted by key. Records with equal keys retain the order of the input."""

    by: tuple[str, ...]
    descending: bool = False

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        (reader,) = readers
        parts = reader.parts()
        for part in reversed(parts) if self.descending else parts:
            if part.is_one_key:
                # This part may not fit into memory. It needs no sorting, because keys are equal and runs are in input
                # order.
                for keyed in reader.stream(part):
                    yield self._records(keyed)
            elif found := list(reader.stream(part)):
                yield self._records(concatenate_keyed(found).in_order(descending=self.descending))

    def _records(self, keyed: Keyed) -> Chunk:
        if isinstance(keyed, KeyedTable) and self.by == (ORDER_COLUMN,):
            return keyed.table.drop_columns([ORDER_COLUMN])
        return keyed.chunk


@dataclass(frozen=True)
class Grouped:
    """Yields one record per group: a dict of keys and aggregates, or only the value of its single aggregate if
    `bare`.
    """

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
        for part in reader.parts():
            tables = [keyed.chunk for keyed in reader.stream(part)]
            merged = merge_states(tables) if tables else None
            if merged is None and tables:
                raise InvariantError("tables of group states with the same columns can't be merged")
            if merged is not None:
                yield merged.rename_columns([*self.key_names, *self.grouping.aggregates])

    def _records(self, groups: KeyedLists) -> Chunk:
        columns = self.grouping.finish(groups)
        if self.bare:
            return columns[0]
        names = (*self.key_names, *self.grouping.aggregates)
        keys = shown_keys(groups.keys)
        if len(self.key_names) == 1:
            return [dict(zip(names, row, strict=True)) for row in zip(keys, *columns, strict=True)]
        return [dict(zip(names, (*key, *row), strict=True)) for key, *row in zip(keys, *columns, strict=True)]


@dataclass(frozen=True)
class Joined:
    """Yields pairs (left, right) of records with the same key. `how` decides which side may be missing (None).

    Each pair has its own copies, because a function that changes a record would otherwise change it in other pairs,
    too.
    """

    how: str
    by: tuple[str, ...] = ()
    descending: bool = False

    def reduce(self, readers: Sequence[RangeReader]) -> Iterator[Chunk]:
        left, right = readers
        for part in left.parts([right]):
            if part.is_one_key:
                yield from self._join_one_key(left, right, part)
                continue
            groups = [_groups(reader, part) for reader in readers]
            keys = list({**groups[0], **groups[1]})
            for key in KeyedLists(keys, [keys]).in_order().keys:
                yield from self._pairs(groups[0].get(key), groups[1].get(key))

    def _join_one_key(self, left: RangeReader, right: RangeReader, part: KeyRange) -> Iterator[Chunk]:
        """Join the records of one key, which may not fit into memory on either side.

        If the right side does not fit, it is read again for each record of the left side. Each of these reads yields as
        many pairs as it reads records, so it costs no more than writing the pairs.
        """
        right_bytes = sum(block.size_bytes for block in right.blocks if block.overlaps(*part))
        copies: list[Callable[[], Any]] | None = None
        if right_bytes <= right.limit_bytes // 2:
            copies = [copier_of(record) for records in _record_lists(right, part) for record in records]
            right_is_empty = not copies
        else:
            right_is_empty = next(_record_lists(right, part), None) is None
        if right_is_empty and self.how in ("inner", "right"):
            return
        left_is_empty = True
        for left_records in _record_lists(left, part):
            left_is_empty = False
            for left_record in left_records:
                if right_is_empty:
                    yield [(left_record, None)]
                    continue
                copy_left = copier_of(left_record)
                if copies is not None:
                    yield [(copy_left(), copy_right()) for copy_right in copies]
                    continue
                for right_records in _record_lists(right, part):
                    yield [(copy_left(), right_record) for right_record in right_records]
        if left_is_empty and self.how in ("right", "outer"):
            for right_records in _record_lists(right, part):
                yield [(None, right_record) for right_record in right_records]

    def _pairs(self, lefts: list[Any] | None, rights: list[Any] | None) -> Iterator[Chunk]:
        if lefts is None:
            lefts = [None] if self.how in ("right", "outer") else []
        if rights is None:
            rights = [None] if self.how in ("left", "outer") else []
        if len(lefts) == 1:
            copy_left = copier_of(lefts[0]) if len(rights) > 1 else None
            yield [(copy_left() if copy_left else lefts[0], right) for right in rights]
            return
        copies = [copier_of(right) for right in rights]
        if len(copies) == 1:
            copy_right = copies[0]
            yield [(left, copy_right()) for left in lefts]
            return
        for left in lefts:
            copy_left = copier_of(left)
            yield [(copy_left(), copy_right()) for copy_right in copies]


def _record_lists(reader: RangeReader, part: KeyRange) -> Iterator[list[Any]]:
    """Yield the records of a part as non-empty lists, one per block."""
    for keyed in reader.stream(part):
        lists = keyed.as_lists() if isinstance(keyed, KeyedTable) else keyed
        yield lists.columns[0]


def _groups(reader: RangeReader, part: KeyRange) -> dict[Any, list[Any]]:
    """Return a dict from each key of a part to its records."""
    groups: dict[Any, list[Any]] = {}
    for keyed in reader.stream(part):
        lists = keyed.as_lists() if isinstance(keyed, KeyedTable) else keyed
        for key, record in zip(lists.keys, lists.columns[0], strict=True):
            groups.setdefault(key, []).append(record)
    return groups


class Reading:
    """Reads the records of one task after a shuffle, and counts them.

    records: the number of records that were read from each input. The numbers are complete when `chunks` is exhausted.
    """

    def __init__(self, reducer: Reduction, readers: Sequence[RangeReader], where: str) -> None:
        self._reducer, self._readers, self._where = reducer, readers, where
        self.records: tuple[int, ...] = ()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks. Raises DataError if sorting lost or duplicated records."""
        emitted = 0
        for chunk in rebatched(self._reducer.reduce(self._readers), self._readers):
            emitted += num_records(chunk)
            yield chunk
        self.records = tuple(reader.count_records() for reader in self._readers)
        if isinstance(self._reducer, Sorted) and self.records != (emitted,):
            raise lost_records(self._where, self.records[0], emitted)


def rebatched(chunks: Iterator[Chunk], readers: Sequence[RangeReader]) -> Iterator[Chunk]:
    """Yield the same records in chunks whose size does not depend on the memory.

    The chunks are the batches that `map_batches` passes to functions, so they must be the same in every run.
    """
    blocks = [block for reader in readers for block in reader.blocks]
    records, size = sum(block.records for block in blocks), sum(block.size_bytes for block in blocks)
    batch_records = max(1, min(65_536, records * TABLE_CHUNK_BYTES // max(1, size)))
    pending: list[Chunk] = []
    count = 0
    for chunk in chunks:
        start, total = 0, num_records(chunk)
        while count + total - start >= batch_records:
            pending.append(part_of(chunk, start, start + batch_records - count))
            start += batch_records - count
            yield with_contiguous_columns(concatenate(pending))
            pending, count = [], 0
        if start < total:
            pending.append(part_of(chunk, start, total))
            count += total - start
    if pending:
        yield with_contiguous_columns(concatenate(pending))
