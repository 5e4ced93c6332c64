"""The contract of an engine, and the engine that runs tasks in this process."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from manyhands.prepare.task import Task, TaskResult, run_task


class JobEngine(Protocol):
    """Runs tasks in any order, on any machine that sees the files.

    A task may run twice, for example because its worker was lost. Both runs have the same result.
    """

    @property
    def workers(self) -> int:
        """The number of tasks that run at the same time."""
        ...

    @property
    def memory_bytes(self) -> int:
        """The memory that a task may use."""
        ...

    @property
    def retries(self) -> int:
        """The number of tasks that were restarted because their worker was lost."""
        ...

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task when a worker is free. The future holds the task's result, the task's error or a WorkerError."""
        ...

    def close(self) -> None:
        """End all workers and abandon unfinished tasks. May be called twice."""
        ...


class InProcess:
    """Runs tasks in this process, when they are submitted. For debugging: breakpoints work."""

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
        return future

    def close(self) -> None:
        """Do nothing."""
