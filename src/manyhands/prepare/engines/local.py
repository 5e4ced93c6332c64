"""A supervised pool of worker processes on this machine, which the next job reuses.

A worker that is killed, or stopped (SIGSTOP) for some seconds, is replaced and its task is retried. A task that
crashes three workers fails. A worker that has exceeded its memory limit is replaced after its task. Workers end after
some idle time, or when this process ends for any reason.

A `PersistentPool` remains for the next job of this process, because starting workers takes most of the time of a small
job.

Dask and Ray workers call `run_on_host`, which passes the task to such a pool on their host and waits. So tasks run on
that host as they do on this machine: one at a time in a process, with the same hash seed and a memory limit. A task
that crashes does not crash the Dask or Ray worker.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from manyhands import __version__
from manyhands.errors import ConfigError, DataError, WorkerError
from manyhands.members.processes import StoppedProcesses
from manyhands.prepare.task import Task, TaskResult
from manyhands.storage.files import exists

_MAX_CRASHES = 3
"""The number of crashed workers after which a task fails."""

_EXIT_SECONDS = 5.0
"""The time that a worker has to exit before it is killed."""

_IDLE_SECONDS = 30.0

_CHECK_SECONDS = 1.0  # between two checks for stopped workers

_SHORT_SECONDS = 0.02
"""A worker whose last task was shorter than this gets the next task before it has completed the current task."""


class ProcessContext(NamedTuple):
    """The working directory and the import path of a script."""

    directory: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> ProcessContext:
        """Return the context of this process."""
        return cls(os.getcwd(), tuple(p or os.getcwd() for p in sys.path))


class _Job:
    """A task, its future, and the number of workers that it has crashed."""

    def __init__(self, task: Task) -> None:
        self.task, self.crashes = task, 0
        self.future: Future[TaskResult] = Future()


class _Worker:
    """A worker process and the connection to it.

    jobs: its current task, and the next task if it has already been sent. The list is empty while the worker is idle or
    starting. hasty: True if its last task was short. plan_path: the plan of its last task. installed: True while all
    modules that the worker has imported belong to installed packages. Otherwise the worker may not run tasks of another
    plan, because the script's own modules may have changed.
    """

    def __init__(self, context: ProcessContext) -> None:
        self.connection, theirs = Pipe()
        # The order of sets in users' functions depends on the hash seed, so all workers have the same seed.
        # The import path of this process comes first, then the script's path. The paths differ only on another host.
        own = ProcessContext.here().path
        paths = [*own, *(path for path in context.path if path not in own)]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manyhands.prepare.engines.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd=context.directory if os.path.isdir(context.directory) else None,
            )
        finally:
            theirs.close()
        self.ready = False
        self.jobs: deque[_Job] = deque()
        self.hasty = False
        self.plan_path: str | None = None
        self.installed = True

    @property
    def idle(self) -> bool:
        """Return True if the worker waits for a task."""
        return self.ready and not self.jobs

    def may_serve(self, task: Task) -> bool:
        """Return True if the worker may run the task: its imported modules are installed, or its last task had the same
        plan.
        """
        return self.installed or self.plan_path == task.plan_path

    def may_take_ahead(self, task: Task) -> bool:
        """Return True if the task may be sent to the worker before it has completed its current task."""
        return self.hasty and len(self.jobs) == 1 and self.plan_path == task.plan_path

    def send(self, task: Task) -> None:
        """Send a task to the worker.

        If the worker has just died, the pool detects this when it waits for the answer.
        """
        self.plan_path = task.plan_path
        with suppress(OSError):
            self.connection.send_bytes(pickle.dumps(task))

    def end(self, *, at_once: bool) -> int | None:
        """Close the connection, wait for the process to exit, and return its exit code."""
        self.connection.close()
        if at_once:
            self.process.kill()
        try:
            return self.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Pool:
    """Up to `workers` processes that run tasks and are started on demand. `memory_bytes` is the limit of each process.

    context: the context of the script, if the script runs in another process. One thread owns the workers. `submit` and
    `close` may be called from any thread.
    """

    def __init__(self, workers: int, memory_bytes: int, context: ProcessContext | None = None) -> None:
        self.workers, self.memory_bytes, self.retries = workers, memory_bytes, 0
        self._context = context or ProcessContext.here()
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._members: list[_Worker] = []
        self._closing = False
        self._failed_starts = 0
        self._stopped = StoppedProcesses()
        self._wake_up, self._woken = os.pipe()[::-1]  # this pipe wakes the supervising thread
        self._thread = threading.Thread(target=self._supervise, name="manyhands-pool", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the workers that have started."""
        with self._lock:
            return [worker.process.pid for worker in self._members if worker.ready]

    @property
    def idle(self) -> bool:
        """Return True if no task is waiting or running."""
        with self._lock:
            return not self._waiting and not any(worker.jobs for worker in self._members)

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when a worker is free."""
        job = _Job(task)
        with self._lock:
            self._waiting.append(job)
        os.write(self._wake_up, b"!")
        return job.future

    def close(self) -> None:
        """End all workers and abandon unfinished tasks."""
        if self._thread.is_alive():
            self._closing = True
            os.write(self._wake_up, b"!")
            self._thread.join()
            os.close(self._wake_up)
            os.close(self._woken)

    def _supervise(self) -> None:
        try:
            while not self._closing:
                self._assign_tasks()
                by_connection = {worker.connection: worker for worker in self._members}
                is_idle = self.idle
                sources = wait([*by_connection, self._woken], _IDLE_SECONDS if is_idle else _CHECK_SECONDS)
                if not sources and is_idle:
                    self._replace([worker for worker in self._members if worker.idle])
                self._kill_stopped()
                for source in sources:
                    if isinstance(source, Connection):
                        self._receive(by_connection[source])
                    else:
                        os.read(self._woken, 4096)
        finally:
            for worker in self._members:
                for job in worker.jobs:
                    job.future.cancel()
                worker.end(at_once=bool(worker.jobs) or not worker.ready)
            self._members = []
            for job in self._waiting:
                job.future.cancel()

    def _kill_stopped(self) -> None:
        """Kill workers that are stopped. The closed connection then reports that they are lost."""
        busy = {worker.process.pid: worker for worker in self._members if not worker.idle}
        for pid in self._stopped.find(busy):
            busy[pid].process.kill()

    def _assign_tasks(self) -> None:
        """Give waiting tasks to idle workers, and start workers for the remaining tasks."""
        if self._waiting:
            task = self._waiting[0].task
            self._replace([worker for worker in self._members if worker.idle and not worker.may_serve(task)])
        for worker in self._members:
            if worker.idle and self._waiting:
                self._start_next(worker)
        for worker in self._members:
            # The last tasks are not sent in advance, so that each of them is sent to the first worker that becomes
            # idle.
            if len(self._waiting) > self.workers and worker.may_take_ahead(self._waiting[0].task):
                self._start_next(worker)
        starting = sum(not worker.ready for worker in self._members)
        while len(self._members) < self.workers and starting < len(self._waiting):
            with self._lock:
                self._members.append(_Worker(self._context))
            starting += 1

    def _start_next(self, worker: _Worker) -> None:
        # Move the task under the lock, because the pool would seem idle if the task were in neither place.
        with self._lock:
            job = self._waiting.popleft()
            worker.jobs.append(job)
        worker.send(job.task)

    def _receive(self, worker: _Worker) -> None:
        try:
            kind, value, rss, installed = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._lost(worker)
            return
        worker.installed = installed
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
            return
        job = worker.jobs.popleft()
        worker.hasty = kind == "done" and value.seconds < _SHORT_SECONDS
        if kind == "done":
            job.future.set_result(value)
        else:
            job.future.set_exception(value)
        if rss > self.memory_bytes:
            self._waiting.extendleft(reversed(worker.jobs))
            self._remove(worker, at_once=False)

    def _lost(self, worker: _Worker) -> None:
        job = worker.jobs.popleft() if worker.jobs else None
        self._waiting.extendleft(reversed(worker.jobs))  # the worker had not started these tasks
        code = self._remove(worker, at_once=False)
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with code {code}"
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_CRASHES:
                self._fail_waiting(
                    WorkerError(f"no worker can be started: {how}", hint="the worker's error is above, on stderr")
                )
        if job is None:
            return
        job.crashes += 1
        if job.crashes < _MAX_CRASHES:
            self.retries += 1
            self._waiting.appendleft(job)
            return
        job.future.set_exception(
            WorkerError(
                f"a task crashed {_MAX_CRASHES} workers: {how}",
                where=job.task.name,
                hint="if the kernel killed them because memory ran out (see dmesg), use fewer workers or less memory; "
                "if a function crashes, run with workers=0 to see the crash in this process",
            )
        )

    def _fail_waiting(self, error: WorkerError) -> None:
        while self._waiting:
            self._waiting.popleft().future.set_exception(error)
        self._failed_starts = 0

    def _replace(self, workers: Sequence[_Worker]) -> None:
        """End idle workers. New workers are started on demand."""
        for worker in workers:
            self._remove(worker, at_once=False)

    def _remove(self, worker: _Worker, *, at_once: bool) -> int | None:
        with self._lock:
            self._members.remove(worker)
        return worker.end(at_once=at_once)


_lock = threading.Lock()

_idle_pools: list[tuple[_Basis, PersistentPool]] = []  # a process stores at most one pool


class _Basis(NamedTuple):
    """The state that workers inherit from this process when they start. A pool with another basis can't be reused."""

    process: int
    workers: int
    memory_bytes: int
    context: ProcessContext
    environment: dict[str, str]


class PersistentPool(Pool):
    """A pool that remains for the next job. `close` stores it with its workers if all tasks are complete."""

    def __init__(self, basis: _Basis) -> None:
        super().__init__(basis.workers, basis.memory_bytes)
        self._basis = basis

    def close(self) -> None:
        """Store the pool for the next job, or end it if tasks are still running."""
        if not self.idle:
            self.end()
            return
        with _lock:
            _idle_pools.append((self._basis, self))
            others = [pool for _, pool in _idle_pools[:-1]]
            del _idle_pools[:-1]
        for pool in others:
            pool.end()

    def end(self) -> None:
        """End all workers."""
        super().close()


def persistent_pool(workers: int, memory_bytes: int) -> Pool:
    """Return the stored pool if it has the same basis, and otherwise a new pool."""
    basis = _Basis(os.getpid(), workers, memory_bytes, ProcessContext.here(), dict(os.environ))
    with _lock:
        found = [pool for its, pool in _idle_pools if its == basis]
        others = [pool for its, pool in _idle_pools if its != basis and its.process == basis.process]
        _idle_pools.clear()
    for pool in others:
        pool.end()
    if found:
        found[0].retries = 0
        return found[0]
    atexit.unregister(close_persistent_pools)
    atexit.register(close_persistent_pools)
    return PersistentPool(basis)


def close_persistent_pools() -> None:
    """End the workers of stored pools."""
    with _lock:
        pools = [pool for its, pool in _idle_pools if its.process == os.getpid()]
        _idle_pools.clear()
    for pool in pools:
        pool.end()


_NO_LIMIT = 1024
"""The maximum number of workers of a pool for Dask or Ray.

Dask and Ray limit the number of tasks that run at a time.
"""


class Versions(NamedTuple):
    """Versions that must be equal on all hosts, because functions are sent as Python bytecode, and Arrow writes the
    files.
    """

    python: str
    manyhands: str
    pyarrow: str

    @classmethod
    def here(cls) -> Versions:
        """Return the versions that this process runs."""
        import pyarrow as pa

        return cls(".".join(map(str, sys.version_info[:2])), __version__, str(pa.__version__))


def run_on_host(task: Task, context: ProcessContext, versions: Versions) -> TaskResult:
    """Run a task in a worker process on this host.

    Raises the error that the task raises, and ConfigError or DataError if this host can't run the task.
    """
    if versions != Versions.here():
        raise ConfigError(
            "a worker has different versions than the script",
            expected=_describe(versions),
            got=_describe(Versions.here()),
            hint="install the same versions on all hosts, because the bytes of the output depend on them",
        )
    if not exists(task.plan_path):
        raise DataError(
            "a worker doesn't see the job's folder",
            where=task.plan_path,
            hint="use an output folder with the same path on all hosts, on a shared disk or in a store; take() and "
            "count() use the system's temporary folder: set TMPDIR to a shared folder, or use write()",
        )
    try:
        return _pool(context, task.memory_bytes).submit(task).result()
    except CancelledError:
        raise WorkerError("a worker was stopped during a task", where=task.name) from None


@cache
def _pool(context: ProcessContext, memory_bytes: int) -> Pool:
    """Return the pool for all tasks of a script in this Dask or Ray worker. Its processes end when they are idle."""
    return Pool(_NO_LIMIT, memory_bytes, context)


def _describe(versions: Versions) -> str:
    return f"Python {versions.python}, Manyhands {versions.manyhands}, pyarrow {versions.pyarrow}"
