"""The part of a zarr store that one task writes: the files of some chunks or shards, and a listing with their hashes.

The files of all tasks are in one folder, `store`, in the folder of the stage. The job moves this folder to the output.
A file is written under a temporary name and renamed. A task that runs twice writes the same bytes twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from manyhands.prepare.records.keys import Cut
from manyhands.storage.atomic import temporary_path, write_atomic
from manyhands.storage.files import join_path, open_to_read, read_bytes
from manyhands.storage.location import is_local

STORE = "store"

LISTING = ".files"


class ListedFile(NamedTuple):
    """A file of a store: its name in the store, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


class PartWriter:
    """Writes the files of one task, and then the listing. bytes: the total size of the files so far."""

    def __init__(self, folder: str, partition: int) -> None:
        self._folder, self.name = folder, f"part-{partition:05d}{LISTING}"
        self._listed: list[ListedFile] = []
        self.bytes = 0

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the store. Raises OSError."""
        path = join_path(join_path(self._folder, STORE), name)
        if is_local(path):
            self._write_here(Path(path), content)
        else:
            write_atomic(path, content)
        self._listed.append(ListedFile(name, len(content), hashlib.sha256(content).hexdigest()))
        self.bytes += len(content)

    def _write_here(self, path: Path, content: bytes) -> None:
        # The temporary file is in the stage's folder, from which temporary files of killed tasks are removed.
        temporary = temporary_path(Path(self._folder) / self.name)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> str:
        """Write the listing, and return its SHA-256."""
        listing = "".join(json.dumps(file) + "\n" for file in self._listed).encode()
        write_atomic(join_path(self._folder, self.name), listing or b"\n", first_wins=True)
        return hashlib.sha256(listing or b"\n").hexdigest()


def owners_in(start: Cut | None, stop: Cut | None, owners: range) -> range:
    """Return the owners of files (see `Grid`) whose numbers are in a range of keys."""
    first = owners.start if start is None else start[0] + start[1]
    end = owners.stop if stop is None else stop[0] + stop[1]
    return range(first, end)


def listed_files(path: str) -> Iterator[ListedFile]:
    """Yield the files of a listing. Raises OSError or ValueError."""
    for line in read_bytes(path).splitlines():
        if line:
            yield ListedFile(*json.loads(line))


def is_part_intact(path: str, sha256: str | None, places: Sequence[str]) -> bool:
    """Return True if a listing is complete, and each of its files is intact in one of these folders."""
    try:
        if hashlib.sha256(read_bytes(path)).hexdigest() != sha256:
            return False
        return all(
            any(_is_intact(join_path(place, file.name), file) for place in places) for file in listed_files(path)
        )
    except (OSError, ValueError, TypeError):
        return False


def _is_intact(path: str, file: ListedFile) -> bool:
    try:
        with open_to_read(path) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256  # type: ignore[arg-type]
    except OSError:
        return False
