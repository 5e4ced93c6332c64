"""Real text that every machine has: the source of Python's standard library (about 30 MB), as bytes."""

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

NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}  # left out, because they differ between machines


def library_files(source: str | None = None, tests: bool = False) -> list[Path]:
    """The Python files of the standard library, or of the folder `source`, for `manyhands prepare`.

    Each file is a document. tests: include the library's tests, which are more than half of it. Raises DataError if
    there are no files.
    """
    folder = Path(source or sysconfig.get_path("stdlib"))
    files = [file for file, _ in python_files(folder)]
    wanted = [file for file in files if tests or not {"test", "tests", "idle_test"} & {*file.relative_to(folder).parts}]
    if not wanted:
        raise no_source(folder)
    return wanted


class StandardLibraryText(Dataset[Tensor]):
    """Item i is a LongTensor [length + 1] of consecutive bytes. The model predicts each byte after the first.

    The last byte of an item is the first byte of the next item, so each byte is predicted only once. The text is read
    once, stored as one file in `cache` (default: the user's cache folder) and mapped into memory, so that all workers
    of a host share one copy. `source` is the folder of the Python files (default: the standard library).

    Raises DataError if there is no source text, if it is too short, or if it can't be stored.
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
        # A pickled memory map would contain the full text. Instead, a loader process opens the file itself.
        return type(self), (self.length, self.cache, self.source)


def user_cache() -> Path:
    """The user's cache folder for Manyhands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyhands"


def cached_text(folder: Path, cache: Path) -> Path:
    """The file in `cache` that holds the text of all Python files under `folder`. It is written if it does not exist.

    Its name contains the Python version and a hash of the names and sizes of all files. The complete file is renamed
    into place. So several workers may start at the same time: at worst, some of them write the same bytes again.
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
    """The error for a folder without Python files."""
    return DataError(
        "no Python source text was found",
        where=str(folder),
        expected="*.py files of the standard library",
        hint="this Python comes without its source (zipped or stripped): use another Python, or pass source=FOLDER",
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
            "the text can't be read or can't be stored in the cache",
            where=str(path),
            got=str(error),
            hint="free some space, or set another folder with cache=FOLDER or the environment variable XDG_CACHE_HOME",
        ) from error
