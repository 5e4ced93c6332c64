"""Processes that read data ahead of a worker, and what is done when one of them dies."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from manyhands.errors import DataError, InvariantError

_PER_PROCESS = 2  # results that each process keeps ready
_END = object()


class ReadAhead:
    """`num_processes` processes that evaluate `dataset[task]` ahead of the reader, in the order of the tasks.

    torch's DataLoader does the work. Here is what it lacks: a process that dies ends the wait within seconds with a
    DataError that names it, and nothing global (signal handlers, generators) is left changed. The processes are
    started by the first `stream`, which sets them to work at once, and kept until `close` or until something goes
    wrong.
    """

    def __init__(self, dataset: Dataset[Any], num_processes: int) -> None:
        self._dataset, self._num_processes = dataset, num_processes
        self._source = _Source()
        self._loader: DataLoader[Any] | None = None
        self._processes: list[BaseProcess] = []
        self._results: Iterator[Any] | None = None
        self._stream = 0

    def stream(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """`dataset[task]` for every task. Tasks are taken some results in advance; a new stream ends the older one.

        Raises DataError if a process dies (all are gone then; a new stream starts new ones), InvariantError if a
        stream is read that has ended.
        """
        self._stream += 1
        with self._watched():
            self._begin(tasks)
        return self._read(self._stream)

    def close(self) -> None:
        """End the processes, if there are any. May be called twice."""
        self._results = self._loader = None  # without references, torch's DataLoader ends its processes
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []

    def _read(self, stream: int) -> Iterator[Any]:
        while True:
            if stream != self._stream or self._results is None:
                raise InvariantError(
                    "a stream of batches was read after it had ended",
                    hint="read one stream at a time: a later stream(), or close(), ends the earlier one",
                )
            with self._watched():
                result = next(self._results, _END)
            if result is _END:
                return
            yield result

    def _begin(self, tasks: Iterable[Any]) -> None:
        """Hand `tasks` to the processes, which are started the first time."""
        self._source.tasks = tasks
        if self._loader is not None:
            self._results = iter(self._loader)
            return
        others = set(multiprocessing.active_children())
        get_temp_dir()  # the processes share ours, removed when we exit; else one that is killed leaves its own in /tmp
        with _child_signal(None), warnings.catch_warnings():
            # Python 3.12 and later warn of fork in a process with threads, but only fork can hand on any data set.
            # torch warns of more processes than cores; their number was chosen by name, and they may well be waiting.
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._source,
                num_workers=self._num_processes,
                collate_fn=_as_it_is,
                worker_init_fn=_prepare_process,
                prefetch_factor=_PER_PROCESS,
                persistent_workers=True,
                generator=torch.Generator(),  # or else it draws its base seed from the global one
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
            self._results = iter(self._loader)
        self._processes = sorted(set(multiprocessing.active_children()) - others, key=lambda process: process.pid or 0)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """In here the death of a process raises DataError at once, and whatever is raised ends all processes.

        [Note: the child signal] torch's DataLoader installs a handler for good that raises wherever the main thread
        is, in the middle of a step, say. Ours is there only while we wait; elsewhere deaths are noticed at the
        next wait. In other threads than the main one, torch's check every 5 s is what ends the waiting.
        """

        def on_child(*_: object) -> None:
            if died := self._died():
                raise died

        try:
            with _child_signal(on_child):
                on_child()
                yield
        except BaseException as error:
            died = self._died() if isinstance(error, RuntimeError) else None
            for process in self._processes:  # the traceback holds what torch would have to let go of to end them
                process.kill()
            self.close()
            if died:
                raise died from error
            raise

    def _died(self) -> DataError | None:
        """What to say if a loader process is no longer there."""
        for process in self._processes:
            if not process.is_alive():
                return DataError(
                    f"loader process {process.pid} died: {_exit_in_words(process.exitcode)}",
                    where=f"{len(self._processes)} loader processes of this worker (strategy.loader_workers)",
                    hint=_hint_for_exit(process.exitcode),
                )
        return None


class _Source:
    """The tasks of the current stream, in the shape of a torch sampler."""

    def __init__(self) -> None:
        self.tasks: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


def _as_it_is(batch: Any) -> Any:
    """torch's default would make tensors of numpy arrays: then a batch would depend on who loads it."""
    return batch


def _prepare_process(_: int) -> None:
    """In a new loader process: Ctrl-C, which a terminal sends to everyone, is for the worker to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _child_signal(handler: Callable[..., None] | None) -> Iterator[None]:
    """Inside, SIGCHLD is answered by `handler` (None: as before); afterwards as before, whatever was done inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _exit_in_words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"it left with exit code {code}"


def _hint_for_exit(code: int | None) -> str:
    if code == -signal.SIGBUS:
        return "the host's shared memory is probably full: enlarge /dev/shm, or set strategy.loader_workers = 0"
    if code == -signal.SIGKILL:
        return "the host may be out of memory (see dmesg): use fewer loader_workers, or 0 to load in the worker itself"
    return "set strategy.loader_workers = 0 to load in the worker itself and see what the data set does there"
