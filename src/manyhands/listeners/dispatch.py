"""Calls the listeners of a run, and keeps their failures away from the training."""

from __future__ import annotations

import errno
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.errors import ConfigError
from manyhands.listeners.gaps import Gaps
from manyhands.listeners.listener import Listener, Stop, checked, name_of
from manyhands.listeners.network import InOwnThread
from manyhands.listeners.summary import Summary

END_SECONDS, END_SECONDS_AFTER_FAILURE = 10.0, 2.0
"""The time that network listeners have at the end of a run.

It is shorter after a failure, because the launcher waits to restart the run.
"""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def check_listeners(listeners: Sequence[Listener]) -> None:
    """Raise ConfigError if an object is not a listener."""
    if not isinstance(listeners, Sequence) or isinstance(listeners, str):
        raise ConfigError(
            "listeners is not a list", expected="a list of listeners: listeners=[...]", got=repr(listeners)[:80]
        )
    for listener in listeners:
        if not isinstance(listener, Listener):
            raise ConfigError(
                "an object in the list of listeners is not a listener",
                expected="objects of classes that derive from manyhands.Listener",
                got=repr(listener)[:80],
                hint="pass an object, not its class" if isinstance(listener, type) else None,
            )


class Listeners:
    """The listeners of a run on worker 0; other workers have none.

    The run's `own` listeners write the run's record, so they are called at once; several threads may call them for
    events. `deliver` calls the `given` listeners after a step's validation and checkpoint, so that these listeners
    can't delay or prevent either.

    report: called with messages for people. record: called with events to record.
    """

    def __init__(self, own: Sequence[Listener], report: Callable[[str], None], record: Callable[..., None]) -> None:
        self._report, self._record = report, record
        self._gaps = Gaps(report, lambda kind, lost: record("not recorded", kind=kind, lost=lost))
        self._own = list(own)
        self._given: list[Listener] = []
        self._waiting: deque[tuple[str, Callable[[Listener], object]]] = deque()
        self._stop: Stop | None = None

    @property
    def stop_reason(self) -> str | None:
        """Return why a listener requests to stop the run, or None."""
        stops = [self._stop, *(each.stop for each in self._given if isinstance(each, InOwnThread))]
        self._stop = next(filter(None, stops), None)
        return None if self._stop is None else self._stop.reason

    def begin(self, own: Sequence[Listener], given: Sequence[Listener], facts: Mapping[str, Any]) -> None:
        """Add listeners, and call `began` of all."""
        self._own += own
        self._given = [InOwnThread(each, self._report) if each.network else each for each in given]
        self._tell("start", lambda listener: listener.began(dict(facts)))
        self.deliver()

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Call `step` of all listeners."""
        self._tell("steps", lambda listener: listener.step(metrics, workers))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Call `evaluated` of all listeners."""
        self._tell("validations", lambda listener: listener.evaluated(evaluation))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Call `event` of all listeners. Threads may call this."""
        self._tell("events", lambda listener: listener.event(name, dict(facts)))

    def _tell(self, what: str, call: Callable[[Listener], object]) -> None:
        self._attempt_all(self._own, what, call)
        if self._given:
            self._waiting.append((what, call))

    def deliver(self) -> None:
        """Make the calls of the given listeners that are due."""
        while self._waiting:
            self._attempt_all(self._given, *self._waiting.popleft())

    def end(self, summary: Summary) -> None:
        """Call `ended` of all listeners. Those that use a network have a limited time for it."""
        ended = methodcaller("ended", summary)
        seconds = END_SECONDS_AFTER_FAILURE if summary.outcome == "failed" else END_SECONDS
        try:
            self.deliver()
            far = [each for each in self._given if isinstance(each, InOwnThread)]
            self._attempt_all(far, "end", ended)
            self._attempt_all(far, "end", partial(self._finish, time.monotonic() + seconds))
        finally:  # a second Ctrl-C ends the wait
            self._given = [each for each in self._given if not isinstance(each, InOwnThread)]
            self.deliver()
            self._attempt_all(self._given, "end", ended)
            self._attempt_all(self._own, "end", ended)
            self._own, self._given = [], []

    def _finish(self, deadline: float, listener: Listener) -> None:
        if isinstance(listener, InOwnThread) and (unsent := listener.finish(deadline)):
            self._record("not sent", listener=name_of(listener.listener), **unsent)

    def _attempt_all(self, listeners: list[Any], what: str, call: Callable[[Listener], object]) -> None:
        """Call each listener. One that raises an exception is removed from the list, unless its disk is full."""
        for listener in tuple(listeners):
            is_far = isinstance(listener, InOwnThread)
            who = name_of(listener.listener if is_far else listener)
            kind = f"{what} by {who}"
            try:
                answer = checked(call(listener))
            except (Exception, SystemExit) as error:
                if isinstance(error, OSError) and error.errno in _FULL_DISK and not is_far:
                    self._gaps.failed(kind, error)
                    continue
                if listener in listeners:  # the report below may have removed it already
                    listeners.remove(listener)
                why = described(error)
                self._report(f"the listener {who} failed, and the run continues without it: {why}")
                self._record("listener failed", listener=who, why=why)
                continue
            self._gaps.succeeded(kind)
            self._stop = self._stop or answer


def described(error: BaseException) -> str:
    """Return the last line of the error's traceback, and the place where it was raised."""
    text = str(error).strip().partition("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
