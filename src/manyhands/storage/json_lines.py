"""JSON-lines files that are appended to and may end in a partial line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.errors import DataError
from manyhands.storage.untrusted import MOST_LINES_BYTES, open_to_append, read_inside


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append a value as one line of JSON. On return, the operating system has the line, so the line survives this
    process.

    A partial line at the end of the file becomes a line of its own. Raises OSError if the full line can't be written.
    """
    data = (json.dumps(numbers(value), allow_nan=False) + "\n").encode()
    with open_to_append(path) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        while data:  # if the disk has space for only a part, writing the remaining part raises the error
            data = data[file.write(data) :]


def complete_lines(path: Path) -> list[tuple[int, Any]]:
    """Return (line number from 1, value) of each complete line.

    Lines that are not JSON and a last line without a line break are omitted. A missing file has no lines. Raises
    DataError if the file can't be read, or is a link that leads out of its folder.
    """
    try:
        content = read_inside(path, MOST_LINES_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path.name} can't be read: {error.strerror}", where=str(path.absolute())) from error
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return found


def numbers(value: Any) -> Any:
    """Return the value with infinities and NaN, which JSON lacks, as strings ("inf", "nan") that `float` converts
    back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(item) for item in value]
    return value
