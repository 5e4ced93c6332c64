"""The files that a worker leaves for its launcher: status file, unfinished file and failure report.

A worker without peers writes its position to a status file. Its launcher watches this file, as peers would watch the
worker.

A worker that is in a group has an unfinished file. If this file still exists when the worker has ended with exit code
0, the worker has ended in the middle of its work (os._exit), which is a failure.

A failed worker writes its error to the file that TORCHELASTIC_ERROR_FILE names. This is a variable of
torch's elastic launcher, so the report also works under plain torchrun. The launcher reads the files of all workers
(launching/root_cause.py).

This module does not import torch, because every worker loads it before it knows whether it needs torch.
"""

from __future__ import annotations

import atexit
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
"""The environment variable with the path of the worker's status file, if its launcher watches the file."""

_BYTES = 512  # the size of a status file, which is written in one call, so that a reader never sees a part of it


class Status(NamedTuple):
    """The content of a status file. stack: the worker's `stack_address`. stall_seconds: the time that one position may
    last.
    """

    position: Position
    stack: str
    stall_seconds: float


_NO_LIMIT_SECONDS = 1e18


class StatusFile:
    """The status file of this worker. `record_position` takes one or two microseconds."""

    def __init__(self, path: str, stall_seconds: float) -> None:
        self._facts = [stack_address(), stall_seconds]
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    @classmethod
    def for_parent(cls, stall_seconds: float) -> StatusFile | None:
        """Open the status file that this process's launcher watches. Return None if it does not watch one."""
        path = os.environ.get(STATUS_FILE_VARIABLE)
        return None if path is None else cls(path, stall_seconds)

    def record_position(self, position: Position) -> None:
        """Record the worker's new position, unless the disk of the file is full."""
        text = json.dumps([position._replace(activity=position.activity[: _BYTES // 4]), *self._facts]).encode()
        with suppress(OSError):
            os.pwrite(self._file, text[:_BYTES].ljust(_BYTES), 0)

    def close(self, failed_at: Position = NO_POSITION) -> None:
        """Write a last position, to which the launcher applies no time limit.

        failed_at: where the worker has failed, which decides whether the launcher restarts it.
        """
        self._facts[1] = _NO_LIMIT_SECONDS
        self.record_position(failed_at)
        os.close(self._file)


def read_status(path: str | os.PathLike[str]) -> Status | None:
    """Return the last status that a worker wrote, or None if there is none that can be read."""
    try:
        with open(path, "rb") as file:
            position, stack, stall_seconds = json.loads(file.read(_BYTES))
        return Status(Position(*position), stack, stall_seconds)
    except (OSError, ValueError, TypeError):
        return None


UNFINISHED_FILE_VARIABLE = "MANYHANDS_UNFINISHED_FILE"
"""Environment variable: the path of the worker's unfinished file, if its launcher looks for one."""


def begin_work() -> None:
    """Report to the launcher that this worker is in the middle of its work, until `end_work` or the end of the program.

    A program that ends without closing its group is not a failure, but os._exit calls no exit functions.
    """
    path, owner = os.environ.get(UNFINISHED_FILE_VARIABLE), os.getpid()
    if path is not None:
        with suppress(OSError):  # the disk is full; the launcher then can't notice an early end with exit code 0
            Path(path).touch()
        atexit.register(lambda: end_work() if os.getpid() == owner else None)  # not in a forked child


def end_work() -> None:
    """Report to the launcher that this worker has finished its work."""
    path = os.environ.get(UNFINISHED_FILE_VARIABLE)
    if path is not None:
        Path(path).unlink(missing_ok=True)


ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

PARENT_REPORTS_VARIABLE = "MANYHANDS_PARENT_REPORTS"
"""The environment variable that is set for workers whose launcher prints the root cause.

They don't print their errors.
"""

_SELF_EXPLANATORY = (ConfigError, DataError, NumericsError, CheckpointError)
"""Errors that all workers raise, or that state their own position, so that the worker's activity would add nothing."""

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's report of its failure.

    notice: True if the worker itself did not fail, but detected that a peer (`root_cause`, a rank) raised, died or
    stalled, or was requested to stop. alive: True if that peer was alive at that time. position: the position of the
    root cause. `what` to `detail` are the fields of a ManyhandsError. seconds: the time of the report, since the epoch.
    """

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
    def from_error(
        cls, error: BaseException, *, rank: int, pid: int, where: str | None = None, position: Position = NO_POSITION
    ) -> Failure:
        """Return a worker's report of `error`. where, position: used if the error has no `where` or position of its
        own.
        """
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
            where=getattr(error, "where", None) or (None if isinstance(error, _SELF_EXPLANATORY) else where),
            hint=getattr(error, "hint", None),
            detail=getattr(error, "detail", None) or _cause_traceback(error),
            seconds=time.time(),
        )

    @property
    def is_secondhand(self) -> bool:
        """Return True if the worker only saw a broken connection and cannot name the root cause."""
        return self.kind == WorkerError.__name__ and self.root_cause is None

    @property
    def first_line(self) -> str:
        """Return the first line of the message."""
        return self.message.partition("\n")[0]

    def error(self) -> ManyhandsError | None:
        """Return the ManyhandsError that was reported, or None for an error of another kind."""
        kind = getattr(errors, self.kind, None)
        if self.what is None or not (isinstance(kind, type) and issubclass(kind, ManyhandsError)):
            return None
        rebuilt: ManyhandsError = kind(
            self.what, expected=self.expected, got=self.got, where=self.where, hint=self.hint, detail=self.detail
        )
        return rebuilt


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """How one worker ended.

    exit_code: 0 for success; a negative code is minus the number of the signal that killed the worker. seconds: the
    time when the launcher found that the worker had ended, since the epoch. log_tail: the last lines of the worker's
    log, if it has one. position: the worker's last position, if it had no peers that could report it.
    """

    rank: int
    exit_code: int
    seconds: float
    failure: Failure | None = None
    log_tail: str = ""
    position: Position = NO_POSITION


def record_failure(error: BaseException, *, where: str | None = None, position: Position = NO_POSITION) -> None:
    """Write `error` to the file that the launcher reads. Does nothing without a launcher. Never raises.

    where, position: used if the error has no `where` or position of its own. An error that names another rank or is a
    request to stop is recorded as a notice, because this worker is not the root cause.
    """
    # An earlier record is not overwritten, because later errors of this worker are consequences of the first error. An
    # error here (a full disk, for example) must not hide the original error.
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or os.path.exists(path):
        return
    rank = int(os.environ.get("RANK", "-1"))
    write_failure(Path(path), Failure.from_error(error, rank=rank, pid=os.getpid(), where=where, position=position))


def write_failure(path: Path, failure: Failure) -> None:
    """Write a report to a file, atomically. Never raises."""
    # torch's launcher takes the report with the earliest whole second as the root cause, so give notices a later
    # second.
    rounded_seconds = int(failure.seconds) + failure.notice
    report = {
        # This is the format that torch's launcher reads and prints.
        "message": {
            "message": f"{failure.kind}: {failure.message}",
            "extraInfo": {"py_callstack": failure.traceback, "timestamp": str(rounded_seconds)},
        },
        "manyhands": asdict(failure),
    }
    with suppress(OSError):
        temporary = f"{path}.{os.getpid()}"
        Path(temporary).write_text(json.dumps(report, default=str), encoding="utf-8")
        os.replace(temporary, path)  # atomic: the launcher may read at any moment


def forget_failure() -> None:
    """Delete the report of an earlier failure that this worker has survived."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path and os.environ.get(PARENT_REPORTS_VARIABLE):  # under plain torchrun the file belongs to torch
        Path(path).unlink(missing_ok=True)


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error as text, starting at the user's code.

    Frames of Manyhands above the user's code are removed, except for an InvariantError, which is a bug in Manyhands.
    For a WorkerError only the message is returned, because its cause is in another process.
    """
    if isinstance(error, WorkerError):
        return "".join(traceback.format_exception_only(error)).rstrip()
    parsed = traceback.TracebackException.from_exception(error)
    if not isinstance(error, InvariantError):
        _remove_frames_above_user(parsed)
    return "".join(parsed.format()).rstrip()


def _cause_traceback(error: BaseException) -> str | None:
    """Return the traceback of the user's exception that caused `error`, or None if there is none.

    The result is None for a WorkerError, too, because its cause is in another worker.
    """
    return None if error.__cause__ is None or isinstance(error, WorkerError) else traceback_of(error.__cause__)


def _remove_frames_above_user(parsed: traceback.TracebackException) -> None:
    """Remove all frames up to the last frame of Manyhands, in place, unless no frame would be left."""
    ours = [index for index, frame in enumerate(parsed.stack) if frame.filename.startswith((_PACKAGE, "<frozen"))]
    if ours and ours[-1] + 1 < len(parsed.stack):
        parsed.stack = traceback.StackSummary.from_list(list(parsed.stack)[ours[-1] + 1 :])
    for other in (parsed.__cause__, parsed.__context__):
        if other is not None:
            _remove_frames_above_user(other)


def read_failure(path: Path, rank: int) -> Failure | None:
    """Read the report that worker `rank` wrote with `record_failure` or torch's `record`.

    Return None if it can't be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if "manyhands" in report:
            known = {field.name for field in fields(Failure)}
            values = {name: value for name, value in report["manyhands"].items() if name in known}
            return Failure(**{**values, "position": Position(*values.get("position", ()))})
        message = report["message"]
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
