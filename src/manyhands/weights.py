"""Weights: the files or the run from which a model's initial weights come."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from manyhands.errors import ConfigError
from manyhands.options import option, options


@options
class Weights:
    """Initial weights from safetensors files or another run. Each worker reads only the parts that it stores.

    Raises ConfigError.
    """

    path: str | os.PathLike[str] = option(
        help="A folder in Hugging Face's layout (model.safetensors, or several files with "
        "model.safetensors.index.json), an index file, or one safetensors file; or another run: its directory, its "
        "folder or address of checkpoints, or one checkpoint. Of several checkpoints, the last is used. The tensors "
        "have the same names as in the model's state_dict."
    )
    rename: Mapping[str, str] = option(
        default_factory=dict,
        help="Regular expressions and their replacements. All are applied, in order, to each name in the files.",
    )
    allow_missing: Sequence[str] = option(
        default=(),
        help='Patterns ("classifier.*") of names that the files may lack. These tensors keep the values that they were '
        "built with.",
    )
    ignore: Sequence[str] = option(
        default=(), help="Patterns of names in the files, after renaming, that the model may lack."
    )

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not str(self.path):
            raise ConfigError("weights.path is not a path", expected="a folder or a file", got=repr(self.path))
        object.__setattr__(self, "path", str(self.path))
        for name in ("allow_missing", "ignore"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"weights.{name} is a string", expected="a list of patterns", got=repr(self))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "rename", dict(self.rename))
        for pattern, replacement in self.rename.items():
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ConfigError(
                    f"weights.rename has an invalid pattern or replacement: {error}",
                    got=f"{pattern!r} and {replacement!r}",
                ) from None

    def may_lack(self, names: Iterable[str]) -> bool:
        """Return True if the files may lack the tensor that the model's state_dict has under these names."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.allow_missing)
