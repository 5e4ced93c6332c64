"""The weights of a checkpoint, read piece by piece without the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.extra_state import KIND as EXTRA
from manyhands.checkpoint.extra_state import exported
from manyhands.checkpoint.format import AVERAGE, Manifest, TensorRecord, read_frozen_manifest, read_manifest
from manyhands.checkpoint.pieces import PieceReader, TensorPiece
from manyhands.config import PRECISIONS
from manyhands.errors import CheckpointError, ConfigError
from manyhands.numerics.digest import block_hashes, digest_of, tensor_hashes, words_of
from manyhands.options import nearest
from manyhands.shard_layout import BLOCK, blocks_of
from manyhands.storage.location import Location
from manyhands.storage.tensor_file import TensorEntry, dtype_named


class SavedWeights:
    """The tensors of a checkpoint. entries: under their names in the model's state_dict, in the dtypes to write.
    records: the manifest's records of these tensors, by name, without extra states.

    cast: the dtype of floating-point parameters; None for the dtypes in which the model was trained. A tied tensor has
    only one entry, under its first name, the one in `named_parameters()`. Loaders tie it again. averaged: True for the
    average of the weights in place of the trained weights.
    """

    def __init__(self, folder: Location, cast: torch.dtype | None, *, averaged: bool = False) -> None:
        self.folder, self.manifest, self.averaged = folder, read_manifest(folder), averaged
        if averaged and not self.manifest.averaged:
            raise ConfigError(
                "the checkpoint has no average of the weights",
                where=str(folder),
                expected="a checkpoint of a run with an average, after the average has begun",
                got=self.manifest.facts.get("average of the weights", "a recipe without an average"),
                hint="use the trained weights, or a later checkpoint",
            )
        self.pieces = PieceReader(folder, self.manifest.pieces)
        self._frozen = _frozen_reader(folder, self.manifest)
        self.records = {record.keys[0]: record for record in self.manifest.tensors if record.keys}
        self._digested = [record for record in self.manifest.tensors if _is_in_digest(record)]
        self._names = [(record.name, _words(record)) for record in self._digested]
        firsts = list(accumulate((blocks_of(words) for _, words in self._names), initial=0))
        self._first_blocks = {name: first for (name, _), first in zip(self._names, firsts[:-1], strict=True)}
        # Allocate one array at the start: small arrays between large temporary ones would fragment the heap.
        self._hashes = np.zeros(firsts[-1], dtype=np.int64)
        self._read: set[str] = set()
        self.entries = [
            TensorEntry(key, stored_dtype(record, cast), record.shape) for key, record in self.records.items()
        ]
        self._extra, self.extra_states = exported(self.manifest.extra_states, self.pieces)
        pieces = {piece.name: piece for piece in self.manifest.pieces if piece.kind == EXTRA}
        for key, name in self._extra.items():
            self.entries.append(TensorEntry(key, dtype_named(pieces[name].dtype), pieces[name].shape or ()))
        self.dtype = next((entry.dtype for entry in self.entries if entry.dtype.is_floating_point), torch.float32)
        self.nbytes = sum(entry.nbytes for entry in self.entries)
        self.num_parameters = sum(record.numel for record in self.records.values() if record.is_parameter)

    def parts(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Yield the elements of the tensor in parts, in order."""
        if entry.name in self._extra:
            yield self.pieces.read(EXTRA, self._extra[entry.name], 0, math.prod(entry.shape))
            return
        for part in self.parts_of(self.records[entry.name]):
            yield part.to(entry.dtype)

    def parts_of(self, record: TensorRecord) -> Iterator[Tensor]:
        """Yield the elements of a tensor of the model in parts, in order, in the dtype in which they are stored."""
        self._read.add(record.name)
        reader = self.reader_of(record)
        kind = AVERAGE if self.averaged and record.kind == "master" else record.kind
        for piece in reader.parts(kind, record.name, record.numel):
            if _is_in_digest(record):
                self._hash(record, piece)
            yield piece.tensor

    def reader_of(self, record: TensorRecord) -> PieceReader:
        """Return the reader of the files that hold a tensor of the model."""
        return self._frozen if record.kind == "frozen" else self.pieces

    def _hash(self, record: TensorRecord, piece: TensorPiece) -> None:
        first, part = self._first_blocks[record.name] + piece.start // BLOCK, piece.tensor
        if record.kind == "buffer":  # stored in one piece
            hashes = tensor_hashes(part)
        else:
            # A piece starts at a block boundary, and ends at one or at the parameter's end.
            missing = -part.numel() % BLOCK
            hashes = block_hashes(torch.nn.functional.pad(part, (0, missing)) if missing else part).numpy()
        self._hashes[first : first + len(hashes)] = hashes

    def digest(self) -> str:
        """Return the digest of the weights, before any cast. Tensors that were not read yet are read for it.

        Raises CheckpointError unless the trained weights are those that were saved. For the average, each piece was
        compared with its checksum when it was read.
        """
        for record in self._digested:
            if record.name not in self._read:
                for _ in self.parts_of(record):
                    pass
        found = digest_of(self._names, self._hashes)
        if found != self.manifest.digest and not self.averaged:
            raise CheckpointError(
                "the loaded weights are not those that were saved",
                where=str(self.folder),
                expected=self.manifest.digest,
                got=found,
                hint="go back to an earlier checkpoint",
            )
        return found


def _is_in_digest(record: TensorRecord) -> bool:
    return record.kind == "master" or (record.kind == "buffer" and not record.is_parameter and bool(record.keys))


def _words(record: TensorRecord) -> int:
    return words_of(torch.empty(record.shape, dtype=getattr(torch, record.dtype), device="meta"))


def stored_dtype(record: TensorRecord, cast: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a tensor if floating-point parameters are cast to `cast`."""
    own: torch.dtype = getattr(torch, record.dtype)
    return own if cast is None or not (record.is_parameter and own.is_floating_point) else cast


def _frozen_reader(folder: Location, manifest: Manifest) -> PieceReader:
    if manifest.frozen is None:
        return PieceReader(folder, [])
    frozen = folder.absolute().parent / manifest.frozen
    if not frozen.is_dir():
        raise CheckpointError(
            "the checkpoint's frozen parameters are missing: their folder should be next to the checkpoint",
            where=str(frozen),
            hint="move that folder together with the checkpoint; or continue the run until its next checkpoint, "
            "which writes the folder again",
        )
    return PieceReader(frozen, read_frozen_manifest(frozen).pieces)


_DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True))


def precision_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of "fp32" or "bf16"; None for None. Raises ConfigError for another name."""
    if name is not None and name not in _DTYPES:
        raise ConfigError(
            "weights can't have this dtype",
            expected=" or ".join(PRECISIONS),
            got=repr(name),
            hint=nearest(name, PRECISIONS),
        )
    return None if name is None else _DTYPES[name]
