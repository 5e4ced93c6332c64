"""Ray as an engine.

store: data and state stay in files.
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

_RETRIES = 2  # of a task whose worker or host died

_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)


class RayEngine:
    """Runs tasks on Ray, one a CPU; a task whose worker or host dies is begun again elsewhere, twice.

    address: ray://head:10001, through Ray's client; None for the cluster that this process is connected to, that Ray
    finds here, or one that is started here and ended with the engine. memory_bytes: for all workers together; without
    it, each has its CPU's part of what Ray gives tasks. Raises ConfigError if nobody answers at the address.
    """

    def __init__(self, address: str | None, memory_bytes: int | None, default_bytes: int) -> None:
        self._began = not ray.is_initialized()
        self._address = address or "ray"
        if self._began:
            try:
                ray.init(
                    address or _address_here(), logging_level="warning", log_to_driver=False, include_dashboard=False
                )
            except (OSError, RuntimeError, ValueError) as error:  # OSError: ConnectionError is one
                raise ConfigError(f"no Ray cluster answers: {error}", where=self._address) from error
        there = ray.cluster_resources()
        self.workers = max(1, int(there.get("CPU", 1)))
        share = int(there.get("memory", default_bytes * self.workers)) // self.workers
        self.memory_bytes = share if memory_bytes is None else memory_bytes // self.workers
        self.retries = 0
        self._run: Any = ray.remote(num_cpus=1, max_retries=0)(run_on_host)  # Ray wouldn't tell how often it tried
        self._facts = ray.put(ProcessContext.here()), ray.put(Versions.here())

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task when Ray has a free CPU."""
        future: Future[TaskResult] = Future()
        self._begin(task, future, _RETRIES)
        return future

    def close(self) -> None:
        """Leave the cluster; end it, if it was started here."""
        if self._began and ray.is_initialized():
            ray.shutdown()

    def _begin(self, task: Task, future: Future[TaskResult], tries_left: int) -> None:
        try:
            theirs = self._run.remote(task, *self._facts).future()
        except Exception as error:  # the cluster is gone
            what = f"Ray could not run a task: {type(error).__name__}: {error}"
            future.set_exception(WorkerError(what, where=task.name))
            return
        theirs.add_done_callback(lambda done: self._pass_on(task, done, future, tries_left))

    def _pass_on(self, task: Task, done: Future[TaskResult], future: Future[TaskResult], tries_left: int) -> None:
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
            # Not in this thread, which is Ray's own and may not wait for Ray.
            threading.Thread(target=self._begin, args=(task, future, tries_left - 1), daemon=True).start()
        elif isinstance(error, _LOST):
            future.set_exception(
                WorkerError(
                    f"a task has ended {_RETRIES + 1} of Ray's workers: {str(error).splitlines()[0]}",
                    where=task.name,
                    hint="Ray's logs say why; too little memory for a worker is the most frequent reason",
                )
            )
        else:
            what = f"Ray could not run a task: {type(error).__name__}: {error}"
            future.set_exception(WorkerError(what, where=task.name))


def _address_here() -> str | None:
    """None, as which Ray looks for a cluster itself; "local" for one of our own, if the one that it remembers on this
    host is gone: Ray would wait for that for long, and give up."""
    remembered = find_bootstrap_address(None)
    if os.environ.get("RAY_ADDRESS") or not remembered:
        return None
    host, _, port = remembered.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, ValueError):
        return "local"
    return None
