"""A checkpoint's weights under their names in the model's state_dict, read a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.address import Place
from manyhands.checkpoint.format import Manifest, TensorRecord, read_frozen_manifest, read_manifest
from manyhands.checkpoint.pieces import PieceReader
from manyhands.checkpoint.tensor_file import TensorEntry
from manyhands.errors import CheckpointError
from manyhands.layout import BLOCK, blocks_of
from manyhands.numerics.blocks import block_hashes
from manyhands.numerics.digest import digest_of


class SavedWeights:
    """The tensors of a checkpoint under their names in the model's state_dict, as they shall be written.

    A tied tensor has the first of its names, that of `named_parameters()`: loaders tie it again.
    """

    def __init__(self, folder: Place, cast: torch.dtype | None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if self.manifest.computed:
            raise CheckpointError(
                f"the model's state_dict has tensors that aren't the model's: {', '.join(self.manifest.computed[:5])}",
                where=str(folder),
                hint="they come from a hook or a state_dict() of its own, and checkpoints don't hold them",
            )
        self._pieces = PieceReader(folder, self.manifest.pieces)
        self._frozen = _frozen_reader(folder, self.manifest)
        self._records = {record.keys[0]: record for record in self.manifest.tensors if record.keys}
        self._masters = [record for record in self.manifest.tensors if record.kind == "master"]
        firsts = list(accumulate((blocks_of(record.numel) for record in self._masters), initial=0))
        self._first_blocks = {record.name: first for record, first in zip(self._masters, firsts[:-1], strict=True)}
        # One array from the start: small ones kept between large ones that come and go would tear the heap to pieces.
        self._hashes = np.zeros(firsts[-1], dtype=np.int64)
        self.entries = [TensorEntry(key, _stored(record, cast), record.shape) for key, record in self._records.items()]
        self.dtype = next((entry.dtype for entry in self.entries if entry.dtype.is_floating_point), torch.float32)
        self.nbytes = sum(entry.nbytes for entry in self.entries)
        self.num_parameters = sum(record.numel for record in self._records.values() if record.is_parameter)

    def parts(self, entry: TensorEntry) -> Iterator[Tensor]:
        """The tensor's elements, in order, in parts."""
        record = self._records[entry.name]
        reader = self._frozen if record.kind == "frozen" else self._pieces
        for piece in reader.parts(record.kind, record.name, record.numel):
            if record.kind == "master":
                self._hash(record.name, piece.start, piece.tensor)
            yield piece.tensor.to(entry.dtype)

    def _hash(self, name: str, start: int, part: Tensor) -> None:
        missing = -part.numel() % BLOCK  # a piece begins at a block, and ends at one or at the parameter's end
        padded = torch.nn.functional.pad(part, (0, missing)) if missing else part
        first = self._first_blocks[name] + start // BLOCK
        self._hashes[first : first + padded.numel() // BLOCK] = block_hashes(padded).numpy()

    def check_digest(self) -> None:
        """That what was read, which is all of it by now, are the weights that were saved. Raises CheckpointError."""
        for record in self._masters:
            if not record.keys:  # its model leaves it out of the state_dict
                for piece in self._pieces.parts(record.kind, record.name, record.numel):
                    self._hash(record.name, piece.start, piece.tensor)
        found = digest_of([(record.name, record.numel) for record in self._masters], self._hashes)
        if found != self.manifest.digest:
            raise CheckpointError(
                "the loaded weights are not those that were saved",
                where=str(self.folder),
                expected=self.manifest.digest,
                got=found,
                hint="go back to an earlier checkpoint",
            )


def _stored(record: TensorRecord, cast: torch.dtype | None) -> torch.dtype:
    own: torch.dtype = getattr(torch, record.dtype)
    return own if cast is None or not (record.is_parameter and own.is_floating_point) else cast


def _frozen_reader(folder: Place, manifest: Manifest) -> PieceReader:
    if manifest.frozen is None:
        return PieceReader(folder, [])
    frozen = folder.absolute().parent / manifest.frozen
    if not frozen.is_dir():
        raise CheckpointError(
            "the checkpoint's frozen parameters are not there: they lie beside it",
            where=str(frozen),
            hint="keep that folder and the checkpoint together; training the run to one more checkpoint writes it anew",
        )
    return PieceReader(frozen, read_frozen_manifest(frozen).pieces)
