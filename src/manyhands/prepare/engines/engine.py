"""The contract of an engine, and the engine that runs tasks in this process."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from manyhands.prepare.task import Task, TaskResult, run_task


class JobEngine(Protocol):
    """Runs tasks, in any order, at any place that sees the files.

    A task may run twice (after its worker was lost, say): the second result is the first one's.
    """

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    @property
    def memory_bytes(self) -> int:
        """How much memory a task may take."""
        ...

    @property
    def retries(self) -> int:
        """How many tasks were begun again because their worker was lost."""
        ...

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task when there is a free worker. The future has its result, or what it raised, or a WorkerError."""
        ...

    def close(self) -> None:
        """End all workers. Tasks that aren't done are given up. May be called twice."""
        ...


class InProcess:
    """No workers: tasks run in this process, when they are submitted. For debugging: breakpoints work."""

    workers = 1
    retries = 0

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes

    def submit(self, task: Task) -> Future[TaskResult]:
        """Do the task now."""
        future: Future[TaskResult] = Future()
        try:
            future.set_result(run_task(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to end."""
