"""A task's file of sorted runs: blocks, index, checksums.

    block ... block | index | length of the index, its checksum, magic

The index has of each run the blocks with their place, checksum, number of records, size, first and last key; so a
reader fetches the blocks that its range of keys touches, and no others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import pack, unpack
from manyhands.prepare.records.keys import Cut, Keyed, KeyedLists, KeyedTable, with_one_order
from manyhands.storage.files import open_to_read

_TAIL = struct.Struct("<QI8s")

_MAGIC = b"mhruns01"


class Block(NamedTuple):
    """Where a block of a run is, and what is in it. `size_bytes` depends on the records only, `length` may not.

    form: 0 for lists; for tables, another number for each schema.
    """

    offset: int
    length: int
    checksum: int
    records: int
    size_bytes: int
    form: int
    first: Any
    last: Any

    def touches(self, start: Cut | None, stop: Cut | None) -> bool:
        """It may hold records of this range."""
        return (start is None or (self.last, 0) >= start) and (stop is None or (self.first, 0) < stop)

    def lies_in(self, start: Cut | None, stop: Cut | None) -> bool:
        """All its records are of this range."""
        return (start is None or (self.first, 0) >= start) and (stop is None or (self.last, 0) < stop)


class RunFileWriter:
    """Writes runs into a file that is open for writing; `close` adds the index.

    block_bytes: of a block, as estimated. At both ends of a range, about half of it is read in vain.
    """

    def __init__(self, file: IO[bytes], block_bytes: int) -> None:
        self._file, self._block_bytes, self._offset = file, block_bytes, 0
        self.runs: list[list[Block]] = []

    def add(self, run: Keyed) -> None:
        """Write a run, which is in order. Raises DataError for records that can't be pickled."""
        total, size = len(run), run.size_bytes()
        step = max(1, total * self._block_bytes // max(1, size))
        form = _form_of(run)
        blocks = []
        for start in range(0, total, step):
            part = run.part(start, min(start + step, total))
            packed = pack(part.table if isinstance(part, KeyedTable) else (part.keys, part.columns))
            weight = max(1, size * len(part) // total)
            ends = part.key_at(0), part.key_at(len(part) - 1)
            facts = zlib.crc32(packed), len(part), weight, form
            blocks.append(Block(self._offset, len(packed), *facts, *ends))
            self._write(packed)
        self.runs.append(blocks)

    def close(self) -> None:
        """Write the index."""
        index = pack([[tuple(block) for block in run] for run in self.runs])
        self._write(index)
        self._write(_TAIL.pack(len(index), zlib.crc32(index), _MAGIC))

    @property
    def written_bytes(self) -> int:
        """How long the file is so far."""
        return self._offset

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._offset += len(data)


def _form_of(run: Keyed) -> int:
    return zlib.crc32(run.table.schema.to_string().encode()) | 1 if isinstance(run, KeyedTable) else 0


def read_index(path: str) -> list[list[Block]]:
    """The runs of a file. Raises DataError for a file that is damaged."""
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
    """True if the file has `size` bytes, and the index and all blocks have their checksums."""
    try:
        index = read_index(path)
        with open_to_read(path) as file:
            if file.seek(0, 2) != size:
                return False
            for block in (block for run in index for block in run):
                file.seek(block.offset)
                if zlib.crc32(file.read(block.length)) != block.checksum:
                    return False
    except (DataError, OSError):
        return False
    return True


def read_blocks(path: str, blocks: Sequence[Block], by: tuple[str, ...]) -> list[Keyed]:
    """These blocks of a file, in order; `by`: the key columns of tables. Raises DataError for a damaged file."""
    found: list[Keyed] = []
    with _opened(path) as file:
        for block in blocks:
            file.seek(block.offset)
            packed = file.read(block.length)
            if len(packed) != block.length or zlib.crc32(packed) != block.checksum:
                raise _damaged(path, f"the block at byte {block.offset} has another checksum than it was written with")
            value = unpack(packed)
            found.append(KeyedLists(*value) if isinstance(value, tuple) else KeyedTable(value, by))
    return found


def trimmed(keyed: Keyed, start: Cut | None, stop: Cut | None) -> Keyed:
    """Its records of this range."""
    low = 0 if start is None else keyed.below(start)
    high = len(keyed) if stop is None else keyed.below(stop)
    return keyed if (low, high) == (0, len(keyed)) else keyed.part(low, max(low, high))


def cuts_by_size(blocks: Sequence[Block], limit_bytes: int) -> list[Cut]:
    """Cuts between ranges of about `limit_bytes` each; a key that many blocks begin with gets a range of its own."""
    ordered = with_one_order(lambda: sorted(blocks, key=lambda block: block.first))
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
    return sorted(set(cuts))


def _opened(path: str) -> IO[bytes]:
    try:
        return open_to_read(path)
    except OSError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: str, why: str) -> DataError:
    return DataError(
        f"a file between two stages is damaged: {why}",
        where=path,
        hint="run again: the job finds the file by its checksum, and repeats the task that wrote it",
    )
