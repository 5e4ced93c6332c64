"""Makes micro-batches, in the worker or in processes that prefetch.

    task (step, micro-batch) -> positions -> sample indices -> items -> collated batch

A batch has the same bits whether the worker or a loader process makes it, because the random generators are seeded for
each task, and only one CPU thread is used.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from manyhands.config import Recipe
from manyhands.data.order import micro_batch_positions, sample_indices
from manyhands.errors import DataError, InvariantError
from manyhands.members.processes import STOPPED_SECONDS, StoppedProcesses, kill_with_parent
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.numerics.values import plain_values
from manyhands.surroundings import STOP_SIGNALS

_PER_PROCESS = 2
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
        all processes. The next stream then starts new processes. Raises InvariantError if a stream is read after it has
        ended.
        """
        self._stream += 1
        with self._watched():
            self._start(tasks)
        return self._read(self._stream)

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
                raise InvariantError(
                    "a stream of batches was read after it had ended",
                    hint="read one stream at a time: a later stream(), or close(), ends the earlier one",
                )
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
                prefetch_factor=_PER_PROCESS,
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


class LoadedBatch(NamedTuple):
    """A loaded micro-batch, with its step and index."""

    step: int
    micro_batch: int
    batch: Any


class _Failure(NamedTuple):
    """The value that a loader process sends instead of a batch that it failed to load."""

    error: DataError
    cause: Exception


class MicroBatchLoader:
    """Loads micro-batches of `recipe.data`. With `loader_workers` > 0, `stream` prefetches in that many processes.

    A batch is a pure function of (recipe, step, micro-batch), even if the data set draws random numbers from the global
    generators of Python, numpy or torch. The generators' states are restored afterwards. If the data set has
    `__getitems__`, it is called once per micro-batch. The loader owns its processes until `close()`.
    Raises DataError for empty data, and if the data set or the collate function raises.
    """

    def __init__(self, recipe: Recipe, loader_workers: int = 0) -> None:
        if len(recipe.data) < 1:
            raise DataError(
                "recipe.data is empty",
                expected="at least one sample",
                got=f"a {type(recipe.data).__name__} with len() = {len(recipe.data)}",
                hint="check the path and the filters that the data set was built with",
            )
        self._tasks = _Tasks(recipe)
        self._ahead = PrefetchProcesses(self._tasks, loader_workers) if loader_workers > 0 else None

    def load(self, step: int, micro_batch: int) -> Any:
        """Load a micro-batch in this process. Raises DataError, which names the micro-batch and its samples."""
        return self._tasks.load(step, micro_batch)

    def facts(self, step: int, micro_batch: int) -> dict[str, str]:
        """Load a micro-batch twice. Return names and hashes of its samples, and of the batch that collate made from
        them.

        The process that loads for `stream` loads it, because some data sets open files when they are first used, and
        these files must not be shared between processes. This ends a stream in progress. Raises DataError if the second
        load gave other samples or another batch. If the data set raises, the facts include the error.
        """
        if self._ahead is None:
            return self._tasks.facts(step, micro_batch)
        (loaded,) = self._unpacked(self._ahead.stream([(step, micro_batch, "facts")]), self._ahead)
        facts: dict[str, str] = loaded.batch
        return facts

    def stream(self, tasks: Iterable[tuple[int, int]]) -> Iterator[LoadedBatch]:
        """Iterate over the micro-batches of `tasks`, in order. Each task is a pair (step, micro-batch).

        Loader processes consume tasks some batches in advance. A new stream ends the previous one.
        Raises DataError as `load` does. If a loader process dies, raises DataError within seconds and ends all loader
        processes.
        """
        if self._ahead is None:
            return (LoadedBatch(step, micro_batch, self.load(step, micro_batch)) for step, micro_batch in tasks)
        return self._unpacked(self._ahead.stream(tasks), self._ahead)

    def close(self) -> None:
        """End the loader processes. `close` may be called twice."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _unpacked(self, results: Iterator[bytes], ahead: PrefetchProcesses) -> Iterator[LoadedBatch]:
        for packed in results:
            result: LoadedBatch | _Failure = ahead.unpickled(packed)
            if isinstance(result, _Failure):
                ahead.close()
                raise result.error from result.cause
            yield result


class _Tasks(Dataset[Any]):
    """The recipe's data as a map from (step, micro-batch) to a loaded batch or a failure."""

    def __init__(self, recipe: Recipe) -> None:
        self._data, self._batch, self._seed = recipe.data, recipe.batch, recipe.seed
        self._collate = recipe.collate or default_collate
        self._size = len(recipe.data)

    def load(self, step: int, micro_batch: int) -> Any:
        """Return the batch of this task. Raises DataError."""
        return self._load(step, micro_batch, lambda indices, items: None)

    def facts(self, step: int, micro_batch: int) -> dict[str, str]:
        """Do the work of `MicroBatchLoader.facts` in this process."""
        first, second = self._facts(step, micro_batch), self._facts(step, micro_batch)
        for name in [*first, *second]:
            once, again = first.get(name, "nothing"), second.get(name, "nothing")
            if once != again:
                raise DataError(
                    "a micro-batch was not the same when it was loaded again",
                    where=f"{name}; step {step}, micro-batch {micro_batch}",
                    expected=once,
                    got=again,
                    hint="let a sample depend on its index alone, and on random numbers of the global generators of"
                    " torch, numpy and Python, which are seeded for every micro-batch; don't use a generator that the"
                    " data set owns, a counter, the time, or uninitialized memory (torch.empty)",
                )
        return first

    def _facts(self, step: int, micro_batch: int) -> dict[str, str]:
        facts: dict[str, str] = {}

        def add_samples(indices: list[int], items: list[Any]) -> None:
            for index, item in zip(indices, items, strict=False):
                facts.update(plain_values(f"recipe.data[{index}]", item))

        try:
            batch = self._load(step, micro_batch, add_samples)
        except DataError as error:  # the worker that needs this micro-batch reports the error
            return {"recipe.data": str(error.what)}
        return facts | plain_values("the batch that collate returned", batch)

    def _load(self, step: int, micro_batch: int, look_at: Callable[[list[int], list[Any]], None]) -> Any:
        """Load a micro-batch, and call `look_at(indices, samples)` before the samples are collated."""
        positions = micro_batch_positions(step, micro_batch, self._batch)
        indices: list[int] = sample_indices(self._seed, self._size, positions).tolist()
        doing = "seeding"
        with preserved_generators(), _one_thread():
            seed_generators(derive(self._seed, "data", step, micro_batch))
            try:
                if hasattr(self._data, "__getitems__"):
                    doing = "recipe.data.__getitems__"
                    items = self._data.__getitems__(indices)
                else:
                    items = []
                    for index in indices:
                        doing = f"recipe.data[{index}]"
                        items.append(self._data[index])
                look_at(indices, items)
                doing = "recipe.collate" if self._collate is not default_collate else "torch's default_collate"
                return self._collate(items)
            except Exception as error:
                raise DataError(
                    f"{doing} raised {type(error).__name__}: {error}",
                    where=f"step {step}, micro-batch {micro_batch}, samples {_listed(indices)}",
                    hint=f"to reproduce the error, call {doing} yourself; the traceback is above or below this "
                    "message; "
                    f"to continue without this step: --skip-step {step} (skip_steps=[{step}])",
                ) from error

    def __getitem__(self, task: tuple[Any, ...]) -> bytes:
        """Load a micro-batch in a loader process and return the pickled LoadedBatch or _Failure.

        task: (step, micro-batch), or (step, micro-batch, "facts") for its facts instead of the batch.
        This method never raises, because torch would pass on only the text of an error. It pickles the result itself,
        because torch's queue would only print an error of pickling and drop the batch, and the reader would wait
        forever.
        """
        step, micro_batch, *asks_facts = task
        try:
            load = self.facts if asks_facts else self.load
            return _packed(LoadedBatch(step, micro_batch, load(step, micro_batch)))
        except DataError as error:
            return _packed(_failure(error))
        except Exception as error:
            unsendable = DataError(
                f"a batch can't be sent by a loader process: {type(error).__name__}: {error}",
                where=f"step {step}, micro-batch {micro_batch}",
                hint="make the data set and recipe.collate return tensors, numbers, text and containers of them, "
                "or set strategy.loader_workers = 0",
            )
            unsendable.__cause__ = error
            return _packed(_failure(unsendable))


def _packed(result: LoadedBatch | _Failure) -> bytes:
    """Pickle `result` so that its tensors stay in shared memory."""
    return bytes(ForkingPickler.dumps(result))


def _failure(error: DataError) -> _Failure:
    """Return the error and its cause, with the traceback as text, because traceback objects can't be pickled."""
    cause = error.__cause__
    error.detail = "".join(traceback.format_exception(cause)) if cause else None
    return _Failure(error, _portable(cause))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread in this block, as loader processes do, because the number of threads changes some bits."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _portable(cause: BaseException | None) -> Exception:
    """Return the error itself if it can be pickled, otherwise a RuntimeError with its text."""
    try:
        copy = pickle.loads(pickle.dumps(cause))
    except Exception:
        copy = None
    if isinstance(copy, Exception):
        return copy
    return RuntimeError(f"{type(cause).__name__}: {cause}")


def _listed(indices: list[int], most: int = 16) -> str:
    shown = ", ".join(str(index) for index in indices[:most])
    return f"[{shown}]" if len(indices) <= most else f"[{shown}, ... {len(indices) - most} more]"
