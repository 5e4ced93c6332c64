"""Save an engine's state: every worker writes the ranges that it owns, and the whole is published by one rename."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manyhands.checkpoint.format import (
    FORMAT,
    FrozenManifest,
    Manifest,
    PieceRecord,
    Scalar,
    TensorRecord,
    decode_state,
    encode_state,
    folder_name,
    list_checkpoints,
    read_frozen_manifest,
    read_manifest,
)
from manyhands.checkpoint.hugging_face import config_files
from manyhands.checkpoint.pieces import Piece, dtype_name, write_pieces
from manyhands.checkpoint.publish import as_checkpoint_error, publish_together, remove
from manyhands.engine.control import gather_json
from manyhands.engine.engine import StepEngine
from manyhands.errors import CheckpointError
from manyhands.numerics.identity import numerics_identity

Scalars = dict[str, dict[str, dict[str, Any]]]
"""By parameter and kind: a Scalar, as JSON has it."""

FROZEN_PIECE_NUMEL = 1 << 20
"""Elements in a piece of a frozen parameter: what a reader has in memory at once."""


def save_checkpoint(engine: StepEngine, root: Path, *, keep: int | None = None) -> Path:
    """Write the engine's state to a new folder in `root`; returns it. Collective.

    keep: how many checkpoints to leave in `root` (None: all). One of this step with the same weights stays;
    one with others is replaced. Frozen parameters are written once, beside the first checkpoint.
    Raises CheckpointError; what was published before is never touched by a failure.
    """
    group, step = engine.group, engine.step_index
    final = root / folder_name(step)
    tag = f"step {step} / checkpoint"
    group.status(tag)
    digest = engine.digest()
    if all(gather_json(group, _holds(final, digest), f"{tag} / control")):
        return final
    tensors, computed = _tensor_records(engine)
    frozen = _save_frozen(engine, root, tensors, f"step {step} / frozen")

    def manifest_of(everyone: list[dict[str, Any]]) -> Manifest:
        return Manifest(
            format=FORMAT,
            step=step,
            workers=group.size,
            stage=engine.strategy.stage,
            facts=engine.facts(),
            identity=numerics_identity(group.device, engine.recipe.threads_per_worker),
            digest=digest,
            hyperparameters=engine.optimizer.hyperparameters(),
            schedules=[_schedule_state(schedule) for schedule in engine.schedules],
            scalars={
                name: {kind: Scalar(**number) for kind, number in numbers.items()}
                for theirs in everyone
                for name, numbers in theirs["scalars"].items()
            },
            tensors=tensors,
            frozen=frozen,
            computed=computed,
            config_files=config_files(engine.model),
            pieces=_joined(everyone),
        )

    publish_together(final, group, partial(_write_mine, engine), manifest_of, tag)
    if group.rank == 0:
        with as_checkpoint_error(root):
            for _, old in list_checkpoints(root)[: -keep if keep else 0]:
                if old != final:
                    remove(old)
    group.barrier(f"{tag} published / control")
    return final


def _write_mine(engine: StepEngine, folder: Path) -> dict[str, Any]:
    scalars: Scalars = {}
    records = write_pieces(_file_of(engine, folder), list(_pieces(engine, scalars)))
    return {"pieces": [record.model_dump() for record in records], "scalars": scalars}


def _file_of(engine: StepEngine, folder: Path) -> Path:
    return folder / f"worker-{engine.group.rank}.safetensors"


def _joined(everyone: list[dict[str, Any]]) -> list[PieceRecord]:
    return [PieceRecord(**record) for theirs in everyone for record in theirs["pieces"]]


def _pieces(engine: StepEngine, scalars: Scalars) -> Iterator[Piece]:
    """What this worker owns; fills in `scalars`."""
    for piece, owned in engine.updater.slices:
        if not owned.numel:
            continue
        cut, start = slice(owned.start, owned.end), piece.start + owned.start
        yield Piece("master", piece.name, start, piece.master.view(-1)[cut])
        for kind, value in engine.optimizer.state_of(piece).items():
            if isinstance(value, Tensor) and value.dim() and value.shape == piece.master.shape:
                yield Piece(kind, piece.name, start, value.reshape(-1)[cut])
            elif isinstance(value, Tensor) and value.dim() and piece.name in engine.optimizer.uncut:
                yield Piece(kind, piece.name, 0, value.reshape(-1), tuple(value.shape))
            elif value is not None:
                scalars.setdefault(piece.name, {})[kind] = _scalar(value).model_dump()
    if engine.group.rank == 0:
        for name, buffer in engine.buffers.named().items():
            yield Piece("buffer", name, 0, buffer.reshape(-1))


def _tensor_records(engine: StepEngine) -> tuple[list[TensorRecord], list[str]]:
    """All tensors of the model with their names in its state_dict, and the names there of what isn't one of them."""
    keys: dict[int, list[str]] = {}
    state = engine.model.state_dict(keep_vars=True)
    for key, value in state.items():
        if isinstance(value, Tensor):
            keys.setdefault(id(value), []).append(key)
    records, trained = [], {name for name, _ in engine.digest_names}
    for name, tensor in [*engine.model.named_parameters(), *engine.model.named_buffers()]:
        is_param = name in engine.param_shapes
        may_change = not is_param or name in engine.buffers.frozen
        record = TensorRecord(
            kind="buffer" if may_change else "master" if name in trained else "frozen",
            name=name,
            is_parameter=is_param,
            shape=tuple(engine.param_shapes[name] if is_param else tensor.shape),
            dtype=dtype_name(tensor.dtype),
            keys=tuple(keys.pop(id(tensor), [])),
        )
        records.append(record)
    return records, [key for others in keys.values() for key in others]


def _save_frozen(engine: StepEngine, root: Path, tensors: list[TensorRecord], tag: str) -> str | None:
    """Write the parameters that no step changes, unless they are there; the folder's name. Collective.

    The name comes from what is in it, so that runs of several recipes in one folder don't get in each other's way.
    """
    frozen = [record for record in tensors if record.kind == "frozen"]
    if not frozen:
        return None
    facts = engine.facts()
    said = [(record.name, record.shape, record.dtype, facts[f"frozen parameter {record.name}"]) for record in frozen]
    final = root / f"frozen-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
    if not all(gather_json(engine.group, _is_there(final), f"{tag} / control")):
        params = dict(engine.model.named_parameters())

        def write(folder: Path) -> dict[str, Any]:
            mine = list(_frozen_pieces({record.name: params[record.name] for record in frozen}, engine))
            return {"pieces": [record.model_dump() for record in write_pieces(_file_of(engine, folder), mine)]}

        publish_together(
            final, engine.group, write, lambda all_: FrozenManifest(format=FORMAT, pieces=_joined(all_)), tag
        )
    return final.name


def _frozen_pieces(params: dict[str, torch.nn.Parameter], engine: StepEngine) -> Iterator[Piece]:
    """A worker writes its shard of those that are sharded, and of the others, which every worker has, its share."""
    sharded = set()
    for unit in engine.frozen_units:
        sharded |= {slot.name for slot in unit.layout.slots}
        for piece in unit.layout.pieces(unit.layout.shard(engine.group.rank)):
            yield from _cut(piece.slot.name, piece.in_param.start, unit.params.kept(piece.in_unit))
    number = 0
    for name, param in params.items():
        if name not in sharded:
            for cut in _cut(name, 0, param.detach().reshape(-1)):
                if number % engine.group.size == engine.group.rank:
                    yield cut
                number += 1


def _cut(name: str, first: int, values: Tensor) -> Iterator[Piece]:
    for start in range(0, values.numel(), FROZEN_PIECE_NUMEL):
        yield Piece("frozen", name, first + start, values[start : start + FROZEN_PIECE_NUMEL])


def _scalar(value: Tensor | float | int | bool) -> Scalar:
    if isinstance(value, Tensor):
        return Scalar(value=value.item(), dtype=dtype_name(value.dtype), device=value.device.type)
    return Scalar(value=value)


def _schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    state: dict[str, Any] = schedule.state_dict()
    encoded: dict[str, Any] = encode_state(state)
    if decode_state(json.loads(json.dumps(encoded))) != state:
        raise CheckpointError(
            f"the state of the schedule {type(schedule).__qualname__} can't be written down exactly",
            got=", ".join(state),
            hint="use a schedule whose state_dict() holds numbers, texts, lists and dicts of them",
        )
    return encoded


def _holds(folder: Path, digest: str) -> bool:
    """Whether the checkpoint in `folder` is there and has these weights."""
    try:
        return read_manifest(folder).digest == digest
    except CheckpointError:
        return False


def _is_there(frozen: Path) -> bool:
    try:
        read_frozen_manifest(frozen)
    except CheckpointError:
        return False
    return True
