"""What a worker leaves for its parent: failure record and status file (no torch).

What a worker without peers is doing, in a file for its parent, which watches it as peers would.

What a failed worker leaves behind for its parent.
A worker writes its error to the file that TORCHELASTIC_ERROR_FILE names (the elastic launcher's variable, so the same
file also serves plain torchrun). The parent reads what all workers left (see root cause.py).
Imports no torch: every worker loads it.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from manyhands import errors
from manyhands.errors import (
    NO_POSITION,
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    InvariantError,
    ManyhandsError,
    NumericsError,
    Position,
    WorkerError,
)
from manyhands.members.processes import stack_address

STATUS_FILE_VARIABLE = "MANYHANDS_STATUS_FILE"
"""Set for workers whose parent watches them."""

_BYTES = 512


class Status(NamedTuple):
    """stack: where its Python stack is to be had; stall_seconds: how long a status may last."""

    position: Position
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

    def enter(self, position: Position) -> None:
        """Where the worker is from now on."""
        text = json.dumps([position._replace(words=position.words[: _BYTES // 4]), *self._facts]).encode()
        os.pwrite(self._file, text[:_BYTES].ljust(_BYTES), 0)

    def close(self) -> None:
        """The worker isn't to be watched any more."""
        self.enter(Position())
        os.close(self._file)


def read_status(path: str | os.PathLike[str]) -> Status | None:
    """What the worker said last; None if nothing."""
    try:
        with open(path, "rb") as file:
            position, stack, stall_seconds = json.loads(file.read(_BYTES))
        return Status(Position(*position), stack, stall_seconds)
    except (OSError, ValueError, TypeError):
        return None


ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

PARENT_TELLS_VARIABLE = "MANYHANDS_PARENT_TELLS"
"""Set for workers whose parent shows the error that matters: they needn't print theirs."""

_TELLING = (ConfigError, DataError, NumericsError, CheckpointError)
"""Errors that are raised on all workers alike, or say themselves where: what a worker was doing adds nothing."""

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's own account. `notice`: it merely noticed that a peer (`root cause`) raised, died or stalled;
    `alive`:
    the peer was alive then. `place`: where who is to blame was. `what` to `detail` are a ManyhandsError's own (see
    errors)."""

    rank: int
    pid: int
    kind: str
    message: str
    traceback: str
    root_cause: int | None = None
    notice: bool = False
    alive: bool = False
    position: Position = NO_POSITION
    what: str | None = None
    expected: str | None = None
    got: str | None = None
    where: str | None = None
    hint: str | None = None
    detail: str | None = None
    seconds: float = 0.0

    @classmethod
    def of(
        cls, error: BaseException, *, rank: int, pid: int, where: str | None = None, position: Position = NO_POSITION
    ) -> Failure:
        """A worker's account of `error`. where, place: what it was doing, if the error itself doesn't tell."""
        root_cause = error.rank if isinstance(error, WorkerError) and error.rank >= 0 else None
        return cls(
            rank=rank,
            pid=pid,
            kind=type(error).__name__,
            message=str(error),
            traceback=traceback_of(error),
            root_cause=root_cause,
            notice=root_cause not in (None, rank) or isinstance(error, (Interrupted, KeyboardInterrupt)),
            alive=isinstance(error, WorkerError) and error.alive,
            position=error.position if isinstance(error, WorkerError) and error.where else position,
            what=getattr(error, "what", None),
            expected=getattr(error, "expected", None),
            got=getattr(error, "got", None),
            where=getattr(error, "where", None) or (None if isinstance(error, _TELLING) else where),
            hint=getattr(error, "hint", None),
            detail=getattr(error, "detail", None) or _story_behind(error),
            seconds=time.time(),
        )

    @property
    def is_secondhand(self) -> bool:
        """Whether it merely noticed that something was gone, and knows of nobody who is to blame."""
        return self.kind == WorkerError.__name__ and self.root_cause is None

    @property
    def first_line(self) -> str:
        """The message's."""
        return self.message.partition("\n")[0]

    def error(self) -> ManyhandsError | None:
        """The ManyhandsError that it tells of, made again; None for another kind."""
        kind = getattr(errors, self.kind, None)
        if self.what is None or not (isinstance(kind, type) and issubclass(kind, ManyhandsError)):
            return None
        made: ManyhandsError = kind(
            self.what, expected=self.expected, got=self.got, where=self.where, hint=self.hint, detail=self.detail
        )
        return made


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """How one worker ended: `exit_code` 0 is well, a negative one is minus the number of the signal that killed it.

    `seconds` (since the epoch): when the launcher saw it; `log_tail`: its last lines, if they went to a file; `place`:
    where it was last, if it had no peers to tell.
    """

    rank: int
    exit_code: int
    seconds: float
    failure: Failure | None = None
    log_tail: str = ""
    position: Position = NO_POSITION


def record_failure(error: BaseException, *, where: str | None = None, position: Position = NO_POSITION) -> None:
    """Leave `error` for the parent. Called by a worker, once, before it ends; without a launcher it does nothing.

    where, place: what the worker was doing, if the error itself doesn't tell. A WorkerError that names another rank,
    and being asked to stop, are only notices: not this worker's fault. The first record stays: what comes later is a
    consequence. Never raises: a full disk must not hide the error itself.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or os.path.exists(path):
        return
    rank = int(os.environ.get("RANK", "-1"))
    write_failure(Path(path), Failure.of(error, rank=rank, pid=os.getpid(), where=where, position=position))


def write_failure(path: Path, failure: Failure) -> None:
    """Leave an account in a file, whole or not at all. Never raises."""
    rounded_seconds = (
        int(failure.seconds) + failure.notice
    )  # torch blames the earliest: a cause is before what it causes
    account = {
        # The shape that torch's own launcher reads and prints.
        "message": {
            "message": f"{failure.kind}: {failure.message}",
            "extraInfo": {"py_callstack": failure.traceback, "timestamp": str(rounded_seconds)},
        },
        "manyhands": asdict(failure),
    }
    with suppress(OSError):
        temporary = f"{path}.{os.getpid()}"
        Path(temporary).write_text(json.dumps(account, default=str), encoding="utf-8")
        os.replace(temporary, path)  # the launcher reads it only whole


def forget_failure() -> None:
    """What this worker recorded before, it has survived."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path and os.environ.get(PARENT_TELLS_VARIABLE):  # torch's own file is left alone
        Path(path).unlink(missing_ok=True)


def traceback_of(error: BaseException) -> str:
    """Its traceback from where the user's code was called on: without our own frames above, unless the bug is ours.
    Of a WorkerError only the message: what matters happened elsewhere."""
    if isinstance(error, WorkerError):
        return "".join(traceback.format_exception_only(error)).rstrip()
    story = traceback.TracebackException.from_exception(error)
    if not isinstance(error, InvariantError):
        _cut_above_user(story)
    return "".join(story.format()).rstrip()


def _story_behind(error: BaseException) -> str | None:
    """The user's code that made us raise `error`. (What is behind a WorkerError happened in another worker.)"""
    return None if error.__cause__ is None or isinstance(error, WorkerError) else traceback_of(error.__cause__)


def _cut_above_user(story: traceback.TracebackException) -> None:
    ours = [index for index, frame in enumerate(story.stack) if frame.filename.startswith((_PACKAGE, "<frozen"))]
    if ours and ours[-1] + 1 < len(story.stack):
        story.stack = traceback.StackSummary.from_list(list(story.stack)[ours[-1] + 1 :])
    for other in (story.__cause__, story.__context__):
        if other is not None:
            _cut_above_user(other)


def read_failure(path: Path, rank: int) -> Failure | None:
    """What worker `rank` left in `path`, by record_failure or by torch's `record`; None: nothing that can be read."""
    try:
        account = json.loads(path.read_text(encoding="utf-8"))
        if "manyhands" in account:
            known = {field.name for field in fields(Failure)}
            told = {name: value for name, value in account["manyhands"].items() if name in known}
            return Failure(**{**told, "position": Position(*told.get("position", ()))})
        message = account["message"]
        if isinstance(message, str):
            message = {"message": message}
        extra = message.get("extraInfo", {})
        kind, _, text = str(message["message"]).partition(": ")
        return Failure(
            rank=rank,
            pid=-1,
            kind=kind,
            message=text,
            traceback=str(extra.get("py_callstack", "")),
            seconds=float(extra.get("timestamp", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
