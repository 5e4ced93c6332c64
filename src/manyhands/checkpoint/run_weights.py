"""Initial weights from a checkpoint of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.find import find_checkpoint
from manyhands.checkpoint.format import MANIFEST, list_checkpoints
from manyhands.checkpoint.saved_weights import SavedWeights
from manyhands.checkpoint.weight_files import INDEX, SINGLE, WeightFiles, WeightSource
from manyhands.storage.location import Location, location_of
from manyhands.storage.tensor_file import TensorEntry


class RunWeights:
    """The master weights, frozen parameters and persistent buffers of a checkpoint, as a source of initial weights.

    The checksums of all pieces that are read are checked. Raises CheckpointError for missing or damaged files.
    """

    def __init__(self, folder: Location) -> None:
        self.path, self.read_bytes = folder, 0
        self._saved = SavedWeights(folder, None)
        records = [record for record in self._saved.manifest.tensors if record.keys or record.is_parameter]
        self._records = {(record.keys or (record.name,))[0]: record for record in records}
        self.entries = {
            key: TensorEntry(
                key, torch.float32 if record.kind == "master" else getattr(torch, record.dtype), record.shape
            )
            for key, record in self._records.items()
        }

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of a tensor, 1-D, in the dtype in which they are stored."""
        record = self._records[name]
        part = self._saved.reader_of(record).read(record.kind, record.name, start, numel)
        self.read_bytes += part.nbytes
        return part

    def where(self, name: str) -> str:
        """Return the checkpoint."""
        return str(self.path)

    def facts(self) -> dict[str, str]:
        """Return facts that differ if the weights differ."""
        manifest = self._saved.manifest
        return {"step": str(manifest.step), "digest": manifest.digest, "frozen parameters": str(manifest.frozen)}

    def described(self) -> dict[str, Any]:
        """Return where the weights come from: the checkpoint, its step, and the digest of its weights."""
        manifest = self._saved.manifest
        return {"path": str(self.path.absolute()), "step": manifest.step, "digest": manifest.digest}


def initial_weights_at(path: str) -> WeightSource:
    """Return the initial weights at a path: safetensors files, one checkpoint, or the last checkpoint of a run
    directory or of a folder or address of checkpoints.

    Raises ConfigError if there are none, and CheckpointError for a file that is missing or broken.
    """
    place = location_of(path)
    return (
        WeightFiles(place) if isinstance(place, Path) and not _is_of_run(place) else RunWeights(find_checkpoint(place))
    )


def _is_of_run(place: Path) -> bool:
    if not place.is_dir() or (place / SINGLE).exists() or (place / INDEX).exists():
        return False
    return (place / MANIFEST).exists() or (place / "checkpoints").is_dir() or bool(list_checkpoints(place))
