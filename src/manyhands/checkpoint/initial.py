"""Initial weights from weight files or another run's checkpoint: each worker reads the ranges it holds.

Weights that do not fit the model are refused before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.checkpoint.format import TensorRecord
from manyhands.checkpoint.run_weights import initial_weights_at
from manyhands.checkpoint.save import FROZEN_PIECE_NUMEL, tensor_records
from manyhands.checkpoint.weight_files import fit
from manyhands.comm.agreement import agree, all_gather_json
from manyhands.engine.step_engine import StepEngine
from manyhands.errors import ConfigError
from manyhands.models.building import evict_model
from manyhands.numerics.digest import fingerprint_of_parts
from manyhands.optim.sliced import Slice
from manyhands.weights import Weights


class InitialWeights(NamedTuple):
    """What this worker has read. source: where the weights come from; None if nothing was read."""

    read_bytes: int = 0
    source: dict[str, Any] | None = None


def load_initial(engine: StepEngine, weights: Weights, *, resumes: bool = False) -> InitialWeights:
    """Load initial weights into the engine. Collective.

    Parameters, frozen parameters and persistent buffers end up as if the model had been built with these values.
    resumes: True if this worker sees a checkpoint to resume from. If all workers see one, trained parameters are not
    read, because the checkpoint has them. Frozen parameters are always read, because loading a checkpoint does not
    restore them. Raises ConfigError if there are no weights or they do not fit the model, and CheckpointError for
    missing or broken files.
    """
    engine.group.status("start / initial weights")
    resumes = all(all_gather_json(engine.group, resumes, "start / resumes / control"))
    if resumes and all(name in dict(engine.trained) for name in engine.param_shapes):
        return InitialWeights()
    loader = _Loader(engine, weights)
    agree(engine.group, "initial weights", loader.files.facts(), hint="give all workers the same files")
    loader.fill_frozen_units()
    loader.fill_others()
    if not resumes:
        engine.updater.refill(loader.fill_slice)
    all_facts: list[Any] = all_gather_json(engine.group, loader.frozen_facts(), "start / frozen / control")
    for facts in all_facts:
        engine.frozen_facts |= facts
    return InitialWeights(loader.files.read_bytes, loader.files.described())


class _Loader:
    def __init__(self, engine: StepEngine, weights: Weights) -> None:
        self._engine = engine
        self.files = initial_weights_at(str(weights.path))
        self._records = {record.name: record for record in tensor_records(engine)[0]}
        self._sources = fit(list(self._records.values()), self.files, weights)
        # This is possible if the state_dict has another name for the parameter.
        for name in engine.pending - set(self._sources):
            raise ConfigError(
                f"parameter {name!r} may be missing from the initial weights, but the model has no value for it",
                where=str(self.files.path),
                hint="add a pattern that matches this name to weights.allow_missing",
            )

    def fill_slice(self, piece: Slice) -> None:
        """Fill the master weights of a slice that this worker holds."""
        if piece.name in self._sources:
            values = self._read(piece.name, piece.start, piece.master.numel())
            piece.master.copy_(values.view(piece.master.shape))

    def fill_frozen_units(self) -> None:
        """Fill this worker's shard of frozen units."""
        for unit in self._engine.frozen_units:
            for piece in unit.layout.pieces(unit.layout.shard(self._engine.group.rank)):
                if piece.slot.name in self._sources:
                    stored, first = unit.params.stored(piece.in_unit), piece.in_param.start
                    for start in range(0, stored.numel(), FROZEN_PIECE_NUMEL):
                        part = stored[start : start + FROZEN_PIECE_NUMEL]
                        part.copy_(self._read(piece.slot.name, first + start, part.numel()))
                    evict_model([stored], self._engine.allocator)

    def fill_others(self) -> None:
        """Fill buffers, and the frozen parameters that every worker holds completely."""
        in_units = {slot.name for unit in self._engine.frozen_units for slot in unit.layout.slots}
        tensors = dict(self._engine.model.named_parameters()) | self._engine.buffers.named()
        for record in self._found("buffer", "frozen"):
            if record.name not in in_units:
                values = self._read(record.name, 0, record.numel)
                tensors[record.name].data.copy_(values.view(record.shape))  # .data: autograd must not see the change

    def frozen_facts(self) -> dict[str, str]:
        """Return fingerprints of this worker's share of the frozen parameters. They are read a second time, in parts.

        A checkpoint and the run that loads it must have equal fingerprints, whatever their numbers of workers.
        """
        names = [record.name for record in self._found("buffer", "frozen") if record.is_parameter]
        mine = names[self._engine.group.rank :: self._engine.group.size]
        return {
            f"frozen parameter {name}": fingerprint_of_parts(name, self._engine.param_dtypes[name], self._parts(name))
            for name in mine
        }

    def _found(self, *kinds: str) -> list[TensorRecord]:
        return [record for name, record in self._records.items() if record.kind in kinds and name in self._sources]

    def _parts(self, name: str) -> Iterator[Tensor]:
        numel = self._records[name].numel
        for start in range(0, max(1, numel), FROZEN_PIECE_NUMEL):
            yield self._read(name, start, min(FROZEN_PIECE_NUMEL, numel - start))

    def _read(self, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of a tensor, 1-D, in the dtype that the model was built with."""
        dtype = self._engine.param_dtypes.get(name)  # None for a buffer: keep the file's dtype
        values = [self.files.read(source, start, numel) for source in self._sources[name]]
        for source, other in zip(self._sources[name][1:], values[1:], strict=True):
            if not torch.equal(values[0].to(dtype), other.to(dtype)):
                raise ConfigError(
                    f"the initial weights have two values for {name!r}, which is a single parameter of the model",
                    where=str(self.files.path),
                    got=f"{self._sources[name][0]} and {source} differ in elements [{start}, {start + numel})",
                    hint="don't tie the two parameters in the model; or ignore one of the values: "
                    "rename it to a name that `ignore` matches",
                )
        return values[0] if dtype is None else values[0].to(dtype)
