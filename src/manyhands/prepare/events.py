"""What happened to an output, and when: lines of JSON in its folder, as a run of training leaves them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from manyhands.addresses import is_local
from manyhands.prepare.storage import join, read_bytes, replace_bytes

EVENTS = "_events"


class JobEvents:
    """Appends to `_events.jsonl` in `folder`; a rank of several, to a file of its own.

    On a local disk each event is there at once; in a store, which can't append, when the job ends (`close`). Not being
    able to write it ends no job: that is the output's own matter.
    """

    def __init__(self, folder: str, rank: int | None = None) -> None:
        self._folder, self._rank = folder, rank
        self._path = join(folder, f"{EVENTS}.jsonl" if rank is None else f"{EVENTS}-rank-{rank}.jsonl")
        self._lines: list[bytes] = []

    def add(self, event: str, **facts: Any) -> None:
        """Note an event with the time (seconds since the epoch) and what is to be known of it."""
        line = json.dumps({"seconds": time.time(), "event": event, **facts}, default=str).encode() + b"\n"
        if not is_local(self._folder):
            self._lines.append(line)
            return
        with suppress(OSError), open(self._path, "ab") as file:
            file.write(line)

    def close(self) -> None:
        """Put what is noted into the store."""
        if not self._lines:
            return
        with suppress(OSError):
            before = b""
            with suppress(FileNotFoundError):
                before = read_bytes(self._path)
            replace_bytes(self._path, before + b"".join(self._lines))
        self._lines = []
