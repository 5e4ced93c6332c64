"""The manifest of an output folder, which is written last: if it exists, the output is complete."""

from __future__ import annotations

import json
from typing import Any

from manyhands.data.token_format import MANIFEST
from manyhands.storage.files import join_path, read_bytes

FORMAT = "manyhands prepared 1"


def read_output_manifest(folder: str) -> dict[str, Any] | None:
    """Return the manifest of a complete output, or None if there is none."""
    try:
        manifest = json.loads(read_bytes(join_path(folder, MANIFEST)))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
