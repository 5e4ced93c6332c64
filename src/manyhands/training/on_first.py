"""Calls that only the first worker makes, and that may take minutes, such as those of an object store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError, DataError, Interrupted, ManyhandsError, NumericsError

MAX_PAUSE_SECONDS = 0.5
"""The longest pause between two exchanges of workers that wait."""

_ERRORS: dict[str, type[ManyhandsError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError, Interrupted, NumericsError)
}


class FirstWorker:
    """Makes calls on the first worker of a group, in a thread of their own, while all workers wait together.

    Waiting workers exchange messages, so that none of them seems to have stalled. stop: returns True if this worker
    was requested to stop.
    """

    def __init__(self, group: Group, stop: Callable[[], bool]) -> None:
        self._group, self._stop = group, stop
        self.is_stopping = False  # True once any worker was requested to stop; threads may read it
        is_first = group.rank == 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="manyhands-store") if is_first else None
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="manyhands-upload") if is_first else None

    def start(self, work: Callable[[], Any], *, uploads: bool = False) -> Future[Any] | None:
        """Start a call on the first worker, and return without waiting. Calls are made one after the other.

        uploads: make the call beside the others, after earlier ones of its kind.
        """
        pool = self._uploader if uploads else self._pool
        return None if pool is None else pool.submit(work)

    def call(self, work: Callable[[], Any], tag: str) -> Any:
        """Make a call on the first worker, and return its value, which must be a JSON value, on all workers.
        Collective.

        Raises the call's ManyhandsError on all workers, and Interrupted if a worker was requested to stop.
        """
        return self.result(self.start(work), tag)

    def result(self, future: Future[Any] | None, tag: str) -> Any:
        """Wait for a call that was started, as `call` does. Collective."""
        pause = 0.001
        while True:
            mine: list[Any] = [None, self._stop()]
            if future is not None and wait([future], timeout=pause).done:
                mine[0] = _outcome(future)
            pause = min(MAX_PAUSE_SECONDS, 2 * pause)
            all_ranks: list[Any] = all_gather_json(self._group, mine, f"{tag} / control")
            self.is_stopping = self.is_stopping or any(stops for _, stops in all_ranks)
            outcome = all_ranks[0][0]
            if outcome is not None:
                return _value_of(outcome, future)
            if self.is_stopping:
                raise Interrupted(
                    f"stopped while waiting: {tag}",
                    where="the states of this cluster's islands are in its run directory",
                    hint="to continue, start the run again with the same run directory",
                )

    def close(self) -> None:
        """Wait for the calls in progress. Calls that have not begun are not made."""
        self.is_stopping = True
        for pool in filter(None, (self._pool, self._uploader)):
            pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Any]) -> list[Any]:
    error = future.exception()
    if error is None:
        return ["value", future.result()]
    if isinstance(error, ManyhandsError) and type(error).__name__ in _ERRORS:
        return [type(error).__name__, error.what, error.where, error.expected, error.got, error.hint]
    return ["ConfigError", f"{type(error).__name__}: {error}", None, None, None, None]


def _value_of(outcome: list[Any], future: Future[Any] | None) -> Any:
    if outcome[0] == "value":
        return outcome[1]
    if future is not None and (error := future.exception()) is not None:
        raise error
    kind, what, where, expected, got, hint = outcome
    raise _ERRORS[kind](what, where=where, expected=expected, got=got, hint=hint)
