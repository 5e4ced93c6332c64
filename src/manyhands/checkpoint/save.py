"""Save an engine's state: every worker writes the ranges that it owns, and the whole is published by one rename."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from torch import Tensor

from manyhands.checkpoint.format import (
    FORMAT,
    MANIFEST,
    Manifest,
    PieceRecord,
    Scalar,
    decode_state,
    encode_state,
    folder_name,
    list_checkpoints,
    read_manifest,
)
from manyhands.engine.control import gather_json
from manyhands.engine.engine import StepEngine
from manyhands.errors import CheckpointError
from manyhands.numerics.identity import numerics_identity

Scalars = dict[str, dict[str, dict[str, Any]]]
"""By parameter and kind: a Scalar, as JSON has it."""


def save_checkpoint(engine: StepEngine, root: Path, *, keep: int | None = None) -> Path:
    """Write the engine's state to a new folder in `root`; returns it. Collective.

    keep: how many checkpoints to leave in `root` (None: all). One of this step with the same weights stays;
    one with others is replaced.
    Raises CheckpointError; what was published before is never touched by a failure.
    """
    group, step = engine.group, engine.step_index
    final, partial = root / folder_name(step), root / f".{folder_name(step)}.partial"
    tag = f"step {step} / checkpoint"
    group.status(tag)
    digest = engine.digest()
    if all(gather_json(group, _holds(final, digest), f"{tag} / control")):
        return final
    if group.rank == 0:
        with _as_checkpoint_error(partial):
            _remove_partial(root)
            partial.mkdir(parents=True)
    group.barrier(f"{tag} begins / control")
    records, scalars = _write_pieces(engine, partial)
    everyone: list[Any] = gather_json(group, {"pieces": records, "scalars": scalars}, f"{tag} / control")
    if group.rank == 0:
        manifest = Manifest(
            format=FORMAT,
            step=step,
            workers=group.size,
            stage=engine.strategy.stage,
            facts=engine.facts(),
            identity=numerics_identity(group.device, engine.recipe.threads_per_worker),
            digest=digest,
            hyperparameters=engine.optimizer.hyperparameters(),
            schedule=_schedule_state(engine),
            scalars={
                name: {kind: Scalar(**number) for kind, number in numbers.items()}
                for theirs in everyone
                for name, numbers in theirs["scalars"].items()
            },
            pieces=[PieceRecord(**record) for theirs in everyone for record in theirs["pieces"]],
        )
        with _as_checkpoint_error(final):
            _publish(partial, final, manifest)
            for _, old in list_checkpoints(root)[: -keep if keep else 0]:
                if old != final:
                    _remove(old)
    group.barrier(f"{tag} published / control")
    return final


def _write_pieces(engine: StepEngine, folder: Path) -> tuple[list[dict[str, Any]], Scalars]:
    file, arrays, records = f"worker-{engine.group.rank}.safetensors", {}, []
    scalars: Scalars = {}
    for kind, name, start, tensor, shape in _tensors(engine, scalars):
        key = f"{kind}|{name}|{start}"
        array = tensor.detach().cpu().contiguous().numpy()
        arrays[key] = array
        record = PieceRecord(
            file=file,
            key=key,
            kind=kind,
            name=name,
            start=start,
            numel=tensor.numel(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=shape,
            crc32=zlib.crc32(array.data.cast("B") if array.size else b""),
        )
        records.append(record.model_dump())
    with _as_checkpoint_error(folder / file):
        save_file(arrays, folder / file)
        _sync(folder / file)
    return records, scalars


def _tensors(engine: StepEngine, scalars: Scalars) -> Iterator[tuple[str, str, int, Tensor, list[int] | None]]:
    """(kind, name, first element, 1-D tensor, shape of a buffer) of what this worker owns; fills in `scalars`."""
    for piece, owned in engine.updater.slices:
        if not owned.numel:
            continue
        cut, start = slice(owned.start, owned.end), piece.start + owned.start
        yield "master", piece.name, start, piece.master[cut], None
        for kind, value in engine.optimizer.state_of(piece).items():
            if isinstance(value, Tensor) and value.dim() and value.numel() == piece.master.numel():
                yield kind, piece.name, start, value[cut], None
            elif value is not None:
                scalars.setdefault(piece.name, {})[kind] = _scalar(value).model_dump()
    if engine.group.rank == 0:
        for name, buffer in engine.buffers.named().items():
            kept = buffer.view(torch.int16) if buffer.dtype == torch.bfloat16 else buffer
            yield "buffer", name, 0, kept.reshape(-1), list(buffer.shape)


def _scalar(value: Tensor | float | int | bool) -> Scalar:
    if isinstance(value, Tensor):
        return Scalar(value=value.item(), dtype=str(value.dtype).removeprefix("torch."), device=value.device.type)
    return Scalar(value=value)


def _schedule_state(engine: StepEngine) -> dict[str, Any] | None:
    if engine.schedule is None:
        return None
    state: dict[str, Any] = engine.schedule.state_dict()
    encoded: dict[str, Any] = encode_state(state)
    if decode_state(json.loads(json.dumps(encoded))) != state:
        raise CheckpointError(
            f"the state of the schedule {type(engine.schedule).__qualname__} can't be written down exactly",
            got=", ".join(state),
            hint="use a schedule whose state_dict() holds numbers, texts, lists and dicts of them",
        )
    return encoded


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    path = partial / MANIFEST
    path.write_text(manifest.model_dump_json())
    _sync(path)
    _sync(partial)
    if final.exists():
        _remove(final)
    os.rename(partial, final)
    _sync(final.parent)


def _holds(folder: Path, digest: str) -> bool:
    """Whether the checkpoint in `folder` is there and has these weights."""
    try:
        return read_manifest(folder).digest == digest
    except CheckpointError:
        return False


def _remove(folder: Path) -> None:
    """Delete a checkpoint: out of sight first, so that a kill on the way leaves none that is only half there."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _remove_partial(root: Path) -> None:
    """What earlier runs were killed over."""
    if root.is_dir():
        for path in root.glob(".step-*.partial"):
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _as_checkpoint_error:
    """An OSError inside (a full disk, a folder that may not be written) becomes a CheckpointError naming `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint can't be written: {error.strerror or error}",
                where=str(self._path),
                hint="free some space or choose another run directory; earlier checkpoints are whole",
            ) from error
