"""Dask as an engine."""

from __future__ import annotations

import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import distributed

from manyhands.errors import ConfigError, ManyhandsError, WorkerError
from manyhands.prepare.engines.local import ProcessContext, Versions, run_on_host
from manyhands.prepare.task import Task, TaskResult

_WAIT_SECONDS = 30

_PATIENCE_SECONDS = 120.0  # with no workers at all


class DaskEngine:
    """Runs tasks on a Dask cluster, one a thread of its workers.

    A task whose worker dies is begun again elsewhere, as often as the scheduler allows (`allowed-failures`, 3). If
    there have been no workers for a while, tasks end with a WorkerError.
    memory_bytes: for all workers together; without it, each has what Dask gives it. Raises ConfigError if nobody
    answers at the address, or there are no workers.
    """

    def __init__(self, address: str, memory_bytes: int | None, default_bytes: int) -> None:
        try:
            self._client: Any = distributed.Client(address, set_as_default=False, timeout=_WAIT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise ConfigError(f"no Dask scheduler answers: {error}", where=address) from error
        self._address = address
        self.retries = 0
        self._mine: dict[str, Future[TaskResult]] = {}  # by Dask's key: tasks that aren't done
        with suppress(TimeoutError):
            self._client.wait_for_workers(1, timeout=_WAIT_SECONDS)
        self._alone: threading.Timer | None = None
        self._addresses: set[str] = set()
        self._client.subscribe_topic("all", self._hear)
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        workers = list(known.values())
        self._addresses |= set(known)
        if not workers:
            self._client.close()
            raise ConfigError(
                "the Dask scheduler has no workers",
                where=address,
                hint=f"start some: dask worker {address}",
            )
        self.workers = sum(worker["nthreads"] for worker in workers)
        shares = [worker["memory_limit"] // worker["nthreads"] or default_bytes for worker in workers]
        self.memory_bytes = min(shares) if memory_bytes is None else memory_bytes // self.workers
        self._place, self._versions = ProcessContext.here(), Versions.here()

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task when Dask has a free thread."""
        future: Future[TaskResult] = Future()
        try:
            theirs = self._client.submit(run_on_host, task, self._place, self._versions, pure=False)
        except Exception as error:  # the client was closed, because the scheduler is gone
            future.set_exception(self._gone(error))
            return future
        self._mine[theirs.key] = future
        theirs.add_done_callback(lambda done: self._pass_on(task, done, future))
        return future

    def close(self) -> None:
        """Leave the cluster. Tasks that run there come to their end, and change nothing."""
        if self._alone is not None:
            self._alone.cancel()
        self._client.close()

    def _hear(self, event: tuple[float, Any]) -> None:
        """Of workers that come and go, as the scheduler tells."""
        said = event[1] if isinstance(event[1], dict) else {}
        if said.get("action") == "add-worker":
            self._addresses.add(said["worker"])
            if self._alone is not None:
                self._alone.cancel()
                self._alone = None
        elif said.get("action") == "remove-worker":
            self.retries += len(self._mine.keys() & set(said.get("processing-tasks", ())))
            self._addresses.discard(said.get("worker", ""))
            if not self._addresses and self._alone is None:
                self._alone = threading.Timer(_PATIENCE_SECONDS, self._give_up)
                self._alone.daemon = True
                self._alone.start()

    def _give_up(self) -> None:
        self._alone = None
        for future in list(self._mine.values()):
            with suppress(InvalidStateError):
                future.set_exception(
                    WorkerError(
                        f"Dask has had no workers for {_PATIENCE_SECONDS:g} s",
                        where=self._address,
                        hint="start some, and run again: what is done stays done",
                    )
                )

    def _pass_on(self, task: Task, done: Any, future: Future[TaskResult]) -> None:
        self._mine.pop(done.key, None)
        with suppress(InvalidStateError):  # it was given up
            self._settle(task, done, future)

    def _settle(self, task: Task, done: Any, future: Future[TaskResult]) -> None:
        if done.status != "finished":
            future.set_exception(self._error_of(task, done))
            return
        try:
            future.set_result(done.result())
        except Exception as error:
            future.set_exception(self._gone(error))

    def _error_of(self, task: Task, done: Any) -> BaseException:
        if done.status != "error":
            return self._gone(None)
        error: BaseException = done.exception()
        if isinstance(error, ManyhandsError):
            return error
        if isinstance(error, distributed.KilledWorker):
            return WorkerError(
                f"a task has ended {error.allowed_failures + 1} of Dask's workers",
                where=f"{task.name}; the last one: {error.last_worker.address}",
                hint="their logs say why; too little memory for a worker is the most frequent reason",
            )
        return WorkerError(f"Dask could not run a task: {type(error).__name__}: {error}", where=task.name)

    def _gone(self, cause: BaseException | None) -> WorkerError:
        return WorkerError(
            "the Dask scheduler is gone",
            where=self._address,
            hint="start it again, and run again: what is done stays done",
            detail=None if cause is None else f"{type(cause).__name__}: {cause}",
        )
