"""Hugging Face weight files: layout, names, and which tensors fit the model.

The files of Hugging Face's layout: their names; and the small ones, written without transformers.

Weights in safetensors files that anyone wrote: one file, or a folder in Hugging Face's layout.
Headers are read when it's opened; of the tensors only what is asked for.

Which of the tensors in some files are a model's: by name, shape and type; and what to say where they don't fit.
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
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.checkpoint.format import TensorRecord
from manyhands.checkpoint.tensor_file import TensorEntry, TensorFile, bytes_of, once_each
from manyhands.config import Weights, hint_nearest
from manyhands.errors import CheckpointError, ConfigError
from manyhands.layout import BLOCK

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file that holds all weights; or what tells which file holds which of them."""

_DTYPE_FIELDS = ("dtype", "torch_dtype")  # as new and old versions of transformers call it


def config_files(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By file name what `save_pretrained` would write, with the dtype left open; empty for other libraries' models.

    A module that only wraps such a model isn't one, also if it hands on its config: its weights have other names.
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
    """The text of a config file for weights of that dtype, such as `bfloat16`."""
    filled = {key: dtype if key in _DTYPE_FIELDS else value for key, value in content.items()}
    return json.dumps(filled, indent=2, sort_keys=True) + "\n"


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


LISTED = 8
"""Names that an error lists of each kind."""


def fit(records: Sequence[TensorRecord], files: WeightFiles, weights: Weights) -> dict[str, list[str]]:
    """By the names of the model's tensors those of the files' that are theirs: several, if a tied one is there twice.

    Those that may be missing, and are, are left out. Raises one ConfigError that tells all that doesn't fit.
    """
    wanted = [record for record in records if record.keys or record.is_parameter]
    known = {key: record for record in wanted for key in _keys(record)}
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
    missing = [record for record in wanted if record.name not in found and not weights.may_lack(_keys(record))]
    unexpected = [key for key in renamed.values() if key not in known and not _matches(weights.ignore, key)]
    wrong = [
        f"{record.name}: expected {_described(record.dtype, record.shape)}, got {_said(files.entries[name])}"
        f" ({name} in {files.where(name)})"
        for record in wanted
        for name in found.get(record.name, [])
        if not _fits(files.entries[name], record)
    ]
    twice = [f"{key}: {', '.join(names)}" for key, names in _by_key(renamed).items() if key in known and names[1:]]
    problems = {
        "missing in the files": [
            f"{record.name} {list(record.shape)}{_near(record.name, unexpected)}" for record in missing[:LISTED]
        ],
        "not of the model": [f"{key}{_near(key, known)}" for key in unexpected[:LISTED]],
        "of another shape or type": wrong,
        "renamed to the same name": twice,
    }
    counts = {"missing in the files": len(missing), "not of the model": len(unexpected)}
    told = {kind: (counts.get(kind, len(lines)), lines) for kind, lines in problems.items() if lines}
    if told or not found:
        summary = ", ".join(f"{count} {kind}" for kind, (count, _) in told.items()) or "none of them is the model's"
        raise ConfigError(
            f"the initial weights are not those of the model: {summary}",
            where=str(files.path),
            expected="all parameters and persistent buffers of the model, under their names in its state_dict",
            hint=_hint([record.name for record in missing], unexpected),
            detail="\n".join(line for kind, (count, lines) in told.items() for line in _listed(kind, count, lines)),
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
    """Floating-point types are converted; but 8 bits are half of a number, whose scale is elsewhere."""
    wanted: torch.dtype = getattr(torch, record.dtype)
    convertible = all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (entry.dtype, wanted))
    return entry.shape == record.shape and (entry.dtype == wanted or convertible)


def _described(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"


def _said(entry: TensorEntry) -> str:
    return _described(str(entry.dtype).removeprefix("torch."), entry.shape)


def _listed(kind: str, count: int, lines: Sequence[str]) -> list[str]:
    more = [f"  and {count - LISTED} more"] if count > LISTED else []
    return [f"{kind}:", *(f"  {line}" for line in lines[:LISTED]), *more]


def _near(name: str, others: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f"; the nearest there: {close[0]}" if close else ""


def _hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A prefix that would explain most of it, or what can be done in general."""
    for shorter, longer, rename in (
        (unexpected, missing, '"^" = "{}"'.format),
        (missing, unexpected, lambda prefix: '"^{}" = ""'.format(prefix.replace(".", "[.]"))),
    ):
        prefix = _prefix(shorter, longer)
        if prefix:
            return f"the names differ by {prefix!r}: say rename = {{ {rename(prefix)} }} (in Python a dict)"
    return (
        "rename turns the files' names into the model's; allow_missing names what keeps its initial values;"
        " ignore names what the model doesn't need"
    )


def _prefix(shorter: Sequence[str], longer: Sequence[str]) -> str | None:
    """What at least half of the longer names have in front of one of the shorter ones."""
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
