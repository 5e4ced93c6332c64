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

from manyhands.errors import Interrupted, WorkerError

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
STOPPED_CODES = (130, 143)
"""Exit codes of a worker that was asked to stop and did: 128 + SIGINT, 128 + SIGTERM."""
LAUNCHER_KILL_SECONDS = 20.0
"""A worker found killed this long after the first failure was killed by the launcher, which waits 30 s."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's own account. `notice`: it merely noticed that a peer (`culprit`) raised, died or stalled."""

    rank: int
    pid: int
    kind: str
    message: str
    traceback: str
    culprit: int | None = None
    notice: bool = False
    where: str | None = None
    hint: str | None = None
    seconds: float = 0.0


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


def record_failure(error: BaseException, culprit: int | None = None, notice: bool | None = None) -> None:
    """Leave `error` for the parent. Called by a worker, once, before it ends; without a launcher it does nothing.

    culprit: the rank to blame, where known. notice: this worker only noticed a peer's failure; None: it is so when
    `error` is a WorkerError that names another rank. The first record stays: what comes later is a consequence.
    Never raises: a full disk must not hide the error itself.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or os.path.exists(path):
        return
    rank = int(os.environ.get("RANK", "-1"))
    if culprit is None and isinstance(error, WorkerError) and error.rank >= 0:
        culprit = error.rank
    failure = Failure(
        rank=rank,
        pid=os.getpid(),
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        culprit=culprit,
        notice=culprit not in (None, rank) if notice is None else notice,
        where=getattr(error, "where", None),
        hint=getattr(error, "hint", None),
        seconds=time.time(),
    )
    account = {
        # The shape that torch's own launcher reads and prints.
        "message": {
            "message": f"{failure.kind}: {failure.message}",
            "extraInfo": {"py_callstack": failure.traceback, "timestamp": str(int(failure.seconds))},
        },
        "manyhands": asdict(failure),
    }
    with suppress(OSError):
        temporary = f"{path}.{failure.pid}"
        Path(temporary).write_text(json.dumps(account, default=str), encoding="utf-8")
        os.replace(temporary, path)  # the launcher reads it only whole


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
    codes = {end.exit_code for end in ends}
    stopped = {0, *STOPPED_CODES, -signal.SIGINT, -signal.SIGTERM}
    if codes <= stopped and codes & set(STOPPED_CODES) and all(failure.notice for failure in failures):
        return Interrupted("the workers were asked to stop, and stopped")
    notices = sorted((failure for failure in failures if failure.notice), key=lambda failure: failure.seconds)
    named = next((notice.culprit for notice in notices if notice.culprit is not None), None)
    first_seconds = min(end.seconds for end in ends if end.exit_code != 0)
    culprit = min(ends, key=lambda end: _blame(end, named, first_seconds))
    failure = culprit.failure
    if failure is not None and not failure.notice:
        what = f"worker {culprit.rank} failed: {failure.kind}: {_first_line(failure.message)}"
    elif culprit.exit_code in (0, -signal.SIGTERM) and culprit.rank == named:
        # It was alive (a stall, say) and ended only because the launcher told it to: the noticer knows more.
        what = _first_line(notices[0].message)
    else:
        what = f"worker {culprit.rank} {_ended(culprit.exit_code)}"
    return WorkerError(
        what,
        rank=culprit.rank,
        where=failure.where if failure is not None else None,
        hint=_hint(culprit),
        detail=_detail(culprit, notices, ends) or None,
    )


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


def _detail(culprit: WorkerEnd, notices: Sequence[Failure], ends: Sequence[WorkerEnd]) -> str:
    parts = []
    if culprit.failure is not None:
        parts.append(culprit.failure.traceback.rstrip())
    else:
        parts += [f"worker {notice.rank} noticed: {notice.message}" for notice in notices]
        if culprit.log_tail:
            parts.append(f"the last lines of worker {culprit.rank}:\n{culprit.log_tail}")
    for end in ends:
        own = end.failure is not None and not end.failure.notice
        # Who was merely told to end by the launcher has no story of its own.
        if end.rank != culprit.rank and (own or end.exit_code not in (0, -signal.SIGTERM, -signal.SIGKILL)):
            told = f": {end.failure.kind}: {_first_line(end.failure.message)}" if end.failure is not None else ""
            parts.append(f"then worker {end.rank} {_ended(end.exit_code)}{told}")
    return "\n".join(parts)


def _hint(culprit: WorkerEnd) -> str | None:
    if culprit.failure is not None:
        return culprit.failure.hint
    if culprit.exit_code == -signal.SIGKILL:
        return "if nobody killed it, memory ran out (see `dmesg`): use fewer workers or smaller micro-batches"
    return None


def _ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
