"""Finds the root cause among several failed workers, and decides whether to restart.

Who is to blame when several workers have failed, and what is told of it. Pure.

To go on after a worker has failed: all are started again, from the last state that survives, as long as it helps.
A step is a function of the state before it and of nothing else. So what was lost is computed again to the same bits;
and an exception that comes again in the same micro-batch will always come.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manyhands.errors import Interrupted, ManyhandsError, Position, WorkerError
from manyhands.members.reports import Failure, WorkerEnd

STOPPED_CODES = (130, 143)
"""Exit codes of a worker that was asked to stop and did: 128 + SIGINT, 128 + SIGTERM."""

LAUNCHER_KILL_SECONDS = 20.0
"""A worker found killed this long after the first failure was killed by the launcher, which waits 30 s."""


def explain_failure(ends: Sequence[WorkerEnd]) -> WorkerError | Interrupted:
    """The error to raise for workers that ended as `ends` (all of them), at least one of them badly.

    Pure. Interrupted, when they stopped because they were asked to; otherwise a WorkerError that names the root cause:
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
        (failure for failure in failures if failure.notice and failure.root_cause is not None),
        key=lambda failure: failure.seconds,
    )
    named = notices[0].root_cause if notices else None
    if named is not None and named not in {end.rank for end in ends}:  # on another host
        ends = [*ends, WorkerEnd(rank=named, exit_code=0, seconds=notices[0].seconds)]
    first_seconds = min(end.seconds for end in ends if end.exit_code != 0)
    root_cause = min(ends, key=lambda end: _blame(end, named, first_seconds))
    return _error_about(root_cause, [notice for notice in notices if notice.root_cause == root_cause.rank], ends)


def _stopped_code(end: WorkerEnd) -> int:
    """A program that leaves with the Interrupted that it was given has stopped, too."""
    asked = end.failure is not None and end.failure.kind in ("Interrupted", "KeyboardInterrupt")
    return STOPPED_CODES[0] if asked and end.exit_code > 0 else end.exit_code


def _error_about(root_cause: WorkerEnd, notices: Sequence[Failure], ends: Sequence[WorkerEnd]) -> WorkerError:
    """What is told of the root cause; `notices` are what others noticed about it."""
    failure = root_cause.failure if root_cause.failure is not None and not root_cause.failure.notice else None
    notice = notices[0] if notices else None
    made, raised = None if failure is None else failure.error(), ""
    if failure is not None and isinstance(made, WorkerError):  # it was given up by the others, and learned it from them
        what = made.what
    elif failure is not None:
        raised = f"{failure.kind}: {failure.first_line}"
        what = f"worker {root_cause.rank} failed: {failure.kind}: {failure.first_line}"
    elif notice is not None and (notice.alive or root_cause.exit_code in (0, -signal.SIGTERM)):
        # It was alive (a stall, say) and ended only because it was told to, or killed: the noticer knows more.
        what = notice.what or notice.first_line
    else:
        what = f"worker {root_cause.rank} {_ended(root_cause.exit_code)}"
    told = next((account for account in (failure, notice) if account and account.where), None)
    error = WorkerError(
        what,
        rank=root_cause.rank,
        where=_doing(root_cause) if told is None else told.where,
        position=root_cause.position if told is None else told.position,
        hint=_hint(root_cause, failure, notice),
        detail=_detail(what, root_cause, failure, notices, ends) or None,
    )
    error.raised, error.__cause__ = raised, made
    return error


def _blame(end: WorkerEnd, named: int | None, first_seconds: float) -> tuple[int, float]:
    """Sorts the root cause first: see `explain`."""
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
    """What else is known, beside `what`."""
    parts = []
    if failure is not None:
        parts.append((failure.detail or "") if failure.kind == "WorkerError" else failure.traceback)
    elif notices:
        if notices[0].first_line != what:
            parts.append(f"worker {notices[0].rank} noticed: {notices[0].first_line}")
        parts.append(notices[0].detail or "")
    if failure is None and root_cause.log_tail:
        parts.append(f"the last lines of worker {root_cause.rank}:\n{root_cause.log_tail}")
    for end in ends:
        told = end.failure
        # Who was merely told to end, or says the same, has no story of its own.
        same = told is not None and (
            told.root_cause == root_cause.rank or (failure and told.message == failure.message)
        )
        own = told is not None and not told.notice
        if (
            end.rank != root_cause.rank
            and not same
            and (own or end.exit_code not in (0, -signal.SIGTERM, -signal.SIGKILL))
        ):
            why = f": {told.kind}: {told.first_line}" if told is not None else ""
            parts.append(f"then worker {end.rank} {_ended(end.exit_code)}{why}")
    return "\n".join(part.rstrip() for part in parts if part.strip())


def _doing(root_cause: WorkerEnd) -> str | None:
    return f"worker {root_cause.rank}, {root_cause.position.words}" if root_cause.position.words else None


def _hint(root_cause: WorkerEnd, failure: Failure | None, notice: Failure | None) -> str | None:
    if failure is not None:
        return failure.hint
    if root_cause.exit_code == -signal.SIGKILL and not (notice is not None and notice.alive):
        return "if nobody killed it, memory ran out (see `dmesg`): use fewer workers or smaller micro-batches"
    return None if notice is None else notice.hint


def _ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


@dataclass(frozen=True)
class Restart:
    """What is told before the workers are started again. number: of those without progress, from 1."""

    cause: WorkerError
    number: int
    most: int


def run_again(
    run: Callable[[int], None],
    *,
    saved_step: Callable[[], tuple[int, int]],
    most: int,
    tell: Callable[[Restart], None],
    samples_of: Callable[[int, int], str] = lambda step, micro_batch: "",
) -> None:
    """Call `run`, which starts the workers and awaits them, until it ends well. It's given the number of failures
    without progress before.

    saved_step: where `run` will begin: in which of the trainings that it makes, from 0, and after how many steps of it,
    as the last checkpoint says. most: how often to start again without that having grown. samples_of: names those of
    (step, micro-batch). Raises the WorkerError that was one too many, or came again at the same place; and at once what
    is not a worker's accident: errors that a person must mend, and being asked to stop.
    """
    since, number = saved_step(), 0
    before: tuple[Position, str] | None = None
    while True:
        try:
            return run(number)
        except WorkerError as error:
            if not _is_accident(error):
                raise
            if saved_step() > since:
                since, number, before = saved_step(), 0, None
            number += 1
            this = _fault_of(error)
            if this is not None and this == before:
                raise _again(error, "it failed there the time before, too", samples_of) from error.__cause__
            if number > most:
                why = f"that's failure {number} without a checkpoint since step {since[1]}" if most else ""
                raise _again(error, why, samples_of) from error.__cause__
            before = this
            tell(Restart(error, number, most))


def _is_accident(error: WorkerError) -> bool:
    """Whether another try may go well: not if a worker says itself what a person has to do, or raised as it began."""
    if error.raised and error.position.step is None:
        return False
    return not isinstance(error.__cause__, ManyhandsError) or isinstance(error.__cause__, WorkerError)


def _fault_of(error: WorkerError) -> tuple[Position, str] | None:
    """Where a worker raised, and what; None if it was killed or stalled, which may be nobody's fault."""
    return (error.position._replace(words=""), error.raised) if error.raised else None


def _again(error: WorkerError, why: str, samples_of: Callable[[int, int], str]) -> WorkerError:
    """The same, with why nobody tries again, and the samples that were being computed with."""
    _, step, micro_batch = error.position
    samples = "" if step is None or micro_batch is None else samples_of(step, micro_batch)
    told = WorkerError(
        error.what,
        rank=error.rank,
        position=error.position,
        where=", ".join(filter(None, [error.where, samples])) or None,
        hint=": ".join(filter(None, ["the run is not started again", why])) if why else error.hint,
        detail=error.detail,
    )
    told.raised = error.raised
    if why and error.hint:
        told.hint = f"{told.hint}; {error.hint}"
    return told
