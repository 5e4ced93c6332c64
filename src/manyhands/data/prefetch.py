"""Processes that evaluate a map-style data set ahead of its reader."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from manyhands.errors import ConfigError, DataError
from manyhands.members.processes import STOPPED_SECONDS, StoppedProcesses, kill_with_parent
from manyhands.surroundings import STOP_SIGNALS

PER_PROCESS = 2
"""The number of results that each process prefetches."""

_CHECK_SECONDS = 1.0  # between two checks for stopped processes

_END = object()


class PrefetchProcesses:
    """A set of `num_processes` processes that evaluate `dataset[task]` ahead of the reader, in the order of the tasks.

    Wraps torch's DataLoader and adds two guarantees. If a process dies, the reader gets a DataError within seconds. The
    error names the process. Changes to global state (signal handlers, generators) are undone. The first `stream` starts
    the processes. They run until `close` or an error.
    """

    def __init__(self, dataset: Dataset[Any], num_processes: int) -> None:
        self._dataset, self._num_processes = dataset, num_processes
        self._source = _Source()
        self._loader: DataLoader[Any] | None = None
        self._processes: list[BaseProcess] = []
        self._stopped: set[int] = set()  # pids of the processes that were killed because they were stopped
        self._results: Iterator[Any] | None = None
        self._stream = 0

    def stream(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Iterate over `dataset[task]` for every task, in order. A new stream ends the previous one.

        Takes each task from `tasks` some time before its result is read. If a process dies, raises DataError and ends
        all processes. The next stream then starts new processes. Raises ConfigError if a stream is read after it has
        ended.
        """
        self._stream += 1
        with self._watched():
            self._start(tasks)
        return self._read(self._stream)

    @property
    def is_streaming(self) -> bool:
        """Return True if the processes run, and have not been closed since the last stream began."""
        return self._results is not None

    def unpickled(self, packed: bytes) -> Any:
        """Return the object that a process pickled. The process must still run, to pass on the memory of tensors.

        Raises DataError if the process has died.
        """
        with self._watched():
            return ForkingPickler.loads(packed)

    def close(self) -> None:
        """End the processes. `close` may be called twice."""
        self._results = self._loader = None  # torch's DataLoader ends its processes once nothing refers to it
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []

    def _read(self, stream: int) -> Iterator[Any]:
        while True:
            if stream != self._stream or self._results is None:
                raise ended_stream()
            with self._watched():
                result = next(self._results, _END)
            if result is _END:
                return
            yield result

    def _start(self, tasks: Iterable[Any]) -> None:
        """Give `tasks` to the processes. Start the processes in the first call."""
        self._source.tasks = tasks
        if self._loader is not None:
            self._results = iter(self._loader)
            return
        others = set(multiprocessing.active_children())
        # The kernel kills a loader process when the thread that started it ends. Only the main thread is certain to
        # outlive the loader.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        if not sys.platform.startswith("linux"):
            get_temp_dir()  # one folder for all processes, which the worker deletes
        with _child_signal(None), warnings.catch_warnings():
            # Python 3.12 and later warn about fork in a process with threads, but without fork the data set must be
            # picklable. torch warns about more processes than cores, but the user chose the number, and the processes
            # may be waiting for I/O.
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._source,
                num_workers=self._num_processes,
                collate_fn=_unchanged,
                worker_init_fn=partial(_prepare_process, parent),
                prefetch_factor=PER_PROCESS,
                persistent_workers=True,
                generator=torch.Generator(),  # otherwise the base seed is drawn from the global generator
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
            self._results = iter(self._loader)
        self._processes = sorted(set(multiprocessing.active_children()) - others, key=lambda process: process.pid or 0)
        watch = partial(_kill_stopped, weakref.ref(self), self._processes)
        threading.Thread(target=watch, name="manyhands-loader", daemon=True).start()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Raise DataError immediately if a process dies in this block. End all processes after any error.

        [Note: the child signal] torch's DataLoader installs a permanent SIGCHLD handler, which raises wherever the main
        thread is, even in the middle of a step. This class handles SIGCHLD only while it waits. At other times, the
        next wait detects that a process has died. Outside of the main thread, torch's check every 5 s ends the wait.
        """

        def on_child(*_: object) -> None:
            if died := self._died():
                raise died

        try:
            with _child_signal(on_child):
                on_child()
                yield
        except BaseException as error:
            if isinstance(error, (OSError, EOFError)):  # a connection broke, but its process may not have ended yet
                connection.wait([process.sentinel for process in self._processes], timeout=1)
            died = self._died() if isinstance(error, (RuntimeError, OSError, EOFError)) else None
            # torch ends the processes only when it frees its iterator, but the traceback refers to the iterator.
            for process in self._processes:
                process.kill()
            self.close()
            if died:
                raise died from error
            raise

    def _died(self) -> DataError | None:
        """Return the error to raise if a loader process has died."""
        for process in self._processes:
            if not process.is_alive():
                return DataError(
                    f"loader process {process.pid} died: {_describe_exit(process.exitcode)}"
                    + (f", because it was stopped for {STOPPED_SECONDS:g} s" if process.pid in self._stopped else ""),
                    where=f"one of this worker's {len(self._processes)} loader processes (strategy.loader_workers)",
                    hint=_hint_for_exit(process.exitcode),
                )
        return None


def ended_stream() -> ConfigError:
    """Return the error for a stream that is read although a later one has begun."""
    return ConfigError(
        "a stream of batches was read after it had ended",
        hint="read one stream at a time: a later stream(), or close(), ends the earlier one",
    )


def _kill_stopped(reader: weakref.ref[PrefetchProcesses], processes: list[BaseProcess]) -> None:
    """Kill loader processes that are stopped, because the reader would wait for them forever. Return when they end."""
    stopped = StoppedProcesses()
    while (owner := reader()) is not None and owner._processes is processes:
        for pid in stopped.find(process.pid for process in processes if process.pid is not None):
            owner._stopped.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        del owner
        time.sleep(_CHECK_SECONDS)


class _Source:
    """The tasks of the current stream, as a torch sampler."""

    def __init__(self) -> None:
        self.tasks: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


def _unchanged(batch: Any) -> Any:
    """Return the batch.

    This replaces torch's default, which would convert numpy arrays to tensors in loader processes only.
    """
    return batch


def _use_abstract_sockets() -> None:
    """In a new loader process, let multiprocessing use sockets without names in the file system (Linux).

    multiprocessing sends the descriptors of tensors through a socket in a folder /tmp/pymp-..., which a killed process
    would leave. A name that starts with a zero byte is no file, and ends with the process. Clients must know the
    process's random key.
    """
    module: Any = connection
    original = module.arbitrary_address

    def arbitrary_address(family: str) -> Any:
        is_unix = family == "AF_UNIX"
        return f"\0manyhands-{os.getpid()}-{secrets.token_hex(8)}" if is_unix else original(family)

    module.arbitrary_address = arbitrary_address


def _prepare_process(parent: int | None, _: int) -> None:
    """In a new loader process, ignore stop signals, which the worker handles.

    A terminal sends Ctrl-C, and a scheduler its signals, to all processes. `PrefetchProcesses.close` kills the process.
    parent: the pid of the worker; the kernel ends this process when the worker ends. If parent is None, torch ends this
    process, but only seconds later, or after a call that holds Python's lock.
    """
    if parent is not None:
        kill_with_parent(parent)
    if sys.platform.startswith("linux"):
        _use_abstract_sockets()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _child_signal(handler: Callable[..., None] | None) -> Iterator[None]:
    """Install `handler` for SIGCHLD in this block, and then restore the previous handler. None changes nothing."""
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


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"it exited with code {code}"


def _hint_for_exit(code: int | None) -> str:
    if code == -signal.SIGBUS:
        return "the host's shared memory is probably full: enlarge /dev/shm, or set strategy.loader_workers = 0"
    if code == -signal.SIGKILL:
        return "the host may be out of memory (see dmesg): use fewer loader_workers, or 0 to load in the worker itself"
    return "set strategy.loader_workers = 0 to load in the worker itself, which then shows the error"
