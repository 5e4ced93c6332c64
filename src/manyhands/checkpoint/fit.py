"""Which of the tensors in some files are a model's: by name, shape and type; and what to say where they don't fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from manyhands.checkpoint.format import TensorRecord
from manyhands.checkpoint.tensor_file import TensorEntry
from manyhands.checkpoint.weight_files import WeightFiles
from manyhands.config import Weights, hint_nearest
from manyhands.errors import ConfigError

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
