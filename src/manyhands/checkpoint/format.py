"""The logical format of checkpoints: a manifest and named pieces of tensors.

    checkpoints/step-00000100/
        manifest.json           step, facts of the recipe, numerics identity, scalars, the model's tensors, and which
                                file holds which range
        worker-0.safetensors    1-D pieces named "<kind>|<parameter>|<first element>": "exp_avg|head.weight|0"
    checkpoints/frozen-5f0c.../ parameters that no step changes, stored once for all checkpoints, in such files

The kinds are "master" (fp32 weights), "average of the weights" (fp32, if the recipe has an average that has begun),
"buffer", "frozen", and the optimizer's own names for the tensors of its state.
Optimizer state whose shape differs from its parameter's (Adafactor's row factors, for example) is saved unsplit. A
folder appears under its name only when it is complete: all files are written and synced in `.step-….partial`, which is
then renamed. A store cannot rename, so the files are in `step-00000100/5f0c11d2.../`, named after the attempt to write
them, and the manifest is written last. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from manyhands.errors import CheckpointError, ConfigError
from manyhands.storage.files import names_in
from manyhands.storage.location import Address, Location, hint_of, is_local, location_of
from manyhands.storage.sealed import unseal
from manyhands.storage.tensor_file import dtype_named
from manyhands.storage.untrusted import read_inside

CHECKPOINT_FORMAT = 5

MANIFEST = "manifest.json"

AVERAGE = "average of the weights"
"""The kind of the pieces of the average. No optimizer has a state of this name."""

OWNER = "run.json"
"""The record of the run that a folder of checkpoints belongs to, see `checkpoint.owner`."""

_M = TypeVar("_M", bound=BaseModel)

_NAME = re.compile(r"step-(\d{8,})")

Count = Annotated[int, Field(ge=0, lt=1 << 62)]

DtypeName = Annotated[str, AfterValidator(lambda name: dtype_named(name) and name)]

FileName = Annotated[str, Field(pattern=r"^([0-9a-f]{16}/)?worker-\d+\.safetensors$")]

ConfigName = Annotated[str, Field(pattern=r"^(generation_)?config\.json$")]

FrozenName = Annotated[str, Field(pattern=r"^frozen-[0-9a-f]{16}$")]


class PieceRecord(BaseModel):
    """The location of elements [start, start + numel) of a tensor: under `key` in `file`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    key: str
    kind: str
    name: str
    start: Count
    numel: Count
    dtype: DtypeName
    shape: tuple[Count, ...] | None = None  # set only for an unsplit tensor whose shape differs from its parameter's
    crc32: Count

    @model_validator(mode="after")
    def _has_as_many_elements(self) -> PieceRecord:
        if self.shape is not None and (self.start or math.prod(self.shape) != self.numel):
            raise ValueError(f"{self.numel} elements from {self.start} on can't have the shape {list(self.shape)}")
        return self


class TensorRecord(BaseModel):
    """A tensor of the model.

    kind: the kind of the pieces that store it. Small frozen parameters have "buffer", because they are managed like
    buffers. dtype: the dtype that the model computes with. keys: the tensor's names in the model's state_dict. A tied
    tensor has several names. A tensor that the state_dict leaves out, such as a buffer that is not persistent, has
    none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["master", "frozen", "buffer"]
    name: str
    is_parameter: bool
    shape: tuple[Count, ...]
    dtype: DtypeName
    keys: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class Scalar(BaseModel):
    """A number in the optimizer's state, or a text or None.

    dtype, device, dims: the dtype, device and number of dimensions of the tensor that holds the number. dtype is None
    for a plain number, a text or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    value: float | int | bool | str | None
    dtype: DtypeName | None = None
    device: str = "cpu"
    dims: Annotated[int, Field(ge=0, le=64)] = 0


class Product(BaseModel):
    """What an adapter adds to a weight matrix: scaling * (left @ right).

    left, right: names in the model's state_dict, of tensors [rows, rank, ...] and [rank, columns, ...]. transposed:
    True if the weight is stored as [columns, rows].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    left: str
    right: str
    scaling: float
    transposed: bool = False


class AdapterRecord(BaseModel):
    """The adapter of a peft model, as `checkpoint.adapters` finds it.

    config: the content of adapter_config.json. tensors: name in the adapter's file -> name in the model's state_dict.
    base_files: the config files of the base model, as `Manifest.config_files`. merged: name in the base model's
    state_dict -> name in the model's state_dict. products: what is added to the weights of the base model, by their
    names in the model's state_dict. unmergeable: why the adapter can't be merged; empty if it can.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    tensors: dict[str, str]
    base_files: dict[ConfigName, dict[str, Any]] = Field(default_factory=dict)
    merged: dict[str, str] = Field(default_factory=dict)
    products: dict[str, Product] = Field(default_factory=dict)
    unmergeable: str = ""


class Manifest(BaseModel):
    """The manifest of a checkpoint.

    scalars: the numbers in the optimizer's state: parameter -> kind -> number. hyperparameters: of each param group.
    attributes: those that steps have changed, of each optimizer. schedules: the states of LR schedulers.
    tensors: parameters in construction order, then buffers. frozen: the name of the folder with the frozen parameters.
    It is next to the checkpoint's folder. computed: names of tensors in the model's state_dict that are neither
    parameters nor buffers; they are not saved. config_files: the files that Hugging Face's loaders need next to the
    weights: file name -> content. extra_states: what `get_extra_state` of modules returned, see
    `checkpoint.extra_state`. amendments: the amendments of the steps so far, see `engine.step.amendments`. progress:
    the state of the run's validations, see `training.validating`. user_state: `Engine.extra_state`, encoded.
    stream: the position from which the workers can continue to read a stream, see `data.stream_samples.StreamPosition`.
    averaged: the number of weights in the average of the weights; 0 if there is no average, or if it has not begun.
    adapter: the adapter of a peft model. island: the island whose optimizer state the checkpoint has, see
    `training.island_states.NO_ISLAND`.

    Numbers may be infinite or NaN. Python's JSON has such values, but by default pydantic writes them as null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    format: int
    step: Count
    workers: Count
    sharding: str
    facts: dict[str, str]
    identity: dict[str, str]
    digest: str
    hyperparameters: list[dict[str, Any]]
    schedules: list[dict[str, Any]]
    scalars: dict[str, dict[str, Scalar]]
    tensors: list[TensorRecord]
    frozen: FrozenName | None
    computed: list[str]
    config_files: dict[ConfigName, dict[str, Any]]
    pieces: list[PieceRecord]
    attributes: list[dict[str, Any]] = Field(default_factory=list)
    extra_states: dict[str, Any] = Field(default_factory=dict)
    amendments: dict[str, Any] = Field(default_factory=dict)
    progress: dict[str, Any] = Field(default_factory=dict)
    user_state: dict[str, Any] = Field(default_factory=dict)
    stream: list[dict[str, Any]] = Field(default_factory=list)
    averaged: Count = 0
    adapter: AdapterRecord | None = None
    island: Count = 0

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer fields that are empty, so that versions that do not know them can read the checkpoint."""
        optional = {
            "attributes",
            "extra_states",
            "amendments",
            "progress",
            "user_state",
            "stream",
            "averaged",
            "adapter",
            "island",
        }
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if value or key not in optional}

    def check_complete(self) -> None:
        """Raise ValueError unless each tensor is listed once, and each of its elements is in exactly one piece.

        The pieces of optimizer state must be contiguous, too. Without these checks, a reader could get only a part of a
        tensor, or allocate memory for elements that do not exist.
        """
        _refuse_twice([record.name for record in self.tensors])
        _refuse_twice([key for record in self.tensors for key in record.keys])
        ends: dict[tuple[str, str], int] = {}
        for piece in sorted(self.pieces, key=lambda piece: (piece.start, piece.numel)):
            if piece.start != ends.get((piece.kind, piece.name), 0):
                raise ValueError(f"the pieces of {piece.kind} of {piece.name!r} have a gap or overlap at {piece.start}")
            ends[piece.kind, piece.name] = piece.start + piece.numel
        for record in self.tensors:
            found = ends.get((record.kind, record.name), 0)
            if record.kind != "frozen" and found != record.numel:
                raise ValueError(f"{record.name!r} has {record.numel} elements, but its pieces have {found}")


class FrozenManifest(BaseModel):
    """The manifest of a folder of frozen parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    pieces: list[PieceRecord]


def _refuse_twice(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]!r} occurs twice")


def folder_name(step: int) -> str:
    """Return the name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def piece_file_name(rank: int) -> str:
    """Return the name of the file of the pieces that one worker wrote."""
    return f"worker-{rank}.safetensors"


def list_checkpoints(root: Location) -> list[tuple[int, Location]]:
    """Return (step, folder) of the complete checkpoints below `root`, oldest first; none if `root` does not exist.

    Raises CheckpointError if `root` can't be read, because an unreachable store must not be mistaken for an empty one.
    """
    try:
        if isinstance(root, Address):
            names = {name.removesuffix(f"/{MANIFEST}") for name in root.files() if name.endswith(f"/{MANIFEST}")}
        else:
            names = {name for name in names_in(root) if (root / name).is_dir()}
    except OSError as error:
        raise CheckpointError(
            "the checkpoints can't be listed",
            where=str(root),
            got=error,
            hint=hint_of(error, "check that you may read the folder"),
        ) from error
    return sorted((int(match[1]), root / match[0]) for match in map(_NAME.fullmatch, names) if match)


def recorded_checkpoints(run_dir: Path) -> str | None:
    """Return the path or address of checkpoints outside of the run directory that its manifest names, if any."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(read_inside(run_dir / MANIFEST)).get("checkpoints")
        return found if isinstance(found, str) and found else None
    return None


def checkpoints_of(run_dir: Path, checkpoint_dir: str | Location | None = None) -> Location:
    """Return the location of a run's checkpoints: `checkpoint_dir` if it is given.

    Otherwise return the folder that the run's manifest names or, if there is none, a folder in the run directory. A
    manifest from an untrusted source may name any place, and checkpoints in that place would be loaded and deleted. So
    a folder outside of the run directory is used only if it has no checkpoints, or if it has the record of its owner,
    which callers compare with the run (`checkpoint.owner`). An address in a store is used only if it is given.

    Raises ConfigError for an address that can't be used, and for a place that must not be used.
    """
    if checkpoint_dir is not None:
        return location_of(checkpoint_dir)
    recorded = recorded_checkpoints(run_dir)
    if recorded is None:
        return run_dir / "checkpoints"
    if is_local(recorded):
        place = Path(recorded)
        is_inside = place.resolve().is_relative_to(run_dir.resolve())
        if is_inside or (place / OWNER).exists() or not list_checkpoints(place):
            return place
    raise ConfigError(
        "the run's checkpoints are in a place that only its manifest names",
        where=str((run_dir / MANIFEST).absolute()),
        got=recorded,
        hint="a manifest from an untrusted source may name any place. If the place is right, pass it as "
        "--checkpoint-dir (checkpoint_dir=), or export from it directly",
    )


def read_manifest(folder: Location) -> Manifest:
    """Return the manifest of the checkpoint in `folder`. Raises CheckpointError if it is missing or broken."""
    manifest = _read(folder, Manifest, Manifest.check_complete)
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(
            "the checkpoint's step differs from the one in its folder's name",
            where=str(folder),
            expected=f"step {int(named[1])}",
            got=f"step {manifest.step}",
            hint="rename the folder back",
        )
    return manifest


def read_frozen_manifest(folder: Location) -> FrozenManifest:
    """Return the manifest of a folder of frozen parameters. Raises CheckpointError if it is missing or broken."""
    return _read(folder, FrozenManifest)


def _read(folder: Location, kind: type[_M], check: Callable[[_M], None] = lambda manifest: None) -> _M:
    path = folder / MANIFEST
    try:
        fields = json.loads(read_inside(path))
        found = fields.get("format") if isinstance(fields, dict) else None
        if not isinstance(found, int) or found == CHECKPOINT_FORMAT:
            manifest = kind.model_validate(unseal(fields) if isinstance(fields, dict) else fields)
            check(manifest)
            return manifest
    except OSError as error:
        advice = "check the path; a checkpoint is a folder with a manifest"
        with suppress(OSError, CheckpointError):
            if inside := list_checkpoints(folder):
                advice = f"this folder holds checkpoints: name one of them, for example the newest, {inside[-1][1]}"
        raise CheckpointError(
            "not a checkpoint: its manifest can't be read", where=str(path), got=error, hint=hint_of(error, advice)
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "the checkpoint's manifest is broken",
            where=str(path),
            got=error,
            hint="go back to an earlier checkpoint",
        ) from error
    raise CheckpointError(
        "the checkpoint has another format",
        where=str(path),
        expected=CHECKPOINT_FORMAT,
        got=found,
        hint=(
            "a development version before 0.1.0 wrote it: read it with that version"
            if found < CHECKPOINT_FORMAT
            else "a newer version of Manyhands wrote it: install that version"
        ),
    )
