"""The logical format of checkpoints: a manifest and named pieces of tensors.

    checkpoints/step-00000100/
        manifest.json           step, facts of the recipe, numerics identity, scalars, the model's tensors, and which
                                file holds which range
        worker-0.safetensors    1-D pieces named "<kind>|<parameter>|<first element>": "exp_avg|head.weight|0"
    checkpoints/frozen-5f0c.../ parameters that no step changes, once for all checkpoints; files as above

Kinds: "master" (fp32 weights), the optimizer's own tensors under its names, "buffer", "frozen". What of the optimizer's
state has another shape than its parameter (Adafactor's row factors) is saved whole. A folder appears under its name
only when it is whole: all files are written and synced in `.step-….partial`, which is then renamed. A store has
no renaming: there the files are in `step-00000100/5f0c11d2.../`, named after the attempt to write them, and the
manifest comes last; a folder without a manifest is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from manyhands.checkpoint.tensor_file import dtype_named
from manyhands.errors import CheckpointError
from manyhands.storage.files import names_in
from manyhands.storage.location import Address, Location, hint_of, location_of

CHECKPOINT_FORMAT = 3

MANIFEST = "manifest.json"

_M = TypeVar("_M", bound=BaseModel)

_NAME = re.compile(r"step-(\d{8,})")

Count = Annotated[int, Field(ge=0, lt=1 << 62)]

DtypeName = Annotated[str, AfterValidator(lambda name: dtype_named(name) and name)]

FileName = Annotated[str, Field(pattern=r"^([0-9a-f]{16}/)?worker-\d+\.safetensors$")]

ConfigName = Annotated[str, Field(pattern=r"^(generation_)?config\.json$")]

FrozenName = Annotated[str, Field(pattern=r"^frozen-[0-9a-f]{16}$")]


class PieceRecord(BaseModel):
    """Elements [start, start + numel) of a tensor, under `key` in `file`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    key: str
    kind: str
    name: str
    start: Count
    numel: Count
    dtype: DtypeName
    shape: tuple[Count, ...] | None = None  # of what has another shape than its parameter, and is whole in this piece
    crc32: Count

    @model_validator(mode="after")
    def _has_as_many_elements(self) -> PieceRecord:
        if self.shape is not None and (self.start or math.prod(self.shape) != self.numel):
            raise ValueError(f"{self.numel} elements have no shape {list(self.shape)}")
        return self


class TensorRecord(BaseModel):
    """A tensor of the model. kind: whose pieces make it up ("buffer" also of small frozen parameters, which are looked
    after like buffers); dtype: as the model computes with it. keys: its names in the model's state_dict: several if it
    is tied, none if it is a buffer that isn't persistent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["master", "frozen", "buffer"]
    name: str
    is_parameter: bool
    shape: tuple[Count, ...]
    dtype: DtypeName
    keys: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


class Scalar(BaseModel):
    """A number of the optimizer's state. dtype, device: of the 0-d tensor that holds it; None: it's a plain number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | int | bool
    dtype: DtypeName | None = None
    device: str = "cpu"


class Manifest(BaseModel):
    """What a checkpoint is. `scalars`: by parameter, the optimizer's numbers; `schedules`: LR schedulers' states.

    tensors: parameters in construction order, then buffers. frozen: the folder beside this one that holds the frozen
    ones. computed: names in the model's state_dict of tensors that aren't in the model; they aren't saved.
    config_files: what Hugging Face's loaders want beside the weights, by file name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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

    def check_complete(self) -> None:
        """That it has every tensor once, and every element of it in one piece; of other state likewise, as far as it
        goes. So nobody reads half of one, or makes room for what isn't there. Raises ValueError."""
        _refuse_twice([record.name for record in self.tensors])
        _refuse_twice([key for record in self.tensors for key in record.keys])
        ends: dict[tuple[str, str], int] = {}
        for piece in sorted(self.pieces, key=lambda piece: (piece.start, piece.numel)):
            if piece.start != ends.get((piece.kind, piece.name), 0):
                raise ValueError(f"the pieces of {piece.kind} of {piece.name!r} don't meet at {piece.start}")
            ends[piece.kind, piece.name] = piece.start + piece.numel
        for record in self.tensors:
            found = ends.get((record.kind, record.name), 0)
            if record.kind != "frozen" and found != record.numel:
                raise ValueError(f"{record.name!r} has {record.numel} elements, and its pieces {found}")


class FrozenManifest(BaseModel):
    """What a folder of frozen parameters is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    pieces: list[PieceRecord]


def _refuse_twice(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]!r} is in it twice")


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def piece_file_name(rank: int) -> str:
    """The file of the pieces that one worker wrote."""
    return f"worker-{rank}.safetensors"


def list_checkpoints(root: Location) -> list[tuple[int, Location]]:
    """(step, folder) of the whole checkpoints below `root`, oldest first. Raises CheckpointError: not there, or empty,
    is something else than out of reach."""
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
            hint=hint_of(error, "see whether the folder may be read"),
        ) from error
    return sorted((int(match[1]), root / match[0]) for match in map(_NAME.fullmatch, names) if match)


def checkpoints_of(run_dir: Path, said: str | Location | None = None) -> Location:
    """Where a run keeps its checkpoints: where it is said, or as its manifest says, or in its own folder. Raises
    ConfigError for an address that can't be used."""
    if said is None:
        with suppress(OSError, ValueError, AttributeError):
            said = json.loads((run_dir / MANIFEST).read_bytes()).get("checkpoints")
    return run_dir / "checkpoints" if said is None else location_of(said)


_PAIRS = "pairs of a dict"


def encode_state(value: Any) -> Any:
    """A scheduler's state as JSON can hold it: dicts with keys that aren't texts become lists of pairs."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode_state(item) for key, item in value.items()}
    if isinstance(value, dict):
        return {_PAIRS: [[key, encode_state(item)] for key, item in value.items()], "type": type(value).__name__}
    return [encode_state(item) for item in value] if isinstance(value, list) else value


def decode_state(value: Any) -> Any:
    """What `encode_state` was given."""
    if isinstance(value, dict) and _PAIRS in value:
        kind = Counter if value["type"] == "Counter" else dict
        return kind({key: decode_state(item) for key, item in value[_PAIRS]})
    if isinstance(value, dict):
        return {key: decode_state(item) for key, item in value.items()}
    return [decode_state(item) for item in value] if isinstance(value, list) else value


def read_manifest(folder: Location) -> Manifest:
    """Raises CheckpointError."""
    manifest = _read(folder, Manifest, Manifest.check_complete)
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(
            "the checkpoint is of another step than its folder's name says",
            where=str(folder),
            expected=f"step {int(named[1])}",
            got=f"step {manifest.step}",
            hint="give the folder its own name back",
        )
    return manifest


def read_frozen_manifest(folder: Location) -> FrozenManifest:
    """Raises CheckpointError."""
    return _read(folder, FrozenManifest)


def seal(said: dict[str, Any]) -> str:
    """A manifest's text, with a checksum over all that it says."""
    return json.dumps({**said, "checksum": _checksum(said)})


def _checksum(said: dict[str, Any]) -> str:
    words = json.dumps({key: value for key, value in said.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


def _read(folder: Location, kind: type[_M], check: Callable[[_M], None] = lambda manifest: None) -> _M:
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_bytes())
        found = said.get("format") if isinstance(said, dict) else None
        if not isinstance(found, int) or found == CHECKPOINT_FORMAT:
            if isinstance(said, dict) and said.pop("checksum", None) != _checksum(said):
                raise ValueError("its checksum differs")
            manifest = kind.model_validate(said)
            check(manifest)
            return manifest
    except OSError as error:
        raise CheckpointError(
            "not a checkpoint: its manifest can't be read",
            where=str(path),
            got=error,
            hint=hint_of(error, "check the path; a checkpoint is a folder with a manifest"),
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
