"""Weights in safetensors files that anyone wrote: one file, or a folder in Hugging Face's layout.

Headers are read when it's opened; of the tensors only what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from manyhands.checkpoint.hugging_face import INDEX, SINGLE
from manyhands.checkpoint.tensor_file import TensorEntry, TensorFile, bytes_of, once_each
from manyhands.errors import CheckpointError, ConfigError
from manyhands.layout import BLOCK


class WeightFiles:
    """The tensors below `path`. entries: by name; read_bytes: of tensors, so far.

    Raises ConfigError if there are no weights, and CheckpointError for a file that is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.read_bytes = path, 0
        self.entries: dict[str, TensorEntry] = {}
        self._files: dict[str, tuple[Path, TensorFile]] = {}
        for file, listed in _files_at(path).items():
            opened = _opened(file)
            for name in listed or ():
                if name not in opened.entries:
                    raise _broken(file, f"it lacks {name!r}, which the index says is in it")
            for name, entry in opened.entries.items():
                if name in self.entries:
                    raise _broken(file, f"{name!r} is in it, and in {self._files[name][0].name}, too")
                self.entries[name], self._files[name] = entry, (file, opened)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a tensor, 1-D, of the file's type."""
        path, file = self._files[name]
        try:
            part = file.read(name, start, numel)
        except (OSError, ValueError) as error:
            raise _broken(path, error) from error
        self.read_bytes += part.nbytes
        return part

    def where(self, name: str) -> str:
        """The file that holds a tensor."""
        return str(self._files[name][0])

    def facts(self) -> dict[str, str]:
        """Of each tensor its type, its shape and a hash of its first elements: other weights show, not every change."""
        facts = {}
        for name, entry in self.entries.items():
            first = self.read(name, 0, min(BLOCK, math.prod(entry.shape)))
            facts[name] = f"{entry.dtype} {list(entry.shape)} {hashlib.sha256(bytes_of(first)).hexdigest()[:16]}"
        return facts


def _files_at(path: Path) -> dict[Path, Collection[str]]:
    """The files, and the names that an index says each has."""
    if path.is_file():
        return _files_of_index(path) if path.suffix == ".json" else {path: ()}
    if (path / SINGLE).is_file():
        return {path / SINGLE: ()}
    if (path / INDEX).is_file():
        return _files_of_index(path / INDEX)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    hint = "check the path; of a model on a hub, give the folder that it was downloaded to"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        hint = "write them as safetensors: AutoModel.from_pretrained(folder).save_pretrained(other_folder), say"
    elif {"manifest.json", "checkpoints"} & set(names):
        hint = "a run's weights are written in that layout by `manyhands export RUN OUT`"
    raise ConfigError(
        "there are no weights to begin with here",
        where=str(path.absolute()),
        expected=f"a folder with {SINGLE} or {INDEX}, or a safetensors file",
        got=("a folder with " + (", ".join(names[:5]) or "nothing in it")) if path.is_dir() else "nothing",
        hint=hint,
    )


def _files_of_index(index: Path) -> dict[Path, Collection[str]]:
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=once_each)
        files: dict[Path, list[str]] = {}
        for name, file in content["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{name!r} is said to be in {file!r}, which is no file beside it")
            files.setdefault(index.parent / file, []).append(name)
    except (OSError, ValueError) as error:
        raise _broken(index, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(index, "it has no weight_map of names and files") from error
    return dict(sorted(files.items()))


def _opened(file: Path) -> TensorFile:
    try:
        return TensorFile(file)
    except (OSError, ValueError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: object) -> CheckpointError:
    return CheckpointError(
        "a file of the initial weights is missing or broken",
        where=str(file),
        got=error,
        hint="copy or download it again",
    )
