"""Finds the root cause among several failed workers, and describes it in the error that the launcher raises."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from manyhands.errors import Interrupted, WorkerError
from manyhands.members.reports import Failure, WorkerEnd
from manyhands.surroundings import STOP_SIGNALS

STOPPED_CODES = (130, 143)
"""The exit codes of a worker that stopped on request: 128 + SIGINT, 128 + SIGTERM."""

LAUNCHER_KILL_SECONDS = 20.0
"""If SIGKILL ends a worker this long after the first failure, the launcher sent it.

The launcher waits for 30 s first.
"""


def explain_failure(ends: Sequence[WorkerEnd]) -> WorkerError | Interrupted:
    """Return the error to raise. ends: how each worker ended; at least one of them failed. Pure.

    The error is Interrupted if the workers stopped on request. Otherwise it is a WorkerError that names the root cause,
    which is the first of:
    1. a worker killed with SIGKILL from outside, such as by the out-of-memory killer (its peers see broken connections
       and may report these as their own errors, but they are consequences);
    2. the first worker that reported its own error;
    3. a worker killed by another signal (2 comes first, because a worker that reported an error may also abort while it
    exits);
    4. the worker that its peers named;
    5. a worker with a non-zero exit code;
    6. a worker that was sent SIGTERM, or that only saw a broken connection.
    """
    failures = [end.failure for end in ends if end.failure is not None]
    codes = {_stopped_code(end) for end in ends}
    stopped = {0, *STOPPED_CODES, -signal.SIGINT, -signal.SIGTERM}
    if codes <= stopped and codes & set(STOPPED_CODES) and all(failure.notice for failure in failures):
        told = next((failure for failure in failures if failure.kind == "Interrupted" and failure.what), None)
        if told is None or told.what is None:
            return Interrupted("the workers stopped on request")
        return Interrupted(told.what, where=told.where, hint=told.hint)
    notices = sorted(
        (failure for failure in failures if failure.notice and failure.root_cause is not None),
        key=lambda failure: failure.seconds,
    )
    named = notices[0].root_cause if notices else None
    if named is not None and named not in {end.rank for end in ends}:  # the worker is on another host
        ends = [*ends, WorkerEnd(rank=named, exit_code=0, seconds=notices[0].seconds)]
    first_seconds = min((end.seconds for end in ends if end.exit_code != 0), default=0.0)
    root_cause = min(ends, key=lambda end: _root_cause_order(end, named, first_seconds))
    return _error_about(root_cause, [notice for notice in notices if notice.root_cause == root_cause.rank], ends)


def _stopped_code(end: WorkerEnd) -> int:
    """Return a worker's exit code.

    For a worker that failed with Interrupted or KeyboardInterrupt, it is the exit code of a stopped worker.
    """
    was_interrupted = end.failure is not None and end.failure.kind in ("Interrupted", "KeyboardInterrupt")
    # A signal that is sent repeatedly, such as SIGXCPU, may end the process after its handlers were removed.
    stopped = was_interrupted and (end.exit_code > 0 or -end.exit_code in STOP_SIGNALS)
    return STOPPED_CODES[0] if stopped else end.exit_code


def _error_about(root_cause: WorkerEnd, notices: Sequence[Failure], ends: Sequence[WorkerEnd]) -> WorkerError:
    """Return the error about the root cause. notices: the peers' reports about the root cause, earliest first."""
    failure = root_cause.failure if root_cause.failure is not None and not root_cause.failure.notice else None
    notice = notices[0] if notices else None
    reported, raised = None if failure is None else failure.error(), ""
    if failure is not None and isinstance(reported, WorkerError):
        # The peers or the launcher declared this worker lost, and the worker repeats their report.
        what = reported.what
    elif failure is not None:
        raised = f"{failure.kind}: {failure.first_line}"
        what = f"worker {root_cause.rank} failed: {failure.kind}: {failure.first_line}"
    elif notice is not None and (notice.alive or root_cause.exit_code in (0, -signal.SIGTERM)):
        # The worker was alive (stalled, for example) and ended only because it was stopped or killed afterwards. So the
        # peer's report is more specific than the exit code.
        what = notice.what or notice.first_line
    else:
        what = f"worker {root_cause.rank} {_describe_exit(root_cause.exit_code)}"
    report = next((each for each in (failure, notice) if each and each.where), None)
    error = WorkerError(
        what,
        rank=root_cause.rank,
        where=_where(root_cause) if report is None else report.where,
        position=root_cause.position if report is None else report.position,
        hint=_hint(root_cause, failure, notice),
        detail=_detail(what, root_cause, failure, notices, ends) or None,
    )
    error.raised, error.__cause__ = raised, reported
    return error


def _root_cause_order(end: WorkerEnd, named: int | None, first_seconds: float) -> tuple[int, float]:
    """Return a sort key that puts the root cause first. Its numbers are those in the docstring of `explain_failure`."""
    if end.failure is not None and end.failure.is_secondhand:
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
    what: str, root_cause: WorkerEnd, failure: Failure | None, notices: Sequence[Failure], ends: Sequence[WorkerEnd]
) -> str:
    """Return the details that `what` lacks: tracebacks, log lines, and other workers' failures."""
    parts = []
    if failure is not None:
        parts.append((failure.detail or "") if failure.kind == "WorkerError" else failure.traceback)
    elif notices:
        if notices[0].first_line != what:
            parts.append(f"worker {notices[0].rank} reported: {notices[0].first_line}")
        parts.append(notices[0].detail or "")
    if failure is None and root_cause.log_tail:
        parts.append(f"the last lines of worker {root_cause.rank}:\n{root_cause.log_tail}")
    for end in ends:
        other = end.failure
        # Omit workers that only report the root cause, repeat its message, or were only requested to end.
        repeats = other is not None and (
            other.root_cause == root_cause.rank or (failure and other.message == failure.message)
        )
        has_own_error = other is not None and not other.notice
        if (
            end.rank != root_cause.rank
            and not repeats
            and (has_own_error or end.exit_code not in (0, -signal.SIGTERM, -signal.SIGKILL))
        ):
            why = f": {other.kind}: {other.first_line}" if other is not None else ""
            parts.append(f"then worker {end.rank} {_describe_exit(end.exit_code)}{why}")
    return "\n".join(part.rstrip() for part in parts if part.strip())


def _where(root_cause: WorkerEnd) -> str | None:
    return f"worker {root_cause.rank}, {root_cause.position.activity}" if root_cause.position.activity else None


def _hint(root_cause: WorkerEnd, failure: Failure | None, notice: Failure | None) -> str | None:
    if failure is not None:
        return failure.hint or (_LESS_MEMORY if _is_allocation_error(failure) else None)
    if root_cause.exit_code == -signal.SIGKILL and not (notice is not None and notice.alive):
        return f"unless it was killed on purpose, {_LESS_MEMORY}"
    return None if notice is None else notice.hint


_LESS_MEMORY = "memory ran out (see `dmesg`): use fewer workers or a smaller micro_size"

_ALLOCATION_ERRORS = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")


def _is_allocation_error(failure: Failure) -> bool:
    """Return True if a worker's own error says that memory could not be allocated."""
    kinds = ("MemoryError", "OutOfMemoryError")
    return failure.kind in kinds or any(text in failure.message.lower() for text in _ALLOCATION_ERRORS)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
