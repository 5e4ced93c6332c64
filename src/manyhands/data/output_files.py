"""The files of an output folder, as its manifest lists them, for data sets that map them into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.storage.files import is_plain_name
from manyhands.storage.untrusted import open_inside, read_inside


@dataclass(frozen=True)
class OutputFiles:
    """The files of a folder. listed: the entries of the manifest: name, bytes, records and sha256 of each file."""

    folder: Path
    listed: list[dict[str, Any]]

    @property
    def are_plain(self) -> bool:
        """Return True if all entries name files of the folder. Nothing else may be opened."""
        return all(is_plain_name(file["name"]) and type(file["bytes"]) is int for file in self.listed)

    @property
    def digest(self) -> str:
        """Return a hash of the checksums of the files."""
        return hashlib.sha256(" ".join(str(file.get("sha256")) for file in self.listed).encode()).hexdigest()

    def changed(self) -> tuple[Path, str, str] | None:
        """Return (path, expected SHA-256, found SHA-256) of the first file that has changed, or None."""
        for listed in self.listed:
            path = self.folder / listed["name"]
            with open_inside(path.parent, path.name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != listed.get("sha256"):
                return path, str(listed.get("sha256")), found
        return None


def find_output(folders: Iterable[Path], manifest: str) -> OutputFiles | None:
    """Return the files of the first of these folders that has a manifest, or None."""
    for folder in folders:
        try:
            files: list[dict[str, Any]] = json.loads(read_inside(folder / manifest))["files"]
            all(file["name"] and file["bytes"] for file in files)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return OutputFiles(folder, files)
    return None
