"""JSON objects with a checksum over all their fields, so that a damaged or edited file is recognised."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_FIELD = "checksum"


def seal(fields: dict[str, Any]) -> str:
    """Return the JSON text of an object with a checksum over all its fields."""
    return json.dumps({**fields, _FIELD: _checksum(fields)})


def unseal(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a sealed object without the checksum. Raises ValueError if the checksum differs."""
    if fields.get(_FIELD) != _checksum(fields):
        raise ValueError("its checksum does not match its contents")
    return {key: value for key, value in fields.items() if key != _FIELD}


def _checksum(fields: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in fields.items() if key != _FIELD}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
