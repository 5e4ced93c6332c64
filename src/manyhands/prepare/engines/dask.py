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

_NO_WORKERS_SECONDS = 120.0
"""The time without workers in the cluster after which tasks fail."""


class DaskEngine:
    """Runs tasks on a Dask cluster, one per thread of its workers.

    A task whose worker dies is retried on another worker, as often as the scheduler allows (`allowed-failures`, by
    default 3). If there are no workers for a while, tasks fail with a WorkerError. memory_bytes: the memory for all
    workers together, or None for the memory that Dask gives the workers. Raises ConfigError if no scheduler answers at
    the address, or if the scheduler has no workers.
    """

    def __init__(self, address: str, memory_bytes: int | None, default_bytes: int) -> None:
        try:
            self._client: Any = distributed.Client(address, set_as_default=False, timeout=_WAIT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise ConfigError(f"no Dask scheduler answers: {error}", where=address) from error
        self._address = address
        self.retries = 0
        self._mine: dict[str, Future[TaskResult]] = {}  # the futures of unfinished tasks, by Dask's key
        with suppress(TimeoutError):
            self._client.wait_for_workers(1, timeout=_WAIT_SECONDS)
        self._no_workers_timer: threading.Timer | None = None
        self._addresses: set[str] = set()
        self._client.subscribe_topic("all", self._on_event)
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        workers = list(known.values())
        self._addresses |= set(known)
        if not workers:
            self._client.close()
            raise ConfigError(
                "the Dask scheduler has no workers",
                where=address,
                hint=f"start a worker: dask worker {address}",
            )
        self.workers = sum(worker["nthreads"] for worker in workers)
        shares = [worker["memory_limit"] // worker["nthreads"] or default_bytes for worker in workers]
        self.memory_bytes = min(shares) if memory_bytes is None else memory_bytes // self.workers
        self._context, self._versions = ProcessContext.here(), Versions.here()

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when Dask has a free thread."""
        future: Future[TaskResult] = Future()
        try:
            theirs = self._client.submit(run_on_host, task, self._context, self._versions, pure=False)
        except Exception as error:  # the client is closed, because the scheduler has ended
            future.set_exception(self._gone(error))
            return future
        self._mine[theirs.key] = future
        theirs.add_done_callback(lambda done: self._forward_result(task, done, future))
        return future

    def close(self) -> None:
        """Leave the cluster. Tasks that still run there will complete, but their results are not used."""
        if self._no_workers_timer is not None:
            self._no_workers_timer.cancel()
        self._client.close()

    def _on_event(self, event: tuple[float, Any]) -> None:
        """Handle the scheduler's events about workers that join or leave."""
        fields = event[1] if isinstance(event[1], dict) else {}
        if fields.get("action") == "add-worker":
            self._addresses.add(fields["worker"])
            if self._no_workers_timer is not None:
                self._no_workers_timer.cancel()
                self._no_workers_timer = None
        elif fields.get("action") == "remove-worker":
            self.retries += len(self._mine.keys() & set(fields.get("processing-tasks", ())))
            self._addresses.discard(fields.get("worker", ""))
            if not self._addresses and self._no_workers_timer is None:
                self._no_workers_timer = threading.Timer(_NO_WORKERS_SECONDS, self._fail_all)
                self._no_workers_timer.daemon = True
                self._no_workers_timer.start()

    def _fail_all(self) -> None:
        self._no_workers_timer = None
        for future in list(self._mine.values()):
            with suppress(InvalidStateError):
                future.set_exception(
                    WorkerError(
                        f"Dask has had no workers for {_NO_WORKERS_SECONDS:g} s",
                        where=self._address,
                        hint="start some workers, and run again: completed tasks are not repeated",
                    )
                )

    def _forward_result(self, task: Task, done: Any, future: Future[TaskResult]) -> None:
        self._mine.pop(done.key, None)
        with suppress(InvalidStateError):  # the future has already failed
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
                f"a task crashed {error.allowed_failures + 1} of Dask's workers",
                where=f"{task.name}; the last worker: {error.last_worker.address}",
                hint="see the logs of the workers; the most frequent cause is too little memory for a worker",
            )
        return WorkerError(f"Dask could not run a task: {type(error).__name__}: {error}", where=task.name)

    def _gone(self, cause: BaseException | None) -> WorkerError:
        return WorkerError(
            "the Dask scheduler is gone",
            where=self._address,
            hint="restart it, and run again: completed tasks are not repeated",
            detail=None if cause is None else f"{type(cause).__name__}: {cause}",
        )
