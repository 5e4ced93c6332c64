"""A task's file of sorted runs, with blocks, index and checksums.

    block ... block | index | length of the index, checksum of the index, magic

The index lists the blocks of each run: offset, length, checksum, number of records, size, form, first and last key. A
reader therefore fetches only the blocks that overlap its range of keys.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import IO, Any, NamedTuple

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import pack, unpack
from manyhands.prepare.records.key_order import check_order, compare_keys
from manyhands.prepare.records.keys import Cut, Keyed, KeyedLists, KeyedTable, is_before
from manyhands.storage.private import open_private

_TAIL = struct.Struct("<QI8s")

_MAGIC = b"mhruns01"


class Block(NamedTuple):
    """The entry of a block in the index of a run file.

    offset, length: the position and number of its bytes in the file. checksum: CRC-32 of these bytes. size_bytes: the
    estimated size of its records, which depends only on the records, unlike `length`. form: 0 for lists, and for tables
    a number that identifies the schema. first, last: its first and last key.
    """

    offset: int
    length: int
    checksum: int
    records: int
    size_bytes: int
    form: int
    first: Any
    last: Any

    def overlaps(self, start: Cut | None, stop: Cut | None) -> bool:
        """Return True if the block may hold records of this range."""
        return (start is None or not is_before(self.last, start)) and (stop is None or is_before(self.first, stop))

    def is_within(self, start: Cut | None, stop: Cut | None) -> bool:
        """Return True if all records of the block are in this range."""
        return (start is None or not is_before(self.first, start)) and (stop is None or is_before(self.last, stop))


class RunFileWriter:
    """Writes runs into an open file. `close` appends the index.

    block_bytes: the size of a block, estimated from its records. A reader discards half a block on average at each end
    of its range.
    """

    def __init__(self, file: IO[bytes], block_bytes: int) -> None:
        self._file, self._block_bytes, self._offset = file, block_bytes, 0
        self.runs: list[list[Block]] = []

    def add(self, run: Keyed, *, in_order: bool = False) -> None:
        """Write a run. Raises DataError if records can't be pickled.

        in_order: True if the run is sorted by its keys, in the order in which they will be compared. This is checked.
        """
        total, size = len(run), run.size_bytes()
        step = max(1, total * self._block_bytes // max(1, size))
        form = _form_of(run)
        blocks = []
        for start in range(0, total, step):
            part = run.part(start, min(start + step, total))
            packed = pack(part.table if isinstance(part, KeyedTable) else (part.keys, part.columns))
            weight = max(1, size * len(part) // total)
            blocks.append(
                Block(
                    offset=self._offset,
                    length=len(packed),
                    checksum=zlib.crc32(packed),
                    records=len(part),
                    size_bytes=weight,
                    form=form,
                    first=part.key_at(0),
                    last=part.key_at(len(part) - 1),
                )
            )
            self._write(packed)
        if in_order:
            check_order([key for block in blocks for key in (block.first, block.last)], always=True)
        self.runs.append(blocks)

    def close(self) -> None:
        """Append the index. The file stays open."""
        index = pack([[tuple(block) for block in run] for run in self.runs])
        self._write(index)
        self._write(_TAIL.pack(len(index), zlib.crc32(index), _MAGIC))

    @property
    def written_bytes(self) -> int:
        """Return the number of bytes written so far."""
        return self._offset

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._offset += len(data)


def _form_of(run: Keyed) -> int:
    """Return `Block.form`. For tables the lowest bit is set, so that their form is never 0."""
    return zlib.crc32(run.table.schema.to_string().encode()) | 1 if isinstance(run, KeyedTable) else 0


def read_index(path: str) -> list[list[Block]]:
    """Read the index of a file: a list of blocks for each run. Raises DataError if the file is damaged."""
    with _opened(path) as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - _TAIL.size))
        tail = file.read(_TAIL.size)
        if len(tail) == _TAIL.size:
            length, checksum, magic = _TAIL.unpack(tail)
            if magic == _MAGIC and length <= end - _TAIL.size:
                file.seek(end - _TAIL.size - length)
                index = file.read(length)
                if zlib.crc32(index) == checksum:
                    return [[Block(*block) for block in run] for run in unpack(index)]
    raise _damaged(path, "it has no index")


def is_intact(path: str, size: int) -> bool:
    """Return True if the file has `size` bytes and the checksums of the index and of all blocks match."""
    try:
        index = read_index(path)
        with open_private(path) as file:
            if file.seek(0, 2) != size:
                return False
            for block in (block for run in index for block in run):
                file.seek(block.offset)
                if zlib.crc32(file.read(block.length)) != block.checksum:
                    return False
    except (DataError, OSError):
        return False
    return True


def read_blocks(path: str, blocks: Iterable[Block], by: tuple[str, ...]) -> Iterator[Keyed]:
    """Yield blocks of a file in this order. The file is opened once. Raises DataError if it is damaged.

    by: the key columns of tables.
    """
    with _opened(path) as file:
        for block in blocks:
            file.seek(block.offset)
            packed = file.read(block.length)
            if len(packed) != block.length or zlib.crc32(packed) != block.checksum:
                raise _damaged(path, f"the checksum of the block at byte {block.offset} does not match")
            value = unpack(packed)
            found = KeyedLists(*value) if isinstance(value, tuple) else KeyedTable(value, by)
            if len(found) != block.records:
                raise _damaged(path, f"the block at byte {block.offset} has {len(found)} of {block.records} records")
            yield found


def trimmed(keyed: Keyed, start: Cut | None, stop: Cut | None) -> Keyed:
    """Return the records of `keyed` that are in this range.

    Raises DataError if the result has records outside of it.
    """
    low = 0 if start is None else keyed.count_before(start)
    high = len(keyed) if stop is None else keyed.count_before(stop)
    found = keyed if (low, high) == (0, len(keyed)) else keyed.part(low, max(low, high))
    if not compare_keys(lambda: found.are_within(start, stop)):
        raise DataError(
            "keys have no total order",
            expected=f"keys in the range from {start} to {stop}",
            got=f"keys from {found.key_at(0)!r:.100} to {found.key_at(len(found) - 1)!r:.100}",
            hint="use keys of numbers, text, bytes or tuples of them",
        )
    return found


def cuts_by_size(blocks: Sequence[Block], limit_bytes: int) -> list[Cut]:
    """Divide the keys of blocks into ranges of about `limit_bytes`. Return the cuts between the ranges.

    If more than `limit_bytes` of blocks start with the same key, this key gets its own range, however large it is.
    """
    ordered = compare_keys(lambda: sorted(blocks, key=lambda block: block.first))
    cuts: list[Cut] = []
    filled, index = 0, 0
    while index < len(ordered):
        first, weight = ordered[index].first, 0
        while index < len(ordered) and ordered[index].first == first:
            weight += ordered[index].size_bytes
            index += 1
        if filled and filled + weight > limit_bytes:
            cuts.append((first, 0))
            filled = 0
        filled += weight
        if weight > limit_bytes:
            cuts += [(first, 0), (first, 1)]
            filled = 0
    return [cut for cut, _ in groupby(cuts)]


def _opened(path: str) -> IO[bytes]:
    try:
        return open_private(path)
    except OSError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: str, why: str) -> DataError:
    return DataError(
        f"a file between two stages is damaged: {why}",
        where=path,
        hint="run the job again: it detects the file by its checksum and repeats the task that wrote it",
    )
