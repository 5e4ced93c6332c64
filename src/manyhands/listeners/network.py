"""Calls a listener that uses a network in a thread of its own, so that it never delays a step."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.listener import Listener, Stop, checked, name_of
from manyhands.listeners.summary import Summary

MOST_CALLS = 4096
"""Figures of steps are dropped while the queue holds at least this many calls."""

SLOW_SECONDS = 60.0
"""A call that takes more seconds than this is reported."""


class _Call(NamedTuple):
    kind: str
    call: Callable[[], Stop | None]


class InOwnThread(Listener):
    """A listener whose methods put calls of another listener's methods into the queue of a thread.

    A method raises the exception of an earlier call. report: called with messages for people. stop: the listener's
    request to stop the run, if there is one.
    """

    def __init__(self, listener: Listener, report: Callable[[str], None]) -> None:
        self.listener, self._report = listener, report
        self._calls: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._current: _Call | None = None
        self._current_since = 0.0
        self._is_over = self._is_abandoned = False
        self._dropped: Counter[str] = Counter()
        self._failure: BaseException | None = None
        self.stop: Stop | None = None
        self._reported_slow = False
        # A daemon thread, because the process must end even if the listener hangs.
        self._thread = threading.Thread(target=self._work, name=f"manyhands-{name_of(listener)}", daemon=True)

    def began(self, facts: Mapping[str, Any]) -> None:
        """Start the thread."""
        self._put("start", lambda: self.listener.began(facts))
        self._thread.start()

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Put the call into the queue, or drop it if the queue is full."""
        self._report_slow_call()
        if len(self._calls) >= MOST_CALLS:
            if not self._dropped["steps"]:
                self._report(f"the listener {name_of(self.listener)} is too slow: figures of steps are dropped")
            self._dropped["steps"] += 1
        else:
            self._put("steps", lambda: self.listener.step(metrics, workers))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Put the call into the queue."""
        self._put("validations", lambda: self.listener.evaluated(evaluation))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Put the call into the queue."""
        self._put("events", lambda: self.listener.event(name, facts))

    def ended(self, summary: Summary) -> None:
        """Put the last call into the queue."""
        self._put("end", lambda: self.listener.ended(summary))
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def finish(self, deadline: float) -> dict[str, int]:
        """Wait until the queue is empty or the deadline has passed. Report and return what was not sent, by kind."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._failure is not None or (self._current is None and not self._calls),
                max(0.0, deadline - time.monotonic()),
            )
            self._is_abandoned = True  # a call that hangs may return later
            left = [*([] if done or self._current is None else [self._current]), *self._calls]
            unsent = Counter(each.kind for each in left) + self._dropped
        self._raise_failure()
        if unsent:
            what = ", ".join(
                f"the {kind} of the run"
                if kind in ("start", "end")
                else f"{count:,} {kind if count > 1 else kind[:-1]}"
                for kind, count in unsent.items()
            )
            self._report(f"the listener {name_of(self.listener)} has not sent: {what}")
        return dict(unsent)

    def _put(self, kind: str, call: Callable[[], Stop | None]) -> None:
        self._raise_failure()
        with self._changed:
            self._calls.append(_Call(kind, call))
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _report_slow_call(self) -> None:
        current, seconds = self._current, time.monotonic() - self._current_since
        if current is not None and seconds > SLOW_SECONDS and not self._reported_slow:
            self._reported_slow = True
            self._report(
                f"the listener {name_of(self.listener)} has been in one call for {seconds:.0f} s; the run continues"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._calls or self._is_over)
                if not self._calls or self._is_abandoned:
                    return
                self._current, self._current_since = self._calls.popleft(), time.monotonic()
            try:
                answer = checked(self._current.call())
            except BaseException as error:  # the main thread reports it
                with self._changed:
                    self._failure, self._current = error, None
                    self._changed.notify_all()
                return
            self.stop = self.stop or answer
