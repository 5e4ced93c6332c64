"""safetensors files, written and read in parts.

The safetensors library needs all tensors of a file in memory to write it, and maps files into memory to read them. This
module streams files in both directions. A file consists of 8 bytes with the header's length, the header in JSON with
dtype, shape and offsets of each tensor, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.storage.atomic import open_durable
from manyhands.storage.location import Location, Ranges

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The dtypes that a safetensors file can hold, and their names in the file."""

_DTYPES = {code: dtype for dtype, code in CODES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_METADATA = "__metadata__"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as an attribute of torch, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of that name. Raises ValueError if a file can't hold that dtype."""
    found = next((dtype for dtype in CODES if dtype_name(dtype) == name), None)
    if found is None:
        raise ValueError(f"unknown type {name!r}")
    return found


class TensorEntry(NamedTuple):
    """The name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Sort by element size, largest first, so that every tensor starts at a multiple of its element size."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object. Raises ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} occurs twice")
    return found


def header_of(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None, alignment: int = 8) -> bytes:
    """Return the bytes before the tensors, which have these entries in this order.

    alignment: the number of bytes is a multiple of it.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def bytes_of(part: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    flat = part.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class TensorFileWriter:
    """Writes a file with the tensors `entries`, in this order, in parts of any size. A context manager.

    When the block ends without an error, the file is complete and synced. Raises OSError.
    """

    def __init__(
        self, path: Location, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
    ) -> None:
        header = header_of(entries, metadata)
        self._path, self._left = path, sum(entry.nbytes for entry in entries)
        self._end = ExitStack()
        self._file = self._end.enter_context(open_durable(path, len(header) + self._left))
        self._file.write(header)

    def write(self, part: Tensor) -> int:
        """Write the next elements. Return the number of bytes written. part: a CPU tensor of the entry's dtype."""
        data = bytes_of(part)
        self._file.write(data)
        self._left -= data.nbytes
        return data.nbytes

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._end:
            if error is not None:
                raise error
            if self._left:
                raise InvariantError(
                    "a file of tensors is incomplete", where=str(self._path), got=f"{self._left} bytes are missing"
                )


class TensorFile:
    """Reads ranges of the tensors in a file. entries: the tensors by name.

    Raises OSError, and ValueError for a broken file.
    """

    def __init__(self, path: Location) -> None:
        self._ranges = Ranges(path)
        length, size = int.from_bytes(self._ranges.read(0, 8), "little"), self._ranges.size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("its header is truncated")
        try:
            header = json.loads(self._ranges.read(8, length), object_pairs_hook=once_each)
        except RecursionError as error:
            raise ValueError("its header is not a list of tensors") from error
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop(_METADATA, None)
        self.entries: dict[str, TensorEntry] = {}
        self._starts: dict[str, int] = {}
        for name, fields in header.items():
            entry, start, end = _parse(name, fields)
            if not 0 <= start <= end <= size - 8 - length or end - start != entry.nbytes:
                raise ValueError(f"{name!r} does not fit the file: bytes {start} to {end} of {size - 8 - length}")
            self.entries[name], self._starts[name] = entry, 8 + length + start
        if sum(entry.nbytes for entry in self.entries.values()) != size - 8 - length:
            raise ValueError("its size is not the sum of its tensors' sizes: it was truncated, or something was added")

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of the flattened tensor, 1-D."""
        if name not in self.entries:
            raise ValueError(f"it lacks {name!r}")
        entry = self.entries[name]
        if not 0 <= start <= start + numel <= math.prod(entry.shape):
            raise ValueError(f"{name!r} has no elements [{start}, {start + numel})")
        part, first = torch.empty(numel, dtype=entry.dtype), self._starts[name] + start * entry.dtype.itemsize
        buffer = bytes_of(part)
        if buffer.nbytes and self._ranges.read_into(first, buffer) != buffer.nbytes:
            raise ValueError("it is truncated")
        return part

    def rest(self) -> None:
        """Free the data that was read ahead. Call this if the file will not be read for some time."""
        self._ranges.rest()


def _parse(name: str, fields: Any) -> tuple[TensorEntry, int, int]:
    try:
        dtype, shape = _DTYPES[fields["dtype"]], tuple(int(size) for size in fields["shape"])
        start, end = (int(offset) for offset in fields["data_offsets"])
        if min(shape, default=0) < 0:
            raise ValueError("a size is negative")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name!r} has an unknown type or an invalid shape: {fields}") from error
    return TensorEntry(name, dtype, shape), start, end
