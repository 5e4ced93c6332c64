"""One logical format, whoever saved it and whoever loads it.

    checkpoints/step-00000100/
        manifest.json           step, facts of the recipe, numerics identity, scalars, and which file holds which range
        worker-0.safetensors    1-D pieces named "<kind>|<parameter>|<first element>": "exp_avg|head.weight|0"

Kinds: "master" (fp32 weights), the optimizer's own tensors under its names, "buffer". Tensors that have their
parameter's shape are saved in ranges of it; others (buffers, Adafactor's row factors) whole, with a shape of their own.
A folder appears under its name only when it is whole: all files are written and synced in `.step-00000100.partial`,
which is then renamed.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from manyhands.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
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
    shape: list[int] | None = None  # of a tensor that is saved whole, in one piece
    crc32: int


class Scalar(BaseModel):
    """A number of the optimizer's state. dtype, device: of the 0-d tensor that holds it; None: it's a plain number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | int | bool
    dtype: str | None = None
    device: str = "cpu"


class Manifest(BaseModel):
    """What a checkpoint is. `scalars`: by parameter, the optimizer's numbers; `schedules`: LR schedulers' states."""

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
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError("not a checkpoint: its manifest can't be read", where=str(path), got=error) from error
    except ValueError as error:
        raise CheckpointError("the checkpoint's manifest is broken", where=str(path), got=error) from error
    if manifest.format != FORMAT:
        raise CheckpointError(
            "the checkpoint has another format", where=str(path), expected=FORMAT, got=manifest.format
        )
    return manifest
