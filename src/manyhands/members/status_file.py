"""What a worker without peers is doing, in a file for its parent, which watches it as peers would."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from manyhands.errors import Place
from manyhands.members.processes import stack_address

STATUS_FILE_VARIABLE = "MANYHANDS_STATUS_FILE"
"""Set for workers whose parent watches them."""
_BYTES = 512


class Status(NamedTuple):
    """stack: where its Python stack is to be had; stall_seconds: how long a status may last."""

    place: Place
    stack: str
    stall_seconds: float


class StatusFile:
    """Written by the worker; `enter` costs a microsecond or two."""

    def __init__(self, path: str, stall_seconds: float) -> None:
        self._facts = [stack_address(), stall_seconds]
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    @classmethod
    def for_parent(cls, stall_seconds: float) -> StatusFile | None:
        """The one that this process's parent watches, if it does."""
        path = os.environ.get(STATUS_FILE_VARIABLE)
        return None if path is None else cls(path, stall_seconds)

    def enter(self, place: Place) -> None:
        """Where the worker is from now on."""
        text = json.dumps([place._replace(words=place.words[: _BYTES // 4]), *self._facts]).encode()
        os.pwrite(self._file, text[:_BYTES].ljust(_BYTES), 0)

    def close(self) -> None:
        """The worker isn't to be watched any more."""
        self.enter(Place())
        os.close(self._file)


def read_status(path: str | os.PathLike[str]) -> Status | None:
    """What the worker said last; None if nothing."""
    try:
        with open(path, "rb") as file:
            place, stack, stall_seconds = json.loads(file.read(_BYTES))
        return Status(Place(*place), stack, stall_seconds)
    except (OSError, ValueError, TypeError):
        return None
