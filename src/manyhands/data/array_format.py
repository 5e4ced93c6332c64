"""The format of array files on disk: the columns of records as arrays, in blocks of rows. Does not import torch.

    block ... block | description, JSON | length of the description, its CRC-32, a fixed text that identifies the format

All blocks except the last have the same number of rows. A block holds the rows of one column after the other. Blocks
and the columns in them start at multiples of 64 bytes. All numbers are little-endian. So the place of a row follows
from its number, and a file is written without knowing how many rows will follow.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import DataError
from manyhands.storage.untrusted import open_inside

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TAIL = struct.Struct("<QI16s")

_MAGIC = b"manyhands arrays"

_ALIGNMENT = 64

_BLOCK_BYTES = 2**22  # about the size of a block; a larger row is a block of its own

_MOST_ROWS = 2**20  # of a block

_MOST_DESCRIPTION_BYTES = 2**24

_UNITS = ("s", "ms", "us", "ns")

KINDS = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "datetime64[D]"),
        *(f"{kind}64[{unit}]" for kind in ("datetime", "timedelta") for unit in _UNITS),
    )
)
"""The types of elements."""


@dataclass(frozen=True)
class Column:
    """A column: an array of this type and shape in each row."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the elements in files."""
        return np.dtype(self.kind).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Return the size of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The columns of a file, its number of rows, and the number of rows of all blocks except the last."""

    columns: tuple[Column, ...]
    rows: int
    block_rows: int

    @cached_property
    def block_bytes(self) -> int:
        """Return the size of a complete block."""
        return self.offsets(self.block_rows)[-1]

    def offsets(self, rows: int) -> list[int]:
        """Return where each column starts in a block of this many rows, and where the block ends."""
        found = [0]
        for column in self.columns:
            found.append(found[-1] + _aligned(rows * column.row_bytes))
        return found

    def place(self, number: int, row: int) -> tuple[int, int]:
        """Return the offset of a row of column `number` in the file, and how many rows follow in its block, itself
        included.
        """
        block, inside = divmod(row, self.block_rows)
        rows = min(self.block_rows, self.rows - block * self.block_rows)
        start = block * self.block_bytes + self.offsets(rows)[number]
        return start + inside * self.columns[number].row_bytes, rows - inside

    @property
    def size_bytes(self) -> int:
        """Return the size of all blocks."""
        complete, rest = divmod(self.rows, self.block_rows)
        return complete * self.block_bytes + (self.offsets(rest)[-1] if rest else 0)

    def description(self) -> bytes:
        """Return what follows the blocks in the file."""
        columns = [{"name": each.name, "type": each.kind, "shape": list(each.shape)} for each in self.columns]
        described = {"columns": columns, "rows": self.rows, "block_rows": self.block_rows}
        text = json.dumps(described, separators=(",", ":")).encode()
        return text + _TAIL.pack(len(text), zlib.crc32(text), _MAGIC)


def rows_of_block(columns: Sequence[Column]) -> int:
    """Return the number of rows of a complete block."""
    size = sum(column.row_bytes for column in columns)
    return max(1, min(_MOST_ROWS, _BLOCK_BYTES // max(1, size)))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def block_parts(columns: Sequence[Any]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a block. columns: one C-contiguous, little-endian array [rows, ...] for each column."""
    for rows in columns:
        data = rows.reshape(-1).view(np.uint8)  # datetimes have no buffers
        yield memoryview(data)
        yield bytes(_aligned(len(data)) - len(data))


def read_layout(file: IO[bytes], path: str) -> Layout:
    """Return the layout of an open file. Raises DataError if the file is incomplete, or is not an array file."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL.size))
    tail = file.read(_TAIL.size)
    if len(tail) == _TAIL.size:
        length, checksum, magic = _TAIL.unpack(tail)
        if magic == _MAGIC and length <= min(size - _TAIL.size, _MOST_DESCRIPTION_BYTES):
            file.seek(size - _TAIL.size - length)
            text = file.read(length)
            layout = _described(text) if zlib.crc32(text) == checksum else None
            if layout is not None and layout.size_bytes == size - _TAIL.size - length:
                return layout
    raise DataError(
        "an array file is truncated, or is not an array file",
        where=path,
        got=f"{size:,} bytes",
        hint="write it again with Dataset.write(format='arrays'), or copy it again",
    )


def _described(text: bytes) -> Layout | None:
    """Return the layout that a description has, or None if it has none. Nothing in it is trusted."""
    try:
        found = json.loads(text)
        columns = tuple(Column(each["name"], each["type"], tuple(each["shape"])) for each in found["columns"])
        layout = Layout(columns, found["rows"], found["block_rows"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sizes = [layout.rows, layout.block_rows, *(size for column in columns for size in column.shape)]
    is_valid = all(type(size) is int and 0 <= size < 2**62 for size in sizes) and min(sizes[:2]) > 0
    names = [column.name for column in columns]
    if not is_valid or not names or not all(type(name) is str for name in names) or len(set(names)) < len(names):
        return None
    return layout if all(type(column.kind) is str and column.kind in KINDS for column in columns) else None


def read_rows(file: IO[bytes], layout: Layout, start: int, stop: int) -> list[NDArray[Any]]:
    """Read rows [start, stop) of every column, as arrays [rows, ...]."""
    found = []
    for number, column in enumerate(layout.columns):
        parts = []
        row = start
        while row < stop:
            offset, left = layout.place(number, row)
            count = min(left, stop - row)
            file.seek(offset)
            parts.append(file.read(count * column.row_bytes))
            row += count
        flat = np.frombuffer(bytearray(b"".join(parts)), column.dtype)
        found.append(flat.reshape(stop - start, *column.shape))
    return found


class MappedArrays:
    """An array file, mapped into memory. Its arrays are read-only views of the map."""

    def __init__(self, data: NDArray[np.uint8], layout: Layout) -> None:
        self._data, self.layout = data, layout
        self._numbers = {column.name: number for number, column in enumerate(layout.columns)}

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a column from `start` on, up to `stop` or the end of a block, whichever comes first."""
        column = self.layout.columns[self._numbers[name]]
        offset, left = self.layout.place(self._numbers[name], start)
        count = min(left, stop - start)
        part = self._data[offset : offset + count * column.row_bytes]
        return part.view(column.dtype).reshape(count, *column.shape)

    def all_rows(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield all rows of a column, block by block."""
        for start in range(0, self.layout.rows, self.layout.block_rows):
            yield self.rows(name, start, self.layout.rows)


def map_arrays(path: str) -> MappedArrays:
    """Map an array file into memory, and read only its end. Raises DataError if the file is incomplete, and OSError."""
    with open_inside(Path(path).parent, Path(path).name) as file:
        layout = read_layout(file, path)
        data = np.memmap(file, np.uint8, "r", 0, (layout.size_bytes,)) if layout.size_bytes else np.empty(0, np.uint8)
        return MappedArrays(np.asarray(data), layout)
