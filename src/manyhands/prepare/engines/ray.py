"""Ray as an engine.

Ray only schedules tasks. Its object store is not used, because data and state stay in files.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future
from typing import Any

import ray
from ray._private.services import find_bootstrap_address

from manyhands.errors import ConfigError, ManyhandsError, WorkerError
from manyhands.prepare.engines.local import ProcessContext, Versions, run_on_host
from manyhands.prepare.task import Task, TaskResult

_REACH_SECONDS = 2.0

_RETRIES = 2
"""The number of times that a task is retried after its worker or host has died."""

_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)


class RayEngine:
    """Runs tasks on Ray, one per CPU. A task whose worker or host dies is retried twice.

    address: an address for Ray's client, such as ray://head:10001. If it is None, the engine uses the cluster to which
    this process is connected, or else a cluster that Ray finds on this host, or else a new cluster, which ends with the
    engine.
    memory_bytes: the memory for all workers together. If it is None, each CPU gets an equal part of the memory that Ray
    gives tasks. Raises ConfigError if no cluster answers at the address.
    """

    def __init__(self, address: str | None, memory_bytes: int | None, default_bytes: int) -> None:
        self._owns_connection = not ray.is_initialized()
        self._address = address or "ray"
        if self._owns_connection:
            try:
                ray.init(
                    address or _local_address(), logging_level="warning", log_to_driver=False, include_dashboard=False
                )
            except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
                raise ConfigError(f"no Ray cluster answers: {error}", where=self._address) from error
        resources = ray.cluster_resources()
        self.workers = max(1, int(resources.get("CPU", 1)))
        share = int(resources.get("memory", default_bytes * self.workers)) // self.workers
        self.memory_bytes = share if memory_bytes is None else memory_bytes // self.workers
        self.retries = 0
        # Ray must not retry, because it does not report retries. `_forward_result` retries and counts.
        self._run: Any = ray.remote(num_cpus=1, max_retries=0)(run_on_host)
        self._arguments = ray.put(ProcessContext.here()), ray.put(Versions.here())

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when Ray has a free CPU."""
        future: Future[TaskResult] = Future()
        self._start(task, future, _RETRIES)
        return future

    def close(self) -> None:
        """Leave the cluster. End it if this engine has started it."""
        if self._owns_connection and ray.is_initialized():
            ray.shutdown()

    def _start(self, task: Task, future: Future[TaskResult], tries_left: int) -> None:
        try:
            theirs = self._run.remote(task, *self._arguments).future()
        except Exception as error:  # the cluster has ended
            what = f"Ray could not run a task: {type(error).__name__}: {error}"
            future.set_exception(WorkerError(what, where=task.name))
            return
        theirs.add_done_callback(lambda done: self._forward_result(task, done, future, tries_left))

    def _forward_result(
        self, task: Task, done: Future[TaskResult], future: Future[TaskResult], tries_left: int
    ) -> None:
        if done.cancelled():
            future.cancel()
            return
        error = done.exception()
        if error is None:
            future.set_result(done.result())
            return
        cause = getattr(error, "cause", None)
        if isinstance(cause, ManyhandsError):
            future.set_exception(cause)
        elif isinstance(error, _LOST) and tries_left:
            self.retries += 1
            # Use a new thread: the current thread belongs to Ray, and must not wait for Ray.
            threading.Thread(target=self._start, args=(task, future, tries_left - 1), daemon=True).start()
        elif isinstance(error, _LOST):
            future.set_exception(
                WorkerError(
                    f"a task crashed {_RETRIES + 1} of Ray's workers: {str(error).splitlines()[0]}",
                    where=task.name,
                    hint="see Ray's logs; the most frequent cause is too little memory for a worker",
                )
            )
        else:
            what = f"Ray could not run a task: {type(error).__name__}: {error}"
            future.set_exception(WorkerError(what, where=task.name))


def _local_address() -> str | None:
    """Return None to let Ray look for a cluster, or "local" to start one if the cluster that Ray remembers is gone.

    Without "local", Ray would wait a long time for the remembered cluster, and then fail.
    """
    remembered = find_bootstrap_address(None)
    if os.environ.get("RAY_ADDRESS") or not remembered:
        return None
    host, _, port = remembered.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, ValueError):
        return "local"
    return None
