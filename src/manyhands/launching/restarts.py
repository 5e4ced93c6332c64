"""To go on after a worker has failed: all are started again, from the last state that survives, as long as it helps.

A step is a function of the state before it and of nothing else. So what was lost is computed again to the same bits;
and an exception that comes again in the same micro-batch will always come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from manyhands.errors import ManyhandsError, Place, WorkerError


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
    before: tuple[Place, str] | None = None
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
    if error.raised and error.place.step is None:
        return False
    return not isinstance(error.__cause__, ManyhandsError) or isinstance(error.__cause__, WorkerError)


def _fault_of(error: WorkerError) -> tuple[Place, str] | None:
    """Where a worker raised, and what; None if it was killed or stalled, which may be nobody's fault."""
    return (error.place._replace(words=""), error.raised) if error.raised else None


def _again(error: WorkerError, why: str, samples_of: Callable[[int, int], str]) -> WorkerError:
    """The same, with why nobody tries again, and the samples that were being computed with."""
    _, step, micro_batch = error.place
    samples = "" if step is None or micro_batch is None else samples_of(step, micro_batch)
    told = WorkerError(
        error.what,
        rank=error.rank,
        place=error.place,
        where=", ".join(filter(None, [error.where, samples])) or None,
        hint=": ".join(filter(None, ["the run is not started again", why])) if why else error.hint,
        detail=error.detail,
    )
    told.raised = error.raised
    if why and error.hint:
        told.hint = f"{told.hint}; {error.hint}"
    return told
