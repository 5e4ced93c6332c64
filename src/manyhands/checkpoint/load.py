"""Loads a checkpoint: each worker reads the ranges it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.extra_state import load_extra_states
from manyhands.checkpoint.format import AVERAGE, Manifest, Scalar, read_manifest
from manyhands.checkpoint.pieces import PieceReader
from manyhands.engine.step.amendments import Amendments
from manyhands.engine.step_engine import StepEngine
from manyhands.engine.update.companions import KINDS as COMPANIONS
from manyhands.errors import CheckpointError, NumericsError
from manyhands.optim.plain_values import decode_state, is_plain
from manyhands.optim.shared_state import is_shared
from manyhands.optim.sliced import Slice
from manyhands.storage.location import Location
from manyhands.storage.tensor_file import dtype_named


class CheckpointReader(PieceReader):
    """Reads ranges of a checkpoint's tensors. Raises CheckpointError for missing or damaged files."""

    def __init__(self, folder: Location) -> None:
        self.manifest = read_manifest(folder)
        super().__init__(folder, self.manifest.pieces)

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers."""
        return {
            record.name: self.read("buffer", record.name, 0, record.numel).view(record.shape)
            for record in self.manifest.tensors
            if record.kind == "buffer"
        }


def load_checkpoint(
    engine: StepEngine,
    folder: Location,
    *,
    accept_new_numerics: bool = False,
    other_facts: Mapping[str, str | None] | None = None,
) -> Manifest:
    """Load the checkpoint in `folder` into the engine. Collective.

    Raises CheckpointError if the checkpoint is missing, damaged or of another recipe, and NumericsError if it was saved
    under another numerics identity. accept_new_numerics: if True, load the checkpoint nevertheless. The bits of later
    steps may then differ from those of the run that saved it. other_facts: facts in which the checkpoint must differ
    from the engine; None for a fact that it must lack.
    """
    return restore(engine, CheckpointReader(folder), accept_new_numerics=accept_new_numerics, other_facts=other_facts)


def restore(
    engine: StepEngine,
    reader: CheckpointReader,
    *,
    accept_new_numerics: bool = False,
    other_facts: Mapping[str, str | None] | None = None,
) -> Manifest:
    """Load the state that `reader` provides into the engine, as `load_checkpoint` does. Collective."""
    manifest, folder = reader.manifest, reader.folder
    _check_facts(manifest, engine.facts() | dict(other_facts or {}), folder)
    amendments = _with_past(manifest, engine.amendments, folder)
    hyperparameters = _hyperparameters(manifest, engine, folder)
    attributes = _attributes(manifest, engine, folder)
    if not accept_new_numerics:
        check_identity(manifest.identity, engine.identity, str(folder))
    engine.group.barrier(f"{folder.name} / load / control")  # another worker may still read the weights
    with engine.changing():
        engine.optimizer.load_hyperparameters(hyperparameters)
        engine.optimizer.load_attributes(attributes)
        engine.updater.average.count = manifest.averaged
        engine.updater.refill(lambda piece: _fill(piece, engine, reader))
        buffers = engine.buffers.named()
        for name, value in reader.buffers().items():
            if name in buffers:
                buffers[name].copy_(value)
        _load_schedules(manifest, engine, folder)
        load_extra_states(engine.model, manifest.extra_states, reader)
        engine.step_index, engine.island, engine.amendments = manifest.step, manifest.island, amendments
        engine.progress, engine.extra_state = decode_state(manifest.progress), decode_state(manifest.user_state)
        found = engine.digest() if manifest.digest else ""
        if found != manifest.digest:
            raise CheckpointError(
                "the loaded weights are not those that were saved",
                where=str(folder),
                expected=manifest.digest,
                got=found,
                hint="go back to an earlier checkpoint",
            )
    return manifest


def _fill(piece: Slice, engine: StepEngine, reader: CheckpointReader) -> None:
    """Fill a slice's master weights, average, companions and optimizer state from the checkpoint."""
    piece.master.copy_(_read_like(piece, "master", reader))
    if piece.average is not None and reader.manifest.averaged:
        piece.average.copy_(reader.read(AVERAGE, piece.name, piece.start, piece.average.numel()))
    kinds = [kind for kind in reader.kinds_of(piece.name) if kind not in ("master", AVERAGE)]
    for kind, tensor in piece.companions.items():
        if kind in kinds:  # a checkpoint of an island at rest leaves out what all islands share
            tensor.copy_(reader.read(kind, piece.name, piece.start, tensor.numel()))
    state: dict[str, Tensor | float | int | bool | str | None] = {
        kind: _read_like(piece, kind, reader) for kind in kinds if kind not in COMPANIONS
    }
    for kind, number in reader.manifest.scalars.get(piece.name, {}).items():
        # torch's optimizers update a step count in place if it is a tensor, so it must be on the right device.
        device = torch.device("cpu") if number.device == "cpu" else piece.master.device
        try:
            state[kind] = _value_of(number, device)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint's {kind} of {piece.name!r} is not a valid {number.dtype}",
                where=str(reader.folder),
                got=number.value,
                hint="go back to an earlier checkpoint",
            ) from error
    # The saved state is empty if it was saved before the parameter's first update. It still replaces the engine's
    # state.
    engine.optimizer.load_state_of(piece, state)


def _value_of(number: Scalar, device: torch.device) -> Tensor | float | int | bool | str | None:
    if number.dtype is None:
        return number.value
    return torch.tensor(number.value, dtype=dtype_named(number.dtype), device=device).view([1] * number.dims)


def _read_like(piece: Slice, kind: str, reader: CheckpointReader) -> Tensor:
    """Return a tensor of the slice's optimizer state.

    A tensor that was saved unsplit is returned complete, in its own shape. Other tensors are returned over the slice's
    range, in the shape of the master weights.
    """
    unsplit = reader.read_full(kind, piece.name)
    if unsplit is not None:
        return unsplit
    return reader.read(kind, piece.name, piece.start, piece.master.numel()).view(piece.master.shape)


def _check_facts(manifest: Manifest, facts: Mapping[str, str | None], folder: Location) -> None:
    for name in [*facts, *manifest.facts]:
        expected = facts.get(name)
        saved, now = manifest.facts.get(name, "nothing"), "nothing" if expected is None else expected
        if saved != now:
            raise CheckpointError(
                f"the checkpoint belongs to another recipe: {name} differs",
                where=str(folder),
                expected=f"{saved} (saved)",
                got=f"{now} (this recipe)",
                hint="use the recipe that it was saved with, or start a new run directory; to change clip_norm or a "
                f"setting of the optimizer in the middle of a run: --amend KEY=VALUE --from-step {manifest.step + 1}",
            )


def _with_past(manifest: Manifest, mine: Amendments, folder: Location) -> Amendments:
    """Return the engine's amendments, and those with which the checkpoint was computed.

    Raises CheckpointError if the engine has others for steps that are complete in the checkpoint.
    """
    past = Amendments.from_json(manifest.amendments)
    new = [each for each in mine.up_to(manifest.step).described() if each not in past.described()]
    if new:
        raise CheckpointError(
            "the checkpoint was computed without these amendments",
            where=str(folder),
            expected="; ".join(new),
            got="; ".join(past.described()) or "a checkpoint without amendments",
            hint=f"amend steps from {manifest.step + 1} on; or remove the later checkpoints, to go back to an earlier "
            "one",
        )
    return mine.joined(past)


def _hyperparameters(manifest: Manifest, engine: StepEngine, folder: Location) -> list[dict[str, Any]]:
    """Return the saved hyperparameters. Steps may have added entries that a new optimizer lacks."""
    now = engine.optimizer.hyperparameters()
    saved = [decode_state(group) for group in manifest.hyperparameters]
    pairs = list(zip(saved, now, strict=False))
    if len(saved) != len(now) or not all(map(is_plain, saved)) or not all(_fit(one, other) for one, other in pairs):
        raise CheckpointError(
            "the checkpoint's hyperparameters don't match the recipe's optimizer",
            where=str(folder),
            expected=now,
            got=saved,
            hint="use the recipe and the torch version that it was saved with, or go back to an earlier checkpoint",
        )
    for group, current in pairs:  # earlier versions saved tuples as lists
        for key, value in current.items():
            if isinstance(value, tuple) and isinstance(group[key], list):
                group[key] = tuple(group[key])
    return saved


def _fit(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return True if `saved` has all entries of `now`, with values of the same kinds. None matches every kind."""
    return now.keys() <= saved.keys() and all(
        None in (value, saved[key]) or _kind(value) == _kind(saved[key]) for key, value in now.items()
    )


def _kind(value: object) -> str:
    """Return the kind of a value. The values themselves may differ, because schedules change them."""
    kinds = {float: "number", int: "number", tuple: "list", list: "list"}
    return kinds.get(type(value), type(value).__name__)


def _attributes(manifest: Manifest, engine: StepEngine, folder: Location) -> list[dict[str, Any]]:
    """Return the saved attributes of each optimizer. They are empty if an earlier version saved the checkpoint."""
    count = len(engine.optimizer.fronts)
    saved = [decode_state(attributes) for attributes in manifest.attributes] or [{} for _ in range(count)]
    items = [item for attributes in saved for item in attributes.items()]
    if len(saved) != count or not all(is_shared(name, value) for name, value in items):
        raise CheckpointError(
            "the checkpoint's hyperparameters don't match the recipe's optimizer",
            where=str(folder),
            expected=f"attributes of {count} optimizer(s)",
            got=saved,
            hint="use the recipe that it was saved with, or go back to an earlier checkpoint",
        )
    return saved


def _load_schedules(manifest: Manifest, engine: StepEngine, folder: Location) -> None:
    try:
        for schedule, saved in zip(engine.schedules, manifest.schedules, strict=True):
            schedule.load_state_dict(decode_state(saved))
    except Exception as error:  # the schedule may be the user's own class, which may raise anything
        raise CheckpointError(
            "the schedules can't load their state from the checkpoint",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            hint="use the recipe that it was saved with, or go back to an earlier checkpoint",
        ) from error


def check_identity(saved: dict[str, str], now: dict[str, str], where: str) -> None:
    """Raise NumericsError if the two numerics identities differ. where: the location of the saved identity."""
    for name in [*saved, *now]:
        if saved.get(name) != now.get(name):
            raise NumericsError(
                f"the run was started with different numerics: {name} differs, so its bits can't be reproduced here",
                where=where,
                expected=f"{saved.get(name)} (saved)",
                got=f"{now.get(name)} (here)",
                hint="resume it where it was started, or pass --accept-new-numerics (accept_new_numerics=True)",
            )
