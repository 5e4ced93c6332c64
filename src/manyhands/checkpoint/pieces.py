"""Writes tensors in pieces with checksums, and reads any ranges of the tensors."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.checkpoint.format import PieceRecord
from manyhands.errors import CheckpointError
from manyhands.shard_layout import Range
from manyhands.storage.location import Address, Location, hint_of
from manyhands.storage.tensor_file import (
    CODES,
    TensorEntry,
    TensorFile,
    TensorFileWriter,
    bytes_of,
    dtype_name,
    in_file_order,
)
from manyhands.storage.untrusted import open_inside

CACHED_BYTES = 4 << 20
"""The size of the largest piece that is cached. Each range of a larger piece is read from the file again."""


class TensorPiece(NamedTuple):
    """The elements of a tensor from `start` on, 1-D.

    shape: the tensor's shape if it differs from its parameter's shape; otherwise None. A tensor with a shape is never
    split.
    """

    kind: str
    name: str
    start: int
    tensor: Tensor
    shape: tuple[int, ...] | None = None


def write_pieces(path: Location, pieces: Sequence[TensorPiece]) -> list[PieceRecord]:
    """Write a file of pieces. Return their records for the manifest.

    Raises OSError, and CheckpointError for a type that a checkpoint can't hold.
    """
    by_key = {f"{piece.kind}|{piece.name}|{piece.start}": piece for piece in pieces}
    for piece in pieces:
        check_type(piece.kind, piece.name, piece.tensor.dtype)
    entries = in_file_order(
        [TensorEntry(key, piece.tensor.dtype, (piece.tensor.numel(),)) for key, piece in by_key.items()]
    )
    records = []
    with TensorFileWriter(path, entries) as file:
        for entry in entries:
            piece = by_key[entry.name]
            part = piece.tensor.detach().cpu().contiguous()
            file.write(part)
            record = PieceRecord(
                file=f"{path.parent.name}/{path.name}" if isinstance(path, Address) else path.name,
                key=entry.name,
                kind=piece.kind,
                name=piece.name,
                start=piece.start,
                numel=part.numel(),
                dtype=dtype_name(part.dtype),
                shape=piece.shape,
                crc32=zlib.crc32(bytes_of(part)),
            )
            records.append(record)
    return records


def check_type(kind: str, name: str, dtype: torch.dtype) -> None:
    """Raise CheckpointError if a checkpoint can't hold tensors of that type."""
    if dtype not in CODES:
        raise CheckpointError(
            f"{name!r} has a type that a checkpoint can't hold",
            where=f"{kind} of the model",
            expected=", ".join(dtype_name(each) for each in CODES),
            got=dtype_name(dtype),
        )


class PieceReader:
    """Reads ranges of the tensors in `folder`. Raises CheckpointError for missing or damaged files."""

    def __init__(self, folder: Location, pieces: Sequence[PieceRecord]) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[PieceRecord]] = defaultdict(list)
        for piece in sorted(pieces, key=lambda piece: piece.start):
            self._pieces[piece.kind, piece.name].append(piece)
        self._files: dict[str, TensorFile] = {}
        self._last = ""  # the file that was read last
        self._checked: set[tuple[str, str]] = set()
        self._recent: dict[
            str, tuple[PieceRecord, Tensor]
        ] = {}  # the last piece of each kind: the next range is probably in it

    def kinds_of(self, name: str) -> list[str]:
        """Return the kinds of tensors that are stored for a parameter."""
        return [kind for kind, other in self._pieces if other == name]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel), 1-D."""
        parts, position = [], start
        for piece in self._pieces.get((kind, name), []):
            first, last = max(position, piece.start), min(start + numel, piece.start + piece.numel)
            if first == position and first < last:
                parts.append(self._read_piece(piece, first - piece.start, last - piece.start))
                position = last
        if position != start + numel:
            raise self._lacks(kind, name, Range(start, start + numel), Range(start, position))
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def read_full(self, kind: str, name: str) -> Tensor | None:
        """Return a tensor that was saved unsplit, in its own shape, or None if it was saved in ranges."""
        pieces = self._pieces.get((kind, name))
        if not pieces or pieces[0].shape is None:
            return None
        return self._read_piece(pieces[0], 0, pieces[0].numel).view(pieces[0].shape).clone()

    def parts(self, kind: str, name: str, numel: int) -> Iterator[TensorPiece]:
        """Yield all `numel` elements in order, piece by piece. Only one piece at a time is in memory."""
        position = 0
        for piece in self._pieces.get((kind, name), []):
            if piece.start != position:
                break
            yield TensorPiece(kind, name, position, self._read_piece(piece, 0, piece.numel))
            position += piece.numel
        if position != numel:
            raise self._lacks(kind, name, Range(0, numel), Range(0, position))

    def _lacks(self, kind: str, name: str, expected: Range, found: Range) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint lacks some elements of {name!r} ({kind})",
            where=str(self.folder),
            expected=f"[{expected.start}, {expected.end})",
            got=f"[{found.start}, {found.end})",
            hint="go back to an earlier checkpoint",
        )

    def _read_piece(self, piece: PieceRecord, start: int, end: int) -> Tensor:
        """Return elements [start, end) of the piece. The caller must not modify them.

        The first call reads and checks the full piece.
        """
        recent, tensor = self._recent.get(piece.kind, (None, None))
        if tensor is not None and recent is piece:
            return tensor[start:end]
        path = self.folder / piece.file
        checked = (piece.file, piece.key) in self._checked
        try:
            if piece.file not in self._files:
                if isinstance(self.folder, Path):
                    open_inside(self.folder, piece.file).close()  # refuses links to other folders
                self._files[piece.file] = TensorFile(path)
            file = self._files[piece.file]
            if self._last != piece.file and self._last in self._files:
                self._files[self._last].rest()
            self._last = piece.file
            if checked:
                return file.read(piece.key, start, end - start)
            tensor = file.read(piece.key, 0, piece.numel)
        except (OSError, ValueError) as error:
            earlier = "go back to an earlier checkpoint"
            raise CheckpointError(
                "a file of the checkpoint is missing or broken",
                where=str(path),
                got=error,
                hint=hint_of(error, earlier) if isinstance(error, OSError) else earlier,
            ) from error
        found = zlib.crc32(bytes_of(tensor))
        if found != piece.crc32 or dtype_name(tensor.dtype) != piece.dtype:
            raise CheckpointError(
                f"the checkpoint's {piece.key!r} is damaged",
                where=str(path),
                expected=f"{piece.numel} elements of {piece.dtype} with checksum {piece.crc32:08x}",
                got=f"elements of {dtype_name(tensor.dtype)} with checksum {found:08x}",
                hint="go back to an earlier checkpoint",
            )
        self._checked.add((piece.file, piece.key))
        if tensor.nbytes <= CACHED_BYTES:
            self._recent[piece.kind] = piece, tensor
        return tensor[start:end]
