"""What a worker without peers is doing, in a file for its parent, which watches it as peers would."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from manyhands.members.processes import stack_address

STATUS_FILE_VARIABLE = "MANYHANDS_STATUS_FILE"
"""Set for workers whose parent watches them."""
_BYTES = 512


class Status(NamedTuple):
    """doing: in words; stack: where its Python stack is to be had; stall_seconds: how long a status may last."""

    doing: str
    stack: str
    stall_seconds: float


class StatusFile:
    """Written by the worker; `say` costs a microsecond or two."""

    def __init__(self, path: str, stall_seconds: float) -> None:
        self._facts = [stack_address(), stall_seconds]
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    @classmethod
    def for_parent(cls, stall_seconds: float) -> StatusFile | None:
        """The one that this process's parent watches, if it does."""
        path = os.environ.get(STATUS_FILE_VARIABLE)
        return None if path is None else cls(path, stall_seconds)

    def say(self, doing: str) -> None:
        """What the worker does now."""
        text = json.dumps([doing[: _BYTES // 4], *self._facts]).encode()
        os.pwrite(self._file, text[:_BYTES].ljust(_BYTES), 0)

    def close(self) -> None:
        """The worker isn't to be watched any more."""
        self.say("")
        os.close(self._file)


def read_status(path: str | os.PathLike[str]) -> Status | None:
    """What the worker said last; None if nothing."""
    try:
        with open(path, "rb") as file:
            return Status(*json.loads(file.read(_BYTES)))
    except (OSError, ValueError, TypeError):
        return None
