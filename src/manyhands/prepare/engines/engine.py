"""The contract of an engine, and the engine that runs tasks in this process."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from manyhands.errors import ConfigError, DataError, WorkerError
from manyhands.prepare.task import Task, TaskResult, run_task


class JobEngine(Protocol):
    """Runs tasks in any order, on any machine that can access the files. Any object with this one method is an engine.

    An executor of `concurrent.futures` is an engine, because a task is a function without arguments. A process must run
    one task at a time, because the random numbers of a task come from the state of its process. A task may run twice,
    for example because its worker was lost. Both runs have the same result.

    An engine may have two attributes. memory_bytes: the memory that a task may use (default: the job's memory, divided
    by `workers`). retries: the number of tasks that were restarted because their worker was lost (default: 0).
    """

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when a worker is free. The future holds the task's result, the task's error or a WorkerError."""
        ...


class OwnedEngine(JobEngine, Protocol):
    """An engine that a job opens and closes."""

    @property
    def workers(self) -> int:
        """Return the number of tasks that run at the same time."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Return the memory that a task may use."""
        ...

    @property
    def retries(self) -> int:
        """Return the number of tasks that were restarted because their worker was lost."""
        ...

    def close(self) -> None:
        """End all workers and abandon unfinished tasks. `close` may be called twice."""
        ...


class GivenEngine:
    """An engine that the caller of a job passed, with defaults for missing attributes. It stays open.

    Its tasks fail with a ConfigError if it returns anything but futures of results.
    """

    def __init__(self, engine: JobEngine, workers: int, memory_bytes: int) -> None:
        self._engine = engine
        self.workers: int = getattr(engine, "workers", workers)
        self.memory_bytes: int = getattr(engine, "memory_bytes", memory_bytes)

    @property
    def retries(self) -> int:
        """Return the number of tasks that the engine has restarted, if it counts them."""
        return int(getattr(self._engine, "retries", 0))

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when a worker is free."""
        future = self._engine.submit(task)
        if not isinstance(future, Future):
            raise self._wrong(task, "the engine did not return a future", future)
        checked: Future[TaskResult] = Future()
        future.add_done_callback(lambda done: self._forward(task, done, checked))
        return checked

    def close(self) -> None:
        """Do nothing, because the engine belongs to the caller."""

    def _forward(self, task: Task, done: Future[TaskResult], checked: Future[TaskResult]) -> None:
        if done.cancelled():
            checked.set_exception(
                WorkerError("the engine cancelled a task", where=task.name, hint="run again with an open engine")
            )
            return
        error = done.exception()
        result = None if error is not None else done.result()
        if error is None and not isinstance(result, TaskResult):
            error = self._wrong(task, "the engine did not return the result of a task", result)
        if error is not None:
            checked.set_exception(error)
        else:
            checked.set_result(done.result())

    def _wrong(self, task: Task, what: str, got: object) -> ConfigError:
        return ConfigError(
            what,
            where=f"{type(self._engine).__name__}.submit, {task.name}",
            expected="a concurrent.futures.Future, whose result is that of task()",
            got=type(got).__name__,
        )


class InProcess:
    """Runs tasks in this process when they are submitted. This is for debugging, because breakpoints work."""

    workers = 1
    retries = 0

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes

    def submit(self, task: Task) -> Future[TaskResult]:
        """Run the task now."""
        future: Future[TaskResult] = Future()
        try:
            future.set_result(run_task(task))
        except Exception as error:
            future.set_exception(error)
        except SystemExit as error:  # a user's class raised it while its objects were compared or pickled
            future.set_exception(DataError(f"a task failed: {type(error).__name__}: {error}", where=task.name))
        return future

    def close(self) -> None:
        """Do nothing, because there are no workers."""
