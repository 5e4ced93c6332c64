"""Who is to blame when several workers have failed, and what is told of it. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from manyhands.errors import Interrupted, WorkerError
from manyhands.members.failure import Failure, WorkerEnd

STOPPED_CODES = (130, 143)
"""Exit codes of a worker that was asked to stop and did: 128 + SIGINT, 128 + SIGTERM."""
LAUNCHER_KILL_SECONDS = 20.0
"""A worker found killed this long after the first failure was killed by the launcher, which waits 30 s."""


def explain(ends: Sequence[WorkerEnd]) -> WorkerError | Interrupted:
    """The error to raise for workers that ended as `ends` (all of them), at least one of them badly.

    Pure. Interrupted, when they stopped because they were asked to; otherwise a WorkerError that names the culprit:
    1. a worker that something outside killed with SIGKILL (the out-of-memory killer: its peers' broken connections,
       which they may take for faults of their own, are consequences);
    2. the first worker that left an error of its own;
    3. one that died by another signal (it may also abort on the way out, so an error of its own goes first);
    4. the one that the others noticed;  5. one with an exit code;  6. one that was sent SIGTERM, or that only knows
       that something was gone.
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
    if named is not None and named not in {end.rank for end in ends}:  # on another host
        ends = [*ends, WorkerEnd(rank=named, exit_code=0, seconds=notices[0].seconds)]
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
    made, raised = None if failure is None else failure.error(), ""
    if failure is not None and isinstance(made, WorkerError):  # it was given up by the others, and learned it from them
        what = made.what
    elif failure is not None:
        raised = f"{failure.kind}: {failure.first_line}"
        what = f"worker {culprit.rank} failed: {failure.kind}: {failure.first_line}"
    elif notice is not None and (notice.alive or culprit.exit_code in (0, -signal.SIGTERM)):
        # It was alive (a stall, say) and ended only because it was told to, or killed: the noticer knows more.
        what = notice.what or notice.first_line
    else:
        what = f"worker {culprit.rank} {_ended(culprit.exit_code)}"
    told = next((account for account in (failure, notice) if account and account.where), None)
    error = WorkerError(
        what,
        rank=culprit.rank,
        where=_doing(culprit) if told is None else told.where,
        place=culprit.place if told is None else told.place,
        hint=_hint(culprit, failure, notice),
        detail=_detail(what, culprit, failure, notices, ends) or None,
    )
    error.raised, error.__cause__ = raised, made
    return error


def _blame(end: WorkerEnd, named: int | None, first_seconds: float) -> tuple[int, float]:
    """Sorts the culprit first: see `explain`."""
    if end.failure is not None and end.failure.is_hearsay:
        return 6, end.failure.seconds
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


def _detail(
    what: str, culprit: WorkerEnd, failure: Failure | None, notices: Sequence[Failure], ends: Sequence[WorkerEnd]
) -> str:
    """What else is known, beside `what`."""
    parts = []
    if failure is not None:
        parts.append((failure.detail or "") if failure.kind == "WorkerError" else failure.traceback)
    elif notices:
        if notices[0].first_line != what:
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


def _doing(culprit: WorkerEnd) -> str | None:
    return f"worker {culprit.rank}, {culprit.place.words}" if culprit.place.words else None


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
