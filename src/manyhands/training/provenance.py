"""Records where a run comes from: git commit and changes, versions of packages, digests of prepared data."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.storage.atomic import write_atomic

CODE_DIFF = "code.diff"
"""The file in a run directory that holds the uncommitted changes of the working tree."""

MOST_DIFF_BYTES, MOST_UNTRACKED, GIT_SECONDS = 1 << 20, 50, 10.0

_PACKAGES = (
    *("accelerate", "datasets", "keras", "lightning", "peft", "pyarrow", "safetensors", "sentencepiece", "timm"),
    *("tokenizers", "torchaudio", "torchvision", "transformers"),
)


class Code(NamedTuple):
    """The state of a git repository. facts: for the manifest of a run. diff: the start of the diff."""

    facts: dict[str, Any]
    diff: bytes


def code_of(recipe: Recipe) -> Code | None:
    """Return the state of the repository that contains the recipe's code; None if there is none.

    It is None, too, if git isn't installed or takes too long.
    """
    try:
        found = _git(_folder_of(recipe), "rev-parse", "--show-toplevel", "HEAD").start.decode().splitlines()
        root, commit = Path(found[0]), found[1]
        diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
        others = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.toml").start
    except (OSError, subprocess.SubprocessError, UnicodeError, IndexError):
        return None
    untracked = sorted(filter(None, others.decode(errors="replace").split("\0")))
    facts: dict[str, Any] = {"commit": commit, "dirty": bool(diff.num_bytes or untracked)}
    if diff.num_bytes:
        facts |= {"diff_bytes": diff.num_bytes, "diff_sha256": diff.sha256}
    if untracked:
        facts |= {"untracked": untracked[:MOST_UNTRACKED]}
    return Code(facts, diff.start)


def _folder_of(recipe: Recipe) -> Path:
    """Return the first known one of these folders: the recipe file's, the loss function's, the script's, the working
    directory.
    """
    of_loss = getattr(getattr(recipe.loss, "__code__", None), "co_filename", None)
    for file in (recipe.source, of_loss, getattr(sys.modules.get("__main__"), "__file__", None)):
        if file and Path(file).is_file():
            return Path(file).absolute().parent
    return Path()


class _Output(NamedTuple):
    """The output of a program: its first MOST_DIFF_BYTES, its length, and a hash of all of it."""

    start: bytes
    num_bytes: int
    sha256: str


def _git(folder: Path, *arguments: str) -> _Output:
    # Variables such as GIT_DIR, which git sets for its hooks, would name another repository.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    with tempfile.TemporaryFile() as output:  # a diff may be larger than the memory
        subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=True,
        )
        output.seek(0)
        start = output.read(MOST_DIFF_BYTES)
        sha256 = hashlib.sha256(start)
        while part := output.read(MOST_DIFF_BYTES):
            sha256.update(part)
        return _Output(start, output.tell(), sha256.hexdigest())


def write_diff(run_dir: Path, code: Code | None) -> None:
    """Write the diff into the run directory, or remove the one of an earlier start. Raises ConfigError."""
    path = run_dir / CODE_DIFF
    try:
        if code is not None and code.diff:
            write_atomic(path, code.diff)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run directory can't be written: {error.strerror or error}",
            where=str(path),
            hint="choose a run_dir that you may write to, on a disk with free space",
        ) from error


def package_versions() -> dict[str, str]:
    """Return the versions of those well-known packages that this process has imported."""
    found = {}
    for package in _PACKAGES:
        if package in sys.modules:
            with suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
    return found


def data_digests(recipe: Recipe) -> dict[str, str]:
    """Return the digests of prepared data: of the training data as "data", and of validations by name.

    Data have a digest if they are a `TokenFile`, or have an attribute `digest` that is a string. A wrapper such as
    torch's Subset has the digest of the data that it wraps.
    """
    data = {"data": recipe.data, **{name: each.data for name, each in recipe.validations.items()}}
    found = {name: _digest_of(each) for name, each in data.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def _digest_of(data: Any, depth: int = 8) -> str | None:
    digest = getattr(data, "digest", None)
    if isinstance(digest, str):
        return digest
    inner = getattr(data, "datasets", None) or [getattr(data, "dataset", None)]
    if depth == 0 or not isinstance(inner, (list, tuple)):
        return None
    parts = [_digest_of(each, depth - 1) for each in inner if each is not None]
    known = [part for part in parts if part is not None]
    if len(known) != len(inner):
        return None
    return known[0] if len(known) == 1 else hashlib.sha256(" ".join(known).encode()).hexdigest()


def with_earlier_code(code: Mapping[str, Any] | None, manifest: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the manifest's entries about the code, and about the code that made the steps before `step` if that
    differs.
    """
    before, earlier = manifest.get("code"), manifest.get("earlier_code")
    entries: dict[str, Any] = {} if code is None else {"code": dict(code)}
    kept = list(earlier) if isinstance(earlier, list) else []
    if isinstance(before, dict) and before != code:
        kept.append({**before, "until_step": step})
    return entries | ({"earlier_code": kept} if kept else {})
