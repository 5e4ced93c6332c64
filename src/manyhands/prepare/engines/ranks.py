"""Lets several processes of one script share a job through its folder.

This engine is for Slurm arrays, indexed Kubernetes jobs, SkyPilot, or a loop in a shell. Each rank runs every N-th task
of a stage and waits for the other ranks. If a rank has completed its own tasks, and no other rank has completed a task
for a while, it also runs the tasks of the ranks that it waits for, until those ranks complete tasks again. So the job
completes even if some ranks are late, have died or were never started.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

from manyhands.errors import DataError
from manyhands.prepare.engines.engine import OwnedEngine
from manyhands.prepare.task import Task, TaskResult, done_path, finished
from manyhands.storage.files import exists, names_in
from manyhands.surroundings import Rank

RANK_PATIENCE_SECONDS = 15.0

_POLL_SECONDS = 0.1


class Ranks:
    """The engine of one rank. `pool` runs its own tasks. Tasks of other ranks complete when their done notes exist."""

    def __init__(self, rank: Rank, pool: OwnedEngine, patience_seconds: float = RANK_PATIENCE_SECONDS) -> None:
        self.rank, self.patience_seconds, self._pool = rank, patience_seconds, pool
        self.workers, self.memory_bytes = pool.workers, pool.memory_bytes
        self._lock = threading.Lock()
        self._mine: list[Future[TaskResult]] = []
        self._others: list[_ForeignTask] = []
        self._absent: set[int] = set()  # the ranks that were late and have not completed a task since then
        self._progress_at = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="manyhands-ranks", daemon=True)
        self._thread.start()

    @property
    def retries(self) -> int:
        """Return the number of retried tasks of this rank's own workers."""
        return self._pool.retries

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task of this rank, or wait for a task of another rank."""
        owner = task.partition % self.rank.of
        if owner == self.rank.number:
            future = self._pool.submit(task)
            with self._lock:
                self._mine.append(future)
            return future
        foreign = _ForeignTask(task, owner)
        with self._lock:
            self._others.append(foreign)
        return foreign.future

    def close(self) -> None:
        """End the workers, and stop waiting for other ranks."""
        self._closing.set()
        self._thread.join()
        self._pool.close()
        for foreign in self._others:
            foreign.future.cancel()

    def _watch(self) -> None:
        pause_seconds = _POLL_SECONDS
        while not self._closing.wait(pause_seconds):
            started = time.monotonic()
            self._poll()
            # Checking 50,000 tasks takes a long time. Without longer pauses, this process would spend most time on
            # checks.
            pause_seconds = max(_POLL_SECONDS, 4 * (time.monotonic() - started))

    def _poll(self) -> None:
        with self._lock:
            self._others = [foreign for foreign in self._others if not foreign.future.done()]
            self._mine = [future for future in self._mine if not future.done()]
            others, busy = list(self._others), bool(self._mine)
        try:
            active = self._collect(others)
        except OSError:
            return  # the storage is temporarily unavailable
        now = time.monotonic()
        self._absent -= active
        if busy or active or not others:
            self._progress_at = now
        elif now - self._progress_at > self.patience_seconds:
            self._absent |= {foreign.owner for foreign in others}
        if not busy:
            self._help_out([foreign for foreign in others if foreign.owner in self._absent])

    def _collect(self, others: list[_ForeignTask]) -> set[int]:
        """Collect the results that other ranks have published. Return the ranks that completed tasks."""
        active = set()
        files: dict[str, set[str]] = {}
        for foreign in others:
            task = foreign.task
            if task.folder not in files:
                files[task.folder] = set(names_in(task.folder))
            if done_path("", task.partition).lstrip("/") in files[task.folder] and not foreign.helped:
                result = finished(task.folder, task.stage, task.partition)
                if result is not None:
                    _settle(foreign.future, result)
                    active.add(foreign.owner)
        if others and not exists(others[0].task.plan_path):
            gone = DataError(
                "the job's folder is gone",
                where=others[0].task.folder,
                hint="another rank has completed the job, or the folder was removed: run again",
            )
            for foreign in others:
                with suppress(InvalidStateError):
                    foreign.future.set_exception(gone)
        return active

    def _help_out(self, others: list[_ForeignTask]) -> None:
        """Run some tasks of other ranks, beginning with the next rank, so that two helping ranks choose different
        tasks.
        """
        running = sum(foreign.helped and not foreign.future.done() for foreign in others)
        pending = [foreign for foreign in others if not (foreign.helped or foreign.future.done())]
        pending.sort(key=lambda foreign: (foreign.owner - self.rank.number) % self.rank.of)
        for foreign in pending[: max(0, self.workers - running)]:
            foreign.helped = True
            self._pool.submit(foreign.task).add_done_callback(partial(_forward_result, foreign.future))


class _ForeignTask:
    """A task of another rank, with its future. helped: True if this rank has started it."""

    def __init__(self, task: Task, owner: int) -> None:
        self.task, self.owner, self.helped = task, owner, False
        self.future: Future[TaskResult] = Future()


def _settle(future: Future[TaskResult], result: TaskResult) -> None:
    with suppress(InvalidStateError):  # this rank and another rank have both completed the task
        future.set_result(result)


def _forward_result(future: Future[TaskResult], done: Future[TaskResult]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        with suppress(InvalidStateError):
            future.set_exception(error)
    elif not done.cancelled():
        _settle(future, done.result())
