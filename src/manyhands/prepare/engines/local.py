"""A supervised pool of worker processes on this machine, kept for the next job.

The embedded engine: supervised worker processes on this machine.
A worker that is killed is replaced and its task begun again, until a task has ended three workers; one that has taken
more memory than it may is replaced after its task. Workers end with this process, however it ends, and when there has
been nothing to do for a while.

The pool of one job, kept for the next one of this process: starting workers is most of what a small job costs.

What Dask's and Ray's workers run: they hand the task to processes of our own beside them, and wait.
So a task runs as it does in the embedded pool: one at a time in a process, with the same seed of hashes, watched for
its memory, and whoever kills it is not the engine's worker.
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
from manyhands.prepare.task import Task, TaskResult
from manyhands.storage.files import exists

_STRIKES = 3

_PATIENCE_SECONDS = 5.0

_IDLE_SECONDS = 30.0


class ProcessContext(NamedTuple):
    """Where a script runs: its working directory, and where it imports from."""

    directory: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> ProcessContext:
        """This process's."""
        return cls(os.getcwd(), tuple(p or os.getcwd() for p in sys.path))


class _Job:
    """A task, its future, and how many workers it has ended."""

    def __init__(self, task: Task) -> None:
        self.task, self.strikes = task, 0
        self.future: Future[TaskResult] = Future()


class _Worker:
    """A process and the connection to it. `job`: what it does now; None also while it starts.

    plan_path: of its last task. It may serve another plan's only as long as all that it has imported is `installed`:
    a script's own modules may have changed since.
    """

    def __init__(self, place: ProcessContext) -> None:
        self.connection, theirs = Pipe()
        # Sets in users' functions are iterated in an order that depends on the seed of hashes: one seed for all.
        # Behind what this process imports from, the script's: they are the same but on another host.
        own = ProcessContext.here().path
        paths = [*own, *(path for path in place.path if path not in own)]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manyhands.prepare.engines.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd=place.directory if os.path.isdir(place.directory) else None,
            )
        finally:
            theirs.close()
        self.ready = False
        self.job: _Job | None = None
        self.plan_path: str | None = None
        self.installed = True

    @property
    def idle(self) -> bool:
        """It waits for a task."""
        return self.ready and self.job is None

    def may_serve(self, task: Task) -> bool:
        """What it has imported is what the task means."""
        return self.installed or self.plan_path == task.plan_path

    def end(self, *, at_once: bool) -> int | None:
        """Close the connection and see the process end; its exit code."""
        self.connection.close()
        if at_once:
            self.process.kill()
        try:
            return self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Pool:
    """`workers` processes that run tasks; `memory_bytes` is what each may take. Started when there is work for them.

    place: where the script runs, if this isn't its process. One thread owns the workers; `submit` and `close` may be
    called from any other.
    """

    def __init__(self, workers: int, memory_bytes: int, place: ProcessContext | None = None) -> None:
        self.workers, self.memory_bytes, self.retries = workers, memory_bytes, 0
        self._place = place or ProcessContext.here()
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._members: list[_Worker] = []
        self._closing = False
        self._false_starts = 0
        self._bell, self._ear = os.pipe()[::-1]
        self._thread = threading.Thread(target=self._supervise, name="manyhands-pool", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that have come up."""
        with self._lock:
            return [worker.process.pid for worker in self._members if worker.ready]

    @property
    def idle(self) -> bool:
        """No task is waiting or running."""
        with self._lock:
            return not self._waiting and all(worker.job is None for worker in self._members)

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task when a worker is free."""
        job = _Job(task)
        with self._lock:
            self._waiting.append(job)
        os.write(self._bell, b"!")
        return job.future

    def close(self) -> None:
        """End all workers; tasks that aren't done are given up."""
        if self._thread.is_alive():
            self._closing = True
            os.write(self._bell, b"!")
            self._thread.join()
            os.close(self._bell)
            os.close(self._ear)

    def _supervise(self) -> None:
        try:
            while not self._closing:
                self._hand_out()
                by_connection = {worker.connection: worker for worker in self._members}
                sources = wait([*by_connection, self._ear], _IDLE_SECONDS)
                if not sources and self.idle:
                    self._replace([worker for worker in self._members if worker.idle])
                for source in sources:
                    if isinstance(source, Connection):
                        self._hear(by_connection[source])
                    else:
                        os.read(self._ear, 4096)
        finally:
            for worker in self._members:
                if worker.job is not None:
                    worker.job.future.cancel()
                worker.end(at_once=worker.job is not None or not worker.ready)
            self._members = []
            for job in self._waiting:
                job.future.cancel()

    def _hand_out(self) -> None:
        """Give waiting tasks to idle workers; start as many more workers as are wanted."""
        if self._waiting:
            task = self._waiting[0].task
            self._replace([worker for worker in self._members if worker.idle and not worker.may_serve(task)])
        for worker in self._members:
            if worker.idle and self._waiting:
                with self._lock:
                    worker.job = self._waiting.popleft()
                worker.plan_path = worker.job.task.plan_path
                with suppress(OSError):  # if it has just died, its connection says so next
                    worker.connection.send_bytes(pickle.dumps(worker.job.task))
        starting = sum(not worker.ready for worker in self._members)
        while len(self._members) < self.workers and starting < len(self._waiting):
            with self._lock:
                self._members.append(_Worker(self._place))
            starting += 1

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value, rss, installed = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._lost(worker)
            return
        job, worker.job, worker.installed = worker.job, None, installed
        if kind == "ready" or job is None:
            worker.ready, self._false_starts = True, 0
        elif kind == "done":
            job.future.set_result(value)
        else:
            job.future.set_exception(value)
        if kind != "ready" and rss > self.memory_bytes:
            self._remove(worker, at_once=False)

    def _lost(self, worker: _Worker) -> None:
        job, code = worker.job, self._remove(worker, at_once=False)
        how = (
            f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"it left with code {code}"
        )
        if not worker.ready:
            self._false_starts += 1
            if self._false_starts >= _STRIKES:
                self._give_up(
                    WorkerError(f"no worker can be started: {how}", hint="its last words are above, on stderr")
                )
        if job is None:
            return
        job.strikes += 1
        if job.strikes < _STRIKES:
            self.retries += 1
            self._waiting.appendleft(job)
            return
        job.future.set_exception(
            WorkerError(
                f"a task has ended {_STRIKES} workers: {how}",
                where=job.task.name,
                hint="if the kernel killed them for want of memory (dmesg tells), give fewer workers or less memory; "
                "if a function crashes, run with workers=0 to see it in this process",
            )
        )

    def _give_up(self, error: WorkerError) -> None:
        while self._waiting:
            self._waiting.popleft().future.set_exception(error)
        self._false_starts = 0

    def _replace(self, workers: Sequence[_Worker]) -> None:
        """End idle workers; others are started when there is work for them."""
        for worker in workers:
            self._remove(worker, at_once=False)

    def _remove(self, worker: _Worker, *, at_once: bool) -> int | None:
        with self._lock:
            self._members.remove(worker)
        return worker.end(at_once=at_once)


_lock = threading.Lock()

_resting: list[tuple[_Basis, PersistentPool]] = []  # of this process: at most one, and nobody uses it


class _Basis(NamedTuple):
    """What workers have taken over from this process when they were started. A pool with another one is of no use."""

    process: int
    workers: int
    memory_bytes: int
    place: ProcessContext
    environment: dict[str, str]


class PersistentPool(Pool):
    """A pool that `close` lays aside, workers and all, if it has come to the end of its tasks."""

    def __init__(self, basis: _Basis) -> None:
        super().__init__(basis.workers, basis.memory_bytes)
        self._basis = basis

    def close(self) -> None:
        """Lay it aside for the next job; end it if tasks are still running."""
        if not self.idle:
            self.end()
            return
        with _lock:
            _resting.append((self._basis, self))
            others = [pool for _, pool in _resting[:-1]]
            del _resting[:-1]
        for pool in others:
            pool.end()

    def end(self) -> None:
        """End all workers."""
        super().close()


def persistent_pool(workers: int, memory_bytes: int) -> Pool:
    """The pool that was laid aside, if it is as wanted; or a new one."""
    basis = _Basis(os.getpid(), workers, memory_bytes, ProcessContext.here(), dict(os.environ))
    with _lock:
        found = [pool for its, pool in _resting if its == basis]
        others = [pool for its, pool in _resting if its != basis and its.process == basis.process]
        _resting.clear()
    for pool in others:
        pool.end()
    if found:
        found[0].retries = 0
        return found[0]
    atexit.unregister(close_persistent_pools)
    atexit.register(close_persistent_pools)
    return PersistentPool(basis)


def close_persistent_pools() -> None:
    """End the workers that wait for another job."""
    with _lock:
        pools = [pool for its, pool in _resting if its.process == os.getpid()]
        _resting.clear()
    for pool in pools:
        pool.end()


_MOST = 1024  # workers beside one worker of the engine, which decides how many tasks it has at once


class Versions(NamedTuple):
    """What must be the same everywhere: functions are sent as code of one Python, files written by one Arrow."""

    python: str
    manyhands: str
    pyarrow: str

    @classmethod
    def here(cls) -> Versions:
        """This process's."""
        import pyarrow as pa

        return cls(".".join(map(str, sys.version_info[:2])), __version__, str(pa.__version__))


def run_on_host(task: Task, place: ProcessContext, versions: Versions) -> TaskResult:
    """Do a task in a process beside this one. Raises what the task raises, or that this host can't do it."""
    if versions != Versions.here():
        raise ConfigError(
            "a worker has other versions than the script",
            expected=_in_words(versions),
            got=_in_words(Versions.here()),
            hint="install the same versions everywhere: the bytes of the output depend on them",
        )
    if not exists(task.plan_path):
        raise DataError(
            "a worker doesn't see the job's folder",
            where=task.plan_path,
            hint="all hosts need the output folder under the same path, on a shared disk or in a store; take() and "
            "count() work in the system's folder of temporary files: set TMPDIR to a shared one, or write()",
        )
    try:
        return _pool(place, task.memory_bytes).submit(task).result()
    except CancelledError:
        raise WorkerError("a worker was ended in the middle of a task", where=task.name) from None


@cache
def _pool(place: ProcessContext, memory_bytes: int) -> Pool:
    """One for all tasks of a script, as long as the engine's worker lives. Its processes end when they have no work."""
    return Pool(_MOST, memory_bytes, place)


def _in_words(versions: Versions) -> str:
    return f"Python {versions.python}, Manyhands {versions.manyhands}, pyarrow {versions.pyarrow}"
