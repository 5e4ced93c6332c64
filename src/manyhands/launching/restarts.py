"""Restarts the workers of one host after a failure (`run_with_restarts`), as long as a restart can succeed.

`manyhands train` and `manyhands run` call `run_with_restarts`. All workers are restarted from the last snapshot or
checkpoint. A step depends only on the state before it, so lost steps give the same bits when they are computed again.
For the same reason, an exception that occurs twice in the same micro-batch would occur every time.

On several hosts, torch's elastic agents restart the workers instead, through the rendezvous (rendezvous.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from manyhands.errors import ManyhandsError, Position, WorkerError


@dataclass(frozen=True)
class Restart:
    """A restart that is about to happen.

    number: the number of restarts without progress, counted from 1. limit: the maximum of `number`.
    """

    cause: WorkerError
    number: int
    limit: int


def run_with_restarts(
    run: Callable[[int], None],
    *,
    saved_step: Callable[[], tuple[int, int]],
    limit: int,
    on_restart: Callable[[Restart], None],
    samples_of: Callable[[int, int], str] = lambda step, micro_batch: "",
) -> None:
    """Call `run`, which starts the workers and waits for them, again and again until it succeeds.

    run: called with the number of failures since the last progress.
    saved_step: returns the position at which the next call of `run` would continue, as (training, step). training: the
    index of the training in the script, counted from 0. step: the step of its last snapshot or checkpoint. If
    `saved_step` returns a later position than before, the run has made progress.
    limit: the maximum number of restarts without progress.
    on_restart: called before each restart.
    samples_of: called with (step, micro_batch), returns a description of the samples for the error.

    Raises the last WorkerError if the limit is exceeded or an exception has occurred twice at the same position. Errors
    that a restart cannot fix, and Interrupted, are raised immediately.
    """
    since, number = saved_step(), 0
    last_fault: tuple[Position, str] | None = None
    while True:
        try:
            return run(number)
        except WorkerError as error:
            if not _is_accident(error):
                raise
            if saved_step() > since:
                since, number, last_fault = saved_step(), 0, None
            number += 1
            fault = _fault_of(error)
            if fault is not None and fault == last_fault:
                why = "the previous attempt failed at the same position"
                raise _not_restarted(error, why, samples_of) from error.__cause__
            if number > limit:
                why = f"this is failure {number} without progress since step {since[1]}" if limit else ""
                raise _not_restarted(error, why, samples_of) from error.__cause__
            last_fault = fault
            on_restart(Restart(error, number, limit))


def _is_accident(error: WorkerError) -> bool:
    """Return False if a restart can't succeed, because the error must be fixed by a person or was raised before the
    worker's first step.
    """
    if error.raised and error.position.step is None:
        return False
    return not isinstance(error.__cause__, ManyhandsError) or isinstance(error.__cause__, WorkerError)


def _fault_of(error: WorkerError) -> tuple[Position, str] | None:
    """Return a worker's exception and its position. Return None for a kill or a stall, because these may not recur."""
    return (error.position._replace(activity=""), error.raised) if error.raised else None


def _not_restarted(error: WorkerError, why: str, samples_of: Callable[[int, int], str]) -> WorkerError:
    """Return a copy of the error that also states why the run is not restarted, and the samples of the micro-batch."""
    _, step, micro_batch = error.position
    samples = "" if step is None or micro_batch is None else samples_of(step, micro_batch)
    final = WorkerError(
        error.what,
        rank=error.rank,
        position=error.position,
        where=", ".join(filter(None, [error.where, samples])) or None,
        hint=": ".join(filter(None, ["the run is not restarted", why])) if why else error.hint,
        detail=error.detail,
    )
    final.raised = error.raised
    if why and error.hint:
        final.hint = f"{final.hint}; {error.hint}"
    return final
