"""One logical format, whoever saved it and whoever loads it.

    checkpoints/step-00000100/
        manifest.json           step, facts of the recipe, numerics identity, scalars, the model's tensors, and which
                                file holds which range
        worker-0.safetensors    1-D pieces named "<kind>|<parameter>|<first element>": "exp_avg|head.weight|0"
    checkpoints/frozen-5f0c.../ parameters that no step changes, once for all checkpoints; files as above

Kinds: "master" (fp32 weights), the optimizer's own tensors under its names, "buffer", "frozen". What of the optimizer's
state has another shape than its parameter (Adafactor's row factors) is saved whole. A folder appears under its name
only when it is whole: all files are written and synced in `.step-00000100.partial`, which is then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from manyhands.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
_M = TypeVar("_M", bound=BaseModel)
_NAME = re.compile(r"step-(\d{8,})")


class PieceRecord(BaseModel):
    """Elements [start, start + numel) of a tensor, under `key` in `file`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    key: str
    kind: str
    name: str
    start: int
    numel: int
    dtype: str
    shape: tuple[int, ...] | None = None  # of what has another shape than its parameter, and is whole in this piece
    crc32: int


class TensorRecord(BaseModel):
    """A tensor of the model. kind: whose pieces make it up ("buffer" also of small frozen parameters, which are looked
    after like buffers); dtype: as the model computes with it. keys: its names in the model's state_dict: several if it
    is tied, none if it is a buffer that isn't persistent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["master", "frozen", "buffer"]
    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    dtype: str
    keys: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


class Scalar(BaseModel):
    """A number of the optimizer's state. dtype, device: of the 0-d tensor that holds it; None: it's a plain number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | int | bool
    dtype: str | None = None
    device: str = "cpu"


class Manifest(BaseModel):
    """What a checkpoint is. `scalars`: by parameter, the optimizer's numbers; `schedules`: LR schedulers' states.

    tensors: parameters in construction order, then buffers. frozen: the folder beside this one that holds the frozen
    ones. computed: names in the model's state_dict of tensors that aren't in the model; they aren't saved.
    config_files: what Hugging Face's loaders want beside the weights, by file name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    step: int
    workers: int
    stage: str
    facts: dict[str, str]
    identity: dict[str, str]
    digest: str
    hyperparameters: list[dict[str, Any]]
    schedules: list[dict[str, Any]]
    scalars: dict[str, dict[str, Scalar]]
    tensors: list[TensorRecord]
    frozen: str | None
    computed: list[str]
    config_files: dict[str, dict[str, Any]]
    pieces: list[PieceRecord]


class FrozenManifest(BaseModel):
    """What a folder of frozen parameters is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    pieces: list[PieceRecord]


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found)


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


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError."""
    return _read(folder, Manifest)


def read_frozen_manifest(folder: Path) -> FrozenManifest:
    """Raises CheckpointError."""
    return _read(folder, FrozenManifest)


def seal(said: dict[str, Any]) -> str:
    """A manifest's text, with a checksum over all that it says."""
    return json.dumps({**said, "checksum": _checksum(said)})


def _checksum(said: dict[str, Any]) -> str:
    words = json.dumps({key: value for key, value in said.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


def _read(folder: Path, kind: type[_M]) -> _M:
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_bytes())
        found = said.get("format") if isinstance(said, dict) else None
        if not isinstance(found, int) or found == FORMAT:
            if isinstance(said, dict) and said.pop("checksum", None) != _checksum(said):
                raise ValueError("its checksum differs")
            return kind.model_validate(said)
    except OSError as error:
        raise CheckpointError("not a checkpoint: its manifest can't be read", where=str(path), got=error) from error
    except ValueError as error:
        raise CheckpointError("the checkpoint's manifest is broken", where=str(path), got=error) from error
    raise CheckpointError("the checkpoint has another format", where=str(path), expected=FORMAT, got=found)
