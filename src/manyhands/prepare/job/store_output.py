"""Publishes a zarr store. Until all of its files are in place, the folder is no store, because it has no root metadata.

The folders of variables and coordinates are completed in the job's folder, and each is moved by one rename.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from manyhands.errors import DataError
from manyhands.prepare.gridded.layout import ZarrLayout
from manyhands.prepare.gridded.store_files import ROOT_FILES, files_of
from manyhands.prepare.io.store_parts import STORE, ListedFile, listed_files
from manyhands.prepare.job.stages import StageResult
from manyhands.storage.atomic import sync, write_atomic
from manyhands.storage.files import exists, join_path, make_folder, move, remove
from manyhands.storage.location import Address, is_local


@dataclass(frozen=True)
class OutputFile:
    """A file of the output, as the manifest lists it; or a folder with an array of a store.

    sha256: for a folder, the hash of a line with the name, the bytes and the SHA-256 of each of its files, by name.
    """

    name: str
    bytes: int
    records: int
    sha256: str


def store_names(layout: ZarrLayout) -> list[str]:
    """Return the names directly in the folder of a store."""
    return [*layout.dims, *layout.coords, *ROOT_FILES]


def stored_files(layout: ZarrLayout, last: StageResult) -> list[OutputFile]:
    """Return the arrays and the root files of a store. last: the results of the tasks that wrote the variables."""
    files = [ListedFile(name, len(data), _sha256(data)) for name, data in files_of(layout).metadata().items()]
    files += [file for result in last.results for file in listed_files(join_path(last.folder, str(result.file)))]
    by_array: dict[str, list[ListedFile]] = {}
    for file in sorted(files):
        by_array.setdefault(file.name.partition("/")[0], []).append(file)
    return [_summed(name, inside) for name, inside in by_array.items()]


def _summed(name: str, files: Iterable[ListedFile]) -> OutputFile:
    digest, size = hashlib.sha256(), 0
    for file in files:
        if file.name == name:
            return OutputFile(name, file.bytes, 0, file.sha256)
        digest.update(f"{file.name} {file.bytes} {file.sha256}\n".encode())
        size += file.bytes
    return OutputFile(name, size, 0, digest.hexdigest())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def move_store(layout: ZarrLayout, last: StageResult, folder: str) -> None:
    """Complete the folders of all arrays, and move them to the output folder."""
    source = join_path(last.folder, STORE)
    written = [file.name for result in last.results for file in listed_files(join_path(last.folder, str(result.file)))]
    for name, data in files_of(layout).metadata().items():
        if "/" in name:
            make_folder(join_path(source, name).rpartition("/")[0])
            write_atomic(join_path(source, name), data)
            written.append(name)
    by_array: dict[str, set[str]] = {}
    for name in written:
        by_array.setdefault(name.partition("/")[0], set()).add(name)
    for array, names in by_array.items():
        if is_local(folder) and not exists(join_path(folder, array)):
            _sync_tree(Path(source) / array)
            with suppress(FileNotFoundError):  # another rank moves it at the same time
                os.rename(join_path(source, array), join_path(folder, array))
        else:
            _merge(source, folder, array, names)
    missing = next((array for array in by_array if not exists(join_path(folder, array))), None)
    if missing is not None:
        raise DataError(
            "a file that was written is gone",
            where=join_path(source, missing),
            hint=f"remove {last.folder.rpartition('/')[0]}, and run again",
        )


def _merge(source: str, folder: str, array: str, names: set[str]) -> None:
    """Move the files of an array one by one, because a killed job has moved some, or because a store has no renames."""
    place = join_path(folder, array)
    if is_local(folder):
        found = {os.path.relpath(path, folder) for path in Path(place).rglob("*") if not path.is_dir()}
        written = {os.path.relpath(path, source) for path in Path(source, array).rglob("*") if not path.is_dir()}
    else:
        found = {f"{array}/{name}" for name in Address(place).files()}
        written = {f"{array}/{name}" for name in Address(join_path(source, array)).files()}
    for name in sorted(found - names):
        remove(join_path(folder, name))
    for name in sorted(written & names):
        make_folder(join_path(folder, name).rpartition("/")[0])
        with suppress(FileNotFoundError):
            move(join_path(source, name), join_path(folder, name))
    if is_local(folder):
        _sync_tree(Path(place))


def _sync_tree(folder: Path) -> None:
    """Make the names in a folder durable, at all depths. The files themselves have been synced."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(FileNotFoundError):
            sync(Path(path))


def write_root(layout: ZarrLayout, folder: str) -> None:
    """Write the files that make the folder a store. The consolidated metadata, which readers open first, comes last."""
    for name, data in files_of(layout).metadata().items():
        if "/" not in name and name != ".zmetadata":
            write_atomic(join_path(folder, name), data)
    consolidated = files_of(layout).metadata().get(".zmetadata")
    if consolidated is not None:
        write_atomic(join_path(folder, ".zmetadata"), consolidated)
