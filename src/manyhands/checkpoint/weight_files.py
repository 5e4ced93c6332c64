"""Hugging Face weight files: layout, names, and which tensors fit the model.

The config files are written without importing transformers. Weights are read from one safetensors file, or from a
folder in Hugging Face's layout that any tool may have written. Opening reads only the headers; ranges of tensors are
read on request. `fit` matches the tensors in the files to those of a model by name, shape and type, and explains what
does not match.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyhands.checkpoint.format import TensorRecord
from manyhands.errors import CheckpointError, ConfigError
from manyhands.options import hint_nearest
from manyhands.shard_layout import BLOCK
from manyhands.storage.location import Location
from manyhands.storage.tensor_file import TensorEntry, TensorFile, bytes_of, once_each
from manyhands.weights import Weights

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""A folder has either one file with all weights, or several files and an index, which names the file of each tensor."""

_DTYPE_FIELDS = ("dtype", "torch_dtype")  # in new and in old versions of transformers


def config_files(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the config files that `save_pretrained` would write, as {file name: content}. Their dtype is still None.

    The dict is empty for models of other libraries. A module that wraps a transformers model counts as a model of
    another library, even if it has the transformers model's config, because its weights have other names.
    """
    config: Any = getattr(model, "config", None)
    if not (hasattr(type(model), "config_class") and hasattr(config, "to_json_string") and hasattr(config, "to_dict")):
        return {}
    content = json.loads(config.to_json_string())
    fields = config.to_dict()
    content[_DTYPE_FIELDS[0] if _DTYPE_FIELDS[0] in fields else _DTYPE_FIELDS[1]] = None
    files = {CONFIG: {**content, "architectures": [type(model).__name__]}}
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        files[GENERATION_CONFIG] = json.loads(generation.to_json_string())
    return files


def config_text(content: dict[str, Any], dtype: str) -> str:
    """Return the text of a config file for weights of a dtype such as `bfloat16`."""
    filled = {key: dtype if key in _DTYPE_FIELDS else value for key, value in content.items()}
    return json.dumps(filled, indent=2, sort_keys=True) + "\n"


class WeightSource(Protocol):
    """A source of initial weights. path: its location. entries: its tensors by name. read_bytes: bytes read so far."""

    read_bytes: int

    @property
    def path(self) -> Location: ...

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of a tensor, 1-D, in the dtype in which they are stored."""

    def where(self, name: str) -> str:
        """Return the file or folder that holds a tensor."""

    def facts(self) -> dict[str, str]:
        """Return facts by which workers notice that they have different weights."""

    def described(self) -> dict[str, Any]:
        """Return where the weights come from, as JSON values for the manifest of a run."""


class WeightFiles:
    """The tensors in the files at `path`. entries: the tensors by name. read_bytes: the bytes of tensors read so far.

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
                    raise _broken(file, f"it lacks {name!r}, although the index lists it")
            for name, entry in opened.entries.items():
                if name in self.entries:
                    raise _broken(file, f"{name!r} is in this file, and also in {self._files[name][0].name}")
                self.entries[name], self._files[name] = entry, (file, opened)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of a tensor, 1-D, in the file's type."""
        path, file = self._files[name]
        try:
            part = file.read(name, start, numel)
        except (OSError, ValueError) as error:
            raise _broken(path, error) from error
        self.read_bytes += part.nbytes
        return part

    def where(self, name: str) -> str:
        """Return the file that holds a tensor."""
        return str(self._files[name][0])

    def described(self) -> dict[str, Any]:
        """Return the path of the files."""
        return {"path": str(self.path.absolute())}

    def facts(self) -> dict[str, str]:
        """Return the dtype, the shape and a hash of the first elements of each tensor.

        If these differ, the weights differ; if they are equal, the weights may still differ.
        """
        facts = {}
        for name, entry in self.entries.items():
            first = self.read(name, 0, min(BLOCK, math.prod(entry.shape)))
            facts[name] = f"{entry.dtype} {list(entry.shape)} {hashlib.sha256(bytes_of(first)).hexdigest()[:16]}"
        return facts


def _files_at(path: Path) -> dict[Path, Collection[str]]:
    """Return the files, each with the names of the tensors that the index lists for it.

    Without an index, there are no names.
    """
    if path.is_file():
        return _files_of_index(path) if path.suffix == ".json" else {path: ()}
    if (path / SINGLE).is_file():
        return {path / SINGLE: ()}
    if (path / INDEX).is_file():
        return _files_of_index(path / INDEX)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    hint = "check the path; for a model on a hub, give the folder that it was downloaded to"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        hint = (
            "convert them to safetensors, for example: AutoModel.from_pretrained(folder).save_pretrained(other_folder)"
        )
    raise ConfigError(
        "there are no initial weights here",
        where=str(path.absolute()),
        expected=f"a folder with {SINGLE} or {INDEX}, a safetensors file, a run directory, or a checkpoint",
        got=("a folder with " + (", ".join(names[:5]) or "nothing in it")) if path.is_dir() else "nothing",
        hint=hint,
    )


def _files_of_index(index: Path) -> dict[Path, Collection[str]]:
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=once_each)
        files: dict[Path, list[str]] = {}
        for name, file in content["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"it maps {name!r} to {file!r}, which is not the name of a file in the same folder")
            files.setdefault(index.parent / file, []).append(name)
    except (OSError, ValueError) as error:
        raise _broken(index, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(index, "it has no weight_map from names to files") from error
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


LISTED = 8
"""An error lists at most this many names of each kind."""


def fit(records: Sequence[TensorRecord], files: WeightSource, weights: Weights) -> dict[str, list[str]]:
    """Match the model's tensors to those in the files. Return the names in the files for each name in the model.

    A tied tensor may have several names in the files. The result leaves out tensors that are missing and are allowed to
    be missing. Raises one ConfigError that lists everything that does not fit.
    """
    needed = [record for record in records if record.keys or record.is_parameter]
    known = {key: record for record in needed for key in _keys(record)}
    for pattern in weights.allow_missing:
        if not any(fnmatchcase(key, pattern) for key in known):
            raise ConfigError(
                f"weights.allow_missing: {pattern!r} matches no tensor of the model",
                expected=f"a pattern for names like {', '.join(list(known)[:3])}",
                hint=hint_nearest(pattern, known),
            )
    renamed = {name: _renamed(name, weights.rename) for name in files.entries}
    found: dict[str, list[str]] = {}
    for name, key in renamed.items():
        if key in known:
            found.setdefault(known[key].name, []).append(name)
    missing = [record for record in needed if record.name not in found and not weights.may_lack(_keys(record))]
    unexpected = [key for key in renamed.values() if key not in known and not _matches(weights.ignore, key)]
    wrong = [
        f"{record.name}: expected {_described(record.dtype, record.shape)}, got {_described_entry(files.entries[name])}"
        f" ({name} in {files.where(name)})"
        for record in needed
        for name in found.get(record.name, [])
        if not _fits(files.entries[name], record)
    ]
    twice = [f"{key}: {', '.join(names)}" for key, names in _by_key(renamed).items() if key in known and names[1:]]
    problems = {
        "missing from the files": [
            f"{record.name} {list(record.shape)}{_near(record.name, unexpected)}" for record in missing[:LISTED]
        ],
        "not in the model": [f"{key}{_near(key, known)}" for key in unexpected[:LISTED]],
        "with another shape or dtype": wrong,
        "renamed to the same name": twice,
    }
    counts = {"missing from the files": len(missing), "not in the model": len(unexpected)}
    listed = {kind: (counts.get(kind, len(lines)), lines) for kind, lines in problems.items() if lines}
    if listed or not found:
        summary = (
            ", ".join(f"{count} {kind}" for kind, (count, _) in listed.items()) or "the files have none of its tensors"
        )
        raise ConfigError(
            f"the initial weights don't fit the model: {summary}",
            where=str(files.path),
            expected="all parameters and persistent buffers of the model, under their names in its state_dict",
            hint=_hint([record.name for record in missing], unexpected),
            detail="\n".join(line for kind, (count, lines) in listed.items() for line in _listed(kind, count, lines)),
        )
    return found


def _keys(record: TensorRecord) -> Sequence[str]:
    return record.keys or [record.name]  # a model may leave one of its parameters out of its state_dict


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _by_key(renamed: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, key in renamed.items():
        names.setdefault(key, []).append(name)
    return names


def _fits(entry: TensorEntry, record: TensorRecord) -> bool:
    """Return True if the shapes are equal and the dtypes match.

    Different floating-point dtypes match, because the values are converted. Dtypes of 8 bits don't match, because they
    need scales.
    """
    dtype: torch.dtype = getattr(torch, record.dtype)
    convertible = all(each.is_floating_point and each.itemsize > 1 for each in (entry.dtype, dtype))
    return entry.shape == record.shape and (entry.dtype == dtype or convertible)


def _described(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"


def _described_entry(entry: TensorEntry) -> str:
    return _described(str(entry.dtype).removeprefix("torch."), entry.shape)


def _listed(kind: str, count: int, lines: Sequence[str]) -> list[str]:
    more = [f"  and {count - LISTED} more"] if count > LISTED else []
    return [f"{kind}:", *(f"  {line}" for line in lines[:LISTED]), *more]


def _near(name: str, others: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return a hint to rename a prefix if that would make most names match, or else a hint about the options."""
    for shorter, longer, rename in (
        (unexpected, missing, '"^" = "{}"'.format),
        (missing, unexpected, lambda prefix: '"^{}" = ""'.format(prefix.replace(".", "[.]"))),
    ):
        prefix = _prefix(shorter, longer)
        if prefix:
            return f"the names differ by the prefix {prefix!r}: use rename = {{ {rename(prefix)} }} (a dict in Python)"
    return (
        "rename turns the files' names into the model's; allow_missing lists tensors that keep their initial values;"
        " ignore lists tensors that the model doesn't need"
    )


def _prefix(shorter: Sequence[str], longer: Sequence[str]) -> str | None:
    """Return the prefix that turns shorter names into at least half of the longer names, or None."""
    ends = set(shorter)
    counts: dict[str, int] = {}
    for name in longer:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in ends:
                prefix = ".".join(parts[:cut]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
    best = max(counts, key=lambda prefix: counts[prefix], default=None)
    return best if best is not None and 2 * counts[best] >= len(longer) else None
