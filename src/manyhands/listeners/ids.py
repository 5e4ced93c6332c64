"""The ids that tracking services gave a run, kept in its run directory, so that a resumed run continues there."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.errors import DataError
from manyhands.listeners.run_directory import IDS, write_json
from manyhands.storage.untrusted import read_inside

_lock = threading.Lock()  # each service's listener has a thread


def read_id(facts: Mapping[str, Any], service: str) -> str | None:
    """Return the id of the run at a service, or None if there is none. facts: those of `Listener.began`.

    Raises DataError if the file can't be read.
    """
    path = _path(facts)
    with _lock:
        found = None if path is None else _read(path).get(service)
    if found is None or (isinstance(found, str) and re.fullmatch(r"[\w-]{1,128}", found)):
        return found
    raise DataError("listeners.json does not hold the id of a run", where=str(path), got=repr(found)[:80])


def write_id(facts: Mapping[str, Any], service: str, value: str) -> None:
    """Keep the id of the run at a service in the run directory, if there is one. Raises ConfigError."""
    path = _path(facts)
    if path is not None:
        with _lock:
            write_json(path, {**_read(path), service: value})


def _path(facts: Mapping[str, Any]) -> Path | None:
    return None if facts["run_dir"] is None else Path(facts["run_dir"]) / IDS


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_inside(path)) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} can't be read: {error}", where=str(path.absolute())) from error
    return found if isinstance(found, dict) else {}
