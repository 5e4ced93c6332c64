"""What a failed worker leaves behind, and who is to blame when several have failed.

A worker writes its error to the file that TORCHELASTIC_ERROR_FILE names (the elastic launcher's variable, so the same
file also serves plain torchrun). The parent reads what all workers left, and names one culprit.
Imports no torch: every worker loads it.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from manyhands import errors
from manyhands.errors import Interrupted, InvariantError, ManyhandsError, WorkerError

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
STOPPED_CODES = (130, 143)
"""Exit codes of a worker that was asked to stop and did: 128 + SIGINT, 128 + SIGTERM."""
LAUNCHER_KILL_SECONDS = 20.0
"""A worker found killed this long after the first failure was killed by the launcher, which waits 30 s."""
PARENT_TELLS_VARIABLE = "MANYHANDS_PARENT_TELLS"
"""Set for workers whose parent shows the error that matters: they needn't print theirs."""
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's own account. `notice`: it merely noticed that a peer (`culprit`) raised, died or stalled; `alive`:
    the peer was alive then. `what` to `detail` are a ManyhandsError's own (see errors)."""

    rank: int
    pid: int
    kind: str
    message: str
    traceback: str
    culprit: int | None = None
    notice: bool = False
    alive: bool = False
    what: str | None = None
    expected: str | None = None
    got: str | None = None
    where: str | None = None
    hint: str | None = None
    detail: str | None = None
    seconds: float = 0.0

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

    `seconds` (since the epoch): when the launcher saw it; `log_tail`: its last lines, where they went to a file.
    """

    rank: int
    exit_code: int
    seconds: float
    failure: Failure | None = None
    log_tail: str = ""


def record_failure(error: BaseException, *, where: str | None = None) -> None:
    """Leave `error` for the parent. Called by a worker, once, before it ends; without a launcher it does nothing.

    where: what the worker was doing, if the error itself doesn't tell. A WorkerError that names another rank, and being
    asked to stop, are only notices: not this worker's fault. The first record stays: what comes later is a consequence.
    Never raises: a full disk must not hide the error itself.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or os.path.exists(path):
        return
    rank = int(os.environ.get("RANK", "-1"))
    culprit = error.rank if isinstance(error, WorkerError) and error.rank >= 0 else None
    failure = Failure(
        rank=rank,
        pid=os.getpid(),
        kind=type(error).__name__,
        message=str(error),
        traceback=story_of(error),
        culprit=culprit,
        notice=culprit not in (None, rank) or isinstance(error, (Interrupted, KeyboardInterrupt)),
        alive=isinstance(error, WorkerError) and error.alive,
        what=getattr(error, "what", None),
        expected=getattr(error, "expected", None),
        got=getattr(error, "got", None),
        where=getattr(error, "where", None) or where,
        hint=getattr(error, "hint", None),
        detail=getattr(error, "detail", None) or _story_behind(error),
        seconds=time.time(),
    )
    whole_seconds = int(failure.seconds) + failure.notice  # torch blames the earliest: a cause is before what it causes
    account = {
        # The shape that torch's own launcher reads and prints.
        "message": {
            "message": f"{failure.kind}: {failure.message}",
            "extraInfo": {"py_callstack": failure.traceback, "timestamp": str(whole_seconds)},
        },
        "manyhands": asdict(failure),
    }
    with suppress(OSError):
        temporary = f"{path}.{failure.pid}"
        Path(temporary).write_text(json.dumps(account, default=str), encoding="utf-8")
        os.replace(temporary, path)  # the launcher reads it only whole


def forget_failure() -> None:
    """What this worker recorded before, it has survived."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path and os.environ.get(PARENT_TELLS_VARIABLE):  # torch's own file is left alone
        Path(path).unlink(missing_ok=True)


def story_of(error: BaseException) -> str:
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
    return None if error.__cause__ is None or isinstance(error, WorkerError) else story_of(error.__cause__)


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
            return Failure(**{name: value for name, value in account["manyhands"].items() if name in known})
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


def explain(ends: Sequence[WorkerEnd]) -> WorkerError | Interrupted:
    """The error to raise for workers that ended as `ends` (all of them), at least one of them badly.

    Pure. Interrupted, when they stopped because they were asked to; otherwise a WorkerError that names the culprit:
    1. a worker that something outside killed with SIGKILL (the out-of-memory killer: its peers' broken connections,
       which they may take for faults of their own, are consequences);
    2. the first worker that left an error of its own;
    3. one that died by another signal (it may also abort on the way out, so an error of its own goes first);
    4. the one that the others noticed;  5. one with an exit code;  6. one that was sent SIGTERM.
    """
    failures = [end.failure for end in ends if end.failure is not None]
    codes = {_stopped_code(end) for end in ends}
    stopped = {0, *STOPPED_CODES, -signal.SIGINT, -signal.SIGTERM}
    if codes <= stopped and codes & set(STOPPED_CODES) and all(failure.notice for failure in failures):
        return Interrupted("the workers were asked to stop, and stopped")
    notices = sorted(
        (failure for failure in failures if failure.notice and failure.culprit is not None),
        key=lambda failure: failure.seconds,
    )
    named = notices[0].culprit if notices else None
    first_seconds = min(end.seconds for end in ends if end.exit_code != 0)
    culprit = min(ends, key=lambda end: _blame(end, named, first_seconds))
    return _error_about(culprit, [notice for notice in notices if notice.culprit == culprit.rank], ends)


def _stopped_code(end: WorkerEnd) -> int:
    """A program that leaves with the Interrupted that it was given has stopped, too."""
    asked = end.failure is not None and end.failure.kind in ("Interrupted", "KeyboardInterrupt")
    return STOPPED_CODES[0] if asked and end.exit_code > 0 else end.exit_code


def _error_about(culprit: WorkerEnd, notices: Sequence[Failure], ends: Sequence[WorkerEnd]) -> WorkerError:
    """What is told of the culprit; `notices` are what others noticed about it."""
    failure = culprit.failure if culprit.failure is not None and not culprit.failure.notice else None
    notice = notices[0] if notices else None
    made = None if failure is None else failure.error()
    if failure is not None and isinstance(made, WorkerError):  # it was given up by the others, and learned it from them
        what = made.what
    elif failure is not None:
        what = f"worker {culprit.rank} failed: {failure.kind}: {failure.first_line}"
    elif notice is not None and (notice.alive or culprit.exit_code in (0, -signal.SIGTERM)):
        # It was alive (a stall, say) and ended only because it was told to, or killed: the noticer knows more.
        what = notice.what or notice.first_line
    else:
        what = f"worker {culprit.rank} {_ended(culprit.exit_code)}"
    error = WorkerError(
        what,
        rank=culprit.rank,
        where=next((account.where for account in (failure, notice) if account and account.where), None),
        hint=_hint(culprit, failure, notice),
        detail=_detail(culprit, failure, notices, ends) or None,
    )
    error.__cause__ = made
    return error


def _blame(end: WorkerEnd, named: int | None, first_seconds: float) -> tuple[int, float]:
    """Sorts the culprit first: see `explain`."""
    own = end.failure is not None and not end.failure.notice
    prompt = end.seconds - first_seconds < LAUNCHER_KILL_SECONDS
    if own and end.failure is not None:
        return 2, end.failure.seconds
    if end.exit_code == -signal.SIGKILL and prompt:
        return 1, end.seconds
    if end.exit_code < 0 and end.exit_code not in (-signal.SIGTERM, -signal.SIGKILL):
        return 3, end.seconds
    if end.rank == named:
        return 4, end.seconds
    if end.failure is not None:
        return 7, end.failure.seconds
    if end.exit_code > 0:
        return 5, end.seconds
    return (6 if end.exit_code else 8), end.seconds


def _detail(culprit: WorkerEnd, failure: Failure | None, notices: Sequence[Failure], ends: Sequence[WorkerEnd]) -> str:
    parts = []
    if failure is not None:
        parts.append((failure.detail or "") if failure.kind == "WorkerError" else failure.traceback)
    elif notices:
        if not notices[0].alive:  # else it's what was said of the culprit already
            parts.append(f"worker {notices[0].rank} noticed: {notices[0].first_line}")
        parts.append(notices[0].detail or "")
    if failure is None and culprit.log_tail:
        parts.append(f"the last lines of worker {culprit.rank}:\n{culprit.log_tail}")
    for end in ends:
        told = end.failure
        # Who was merely told to end, or says the same, has no story of its own.
        same = told is not None and (told.culprit == culprit.rank or (failure and told.message == failure.message))
        own = told is not None and not told.notice
        if (
            end.rank != culprit.rank
            and not same
            and (own or end.exit_code not in (0, -signal.SIGTERM, -signal.SIGKILL))
        ):
            why = f": {told.kind}: {told.first_line}" if told is not None else ""
            parts.append(f"then worker {end.rank} {_ended(end.exit_code)}{why}")
    return "\n".join(part.rstrip() for part in parts if part.strip())


def _hint(culprit: WorkerEnd, failure: Failure | None, notice: Failure | None) -> str | None:
    if failure is not None:
        return failure.hint
    if culprit.exit_code == -signal.SIGKILL and not (notice is not None and notice.alive):
        return "if nobody killed it, memory ran out (see `dmesg`): use fewer workers or smaller micro-batches"
    return None if notice is None else notice.hint


def _ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
