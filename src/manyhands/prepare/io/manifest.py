"""The manifest of an output folder. It is written last: if it exists, the output is complete."""

from __future__ import annotations

import json
from typing import Any

from manyhands.data.token_format import MANIFEST
from manyhands.storage.files import is_plain_name, join_path, read_bytes

FORMAT = "manyhands prepared 1"


def read_output_manifest(folder: str) -> dict[str, Any] | None:
    """Return the manifest of a complete output, or None if there is no valid one."""
    try:
        manifest = json.loads(read_bytes(join_path(folder, MANIFEST)))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if _is_valid(manifest) else None


def _is_valid(manifest: Any) -> bool:
    """Return True if this is a manifest of this format, whose files are in its own folder."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return False
    files, texts, counts = manifest.get("files"), ("identity", "digest"), ("records", "bad_records")
    return (
        isinstance(files, list)
        and all(isinstance(manifest.get(key), str) for key in texts)
        and all(type(manifest.get(key)) is int for key in counts)
        and all(
            isinstance(file, dict)
            and is_plain_name(file.get("name"))
            and type(file.get("bytes")) is type(file.get("records")) is int
            for file in files
        )
    )
