"""Several processes of one script share a job through its folder.

For Slurm's arrays, Kubernetes' indexed jobs, SkyPilot, or a loop in a shell. Each rank does every N-th task of a stage
and waits for the others'. A rank that has nothing left to do, and has seen nothing become done for a while, does the
tasks of those that keep it waiting, too, until they are heard of again: so it doesn't matter whether they are late,
dead or were never started.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

from manyhands.errors import DataError
from manyhands.prepare.engines.engine import JobEngine
from manyhands.prepare.task import Task, TaskResult, done_path, finished
from manyhands.storage.files import exists, names_in
from manyhands.surroundings import Rank

RANK_PATIENCE_SECONDS = 15.0

_POLL_SECONDS = 0.1


class Ranks:
    """The engine of one rank: its own tasks go to `pool`; the others' are done when their notes are there."""

    def __init__(self, rank: Rank, pool: JobEngine, patience_seconds: float = RANK_PATIENCE_SECONDS) -> None:
        self.rank, self.patience_seconds, self._pool = rank, patience_seconds, pool
        self.workers, self.memory_bytes = pool.workers, pool.memory_bytes
        self._lock = threading.Lock()
        self._mine: list[Future[TaskResult]] = []
        self._others: list[_Awaited] = []
        self._absent: set[int] = set()  # the ranks that have kept us waiting, and have not been heard of since
        self._news_at = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="manyhands-ranks", daemon=True)
        self._thread.start()

    @property
    def retries(self) -> int:
        """Of its own workers."""
        return self._pool.retries

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task of this rank, or wait for another's."""
        owner = task.partition % self.rank.of
        if owner == self.rank.number:
            future = self._pool.submit(task)
            with self._lock:
                self._mine.append(future)
            return future
        awaited = _Awaited(task, owner)
        with self._lock:
            self._others.append(awaited)
        return awaited.future

    def close(self) -> None:
        """End the workers, and wait no longer."""
        self._closing.set()
        self._thread.join()
        self._pool.close()
        for awaited in self._others:
            awaited.future.cancel()

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            with self._lock:
                self._others = [awaited for awaited in self._others if not awaited.future.done()]
                self._mine = [future for future in self._mine if not future.done()]
                others, busy = list(self._others), bool(self._mine)
            try:
                heard = self._look(others)
            except OSError:
                continue  # the storage is away for a moment
            now = time.monotonic()
            self._absent -= heard
            if busy or heard or not others:
                self._news_at = now
            elif now - self._news_at > self.patience_seconds:
                self._absent |= {awaited.owner for awaited in others}
            if not busy:
                self._help_out([awaited for awaited in others if awaited.owner in self._absent])

    def _look(self, others: list[_Awaited]) -> set[int]:
        """Take up what other ranks have done; whose tasks these were."""
        heard = set()
        there: dict[str, set[str]] = {}
        for awaited in others:
            task = awaited.task
            if task.folder not in there:
                there[task.folder] = set(names_in(task.folder))
            if done_path("", task.partition).lstrip("/") in there[task.folder] and not awaited.helped:
                result = finished(task.folder, task.stage, task.partition)
                if result is not None:
                    _settle(awaited.future, result)
                    heard.add(awaited.owner)
        if others and not exists(others[0].task.plan_path):
            gone = DataError(
                "the job's folder is gone",
                where=others[0].task.folder,
                hint="another rank has come to the end, or somebody has removed it: run again",
            )
            for awaited in others:
                with suppress(InvalidStateError):
                    awaited.future.set_exception(gone)
        return heard

    def _help_out(self, others: list[_Awaited]) -> None:
        """Do some of the others' tasks: those of the next rank first, so that two that help take different ones."""
        running = sum(awaited.helped and not awaited.future.done() for awaited in others)
        left = [awaited for awaited in others if not (awaited.helped or awaited.future.done())]
        left.sort(key=lambda awaited: (awaited.owner - self.rank.number) % self.rank.of)
        for awaited in left[: max(0, self.workers - running)]:
            awaited.helped = True
            self._pool.submit(awaited.task).add_done_callback(partial(_pass_on, awaited.future))


class _Awaited:
    """A task of another rank, its future, and whether it has been begun here."""

    def __init__(self, task: Task, owner: int) -> None:
        self.task, self.owner, self.helped = task, owner, False
        self.future: Future[TaskResult] = Future()


def _settle(future: Future[TaskResult], result: TaskResult) -> None:
    with suppress(InvalidStateError):  # both we and another rank have done it
        future.set_result(result)


def _pass_on(future: Future[TaskResult], done: Future[TaskResult]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        with suppress(InvalidStateError):
            future.set_exception(error)
    elif not done.cancelled():
        _settle(future, done.result())
