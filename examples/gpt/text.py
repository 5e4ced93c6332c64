"""Real text that every machine has: the source of the running Python's standard library, about 30 MB, byte by byte."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from manyhands.errors import DataError

NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}  # what others installed differs from machine to machine


def library_files(source: str | None = None, tests: bool = False) -> list[Path]:
    """The Python files of the standard library (or of another folder), for `manyhands prepare`: each is a document.

    tests: also those of its tests, which are more than half of it. Raises DataError if there are none.
    """
    folder = Path(source or sysconfig.get_path("stdlib"))
    files = [file for file, _ in python_files(folder)]
    wanted = [file for file in files if tests or not {"test", "tests", "idle_test"} & {*file.relative_to(folder).parts}]
    if not wanted:
        raise no_source(folder)
    return wanted


class StandardLibraryText(Dataset[Tensor]):
    """Item i is a LongTensor [length + 1] of bytes: `length` bytes to read, and for each the one that comes next.

    Each byte is predicted by one item only: an item's last byte is the next item's first. The text is read once,
    kept as one file under `cache` (default: the user's cache directory) and mapped into memory, so that all workers
    of a host share one copy of it. `source` (default: the standard library) is the folder that is read.

    Raises DataError if there's no source text, too little of it, or no place to keep it.
    """

    def __init__(self, length: int = 128, cache: str | None = None, source: str | None = None) -> None:
        self.length, self.cache, self.source = length, cache, source
        folder = Path(source or sysconfig.get_path("stdlib"))
        self.path = cached_text(folder, Path(cache) if cache else user_cache())
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        if len(self) < 1:
            raise DataError(
                f"the Python source in {folder} is too short for one item",
                expected=f"at least {length + 1} bytes",
                got=len(self._bytes),
                hint="use a smaller length",
            )

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        start = index * self.length
        return torch.from_numpy(self._bytes[start : start + self.length + 1].astype(np.int64))

    def __reduce__(self) -> tuple[object, ...]:
        # A pickled memory map would carry the whole text: a reader process opens the file itself instead.
        return type(self), (self.length, self.cache, self.source)


def user_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyhands"


def cached_text(folder: Path, cache: Path) -> Path:
    """The file in `cache` that holds the text of all Python files under `folder`; it's written if it isn't there.

    Its name tells the Python version and which files there are, of which size. It appears by an atomic rename: many
    workers may start at once, and the worst is that some of them write the same bytes twice.
    """
    files = python_files(folder)
    if not files:
        raise no_source(folder)
    listing = "".join(f"{file.relative_to(folder).as_posix()} {size}\n" for file, size in files)
    key = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:12]
    path = cache / f"stdlib-{platform.python_version()}-{key}.bytes"
    if not path.exists():
        _write(path, [file for file, _ in files])
    return path


def python_files(folder: Path) -> list[tuple[Path, int]]:
    """The non-empty *.py files under `folder` that can be read, and their sizes, sorted by relative path."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for file in (Path(here, name) for name in names if name.endswith(".py")):
            if file.is_file() and os.access(file, os.R_OK) and (size := file.stat().st_size):
                found.append((file, size))
    return sorted(found, key=lambda entry: entry[0].relative_to(folder).as_posix())


def no_source(folder: Path) -> DataError:
    """What to say of a folder without Python files."""
    return DataError(
        "no Python source text was found",
        where=str(folder),
        expected="*.py files of the standard library",
        hint="this Python comes without its source (zipped or stripped): use another one, or pass source=FOLDER",
    )


def _write(path: Path, files: list[Path]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                for file in files:
                    out.write(file.read_bytes())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            "the text can't be read and kept in the cache",
            where=str(path),
            got=str(error),
            hint="make room, or name another folder: cache=FOLDER, or the environment variable XDG_CACHE_HOME",
        ) from error
