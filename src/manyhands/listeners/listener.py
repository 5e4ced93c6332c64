"""Listener: the base class of objects that receive the figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.summary import Summary


@dataclass(frozen=True)
class Stop:
    """A listener's request to stop the run. reason: a sentence for people."""

    reason: str


def stop(reason: str) -> Stop:
    """Return the value with which a listener's `step` or `evaluated` requests to stop the run.

    The run makes the step that follows, writes a checkpoint and ends with `Interrupted` on all workers, as after
    Ctrl-C. `reason` is a part of the error's message and of the event "stopped".
    """
    return Stop(str(reason))


class Listener:
    """Receives the figures of a run. Derive a class from it, and pass objects of the class to `mh.train(listeners=)`.

    All methods do nothing by default. They are called on worker 0 only, and must not make collective calls. A new
    object opens no file and no connection before `began`. No result depends on a listener: one that raises an exception
    is reported once and gets no further call. If a local listener fails because a disk is full, it stays.

    network: True if calls may take long, because they use a network. Such a listener is called in a thread of its own,
    behind a bounded queue. If the queue is full, figures of steps are dropped and counted, but never an evaluation or
    an event. At the end of the run, the calls in the queue have a limited time; then the run reports what was not sent.
    """

    network: bool = False

    def began(self, facts: Mapping[str, Any]) -> None:
        """Receive the facts of a run that starts or continues, before its first step.

        facts: JSON values. "name"; "run_dir", the absolute path, or None; "step", the number of steps made before;
        "steps", the number at the end of the run; "source", from where the run continues ("checkpoint" or "snapshot"),
        or None; "workers", "sharding", "transport", "precision", "parameters"; "recipe", the recipe as recorded in the
        run directory; "host".
        """

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> Stop | None:
        """Receive the metrics of a completed step. Return `mh.stop(reason)` to stop the run, or None.

        metrics.step: the number of the step, counted from 1. workers: what each worker
        measured in the step before, by rank; empty after the first step.
        """

    def evaluated(self, evaluation: Evaluation) -> Stop | None:
        """Receive the figures of a validation, after the call of `step` for the same step.

        Return the same values as `step`.
        """

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Receive an event, such as "saved" or "skipped", with the facts that events.jsonl has."""

    def ended(self, summary: Summary) -> None:
        """Receive the summary at the end of the run; `summary.outcome` is "completed", "interrupted" or "failed"."""


def checked(answer: object) -> Stop | None:
    """Return what a listener's method returned. Raises TypeError for values other than None and `mh.stop(reason)`."""
    if answer is None or isinstance(answer, Stop):
        return answer
    raise TypeError(f"a listener returned {answer!r}, but only None and mh.stop(reason) are allowed")


def name_of(listener: Listener) -> str:
    """Return the name of a listener for people."""
    return type(listener).__qualname__.rpartition("<locals>.")[2]
