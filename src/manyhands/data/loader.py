"""Makes micro-batches, in the worker or in processes that prefetch.

Processes that read data ahead of a worker, and what is done when one of them dies.

Makes micro-batches out of a recipe's data, in the worker itself or in processes that read ahead of it.
    task (step, micro-batch) -> positions -> sample indices -> items -> collated batch

Whoever does it, the batch has the same bits: the generators are seeded for the task, and one CPU thread is used.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from manyhands.config import Recipe
from manyhands.data.order import micro_batch_positions, sample_indices
from manyhands.errors import DataError, InvariantError
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import preserved_generators, seed_generators

_PER_PROCESS = 2  # results that each process keeps ready

_END = object()


class PrefetchProcesses:
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


class LoadedBatch(NamedTuple):
    """One micro-batch, and which one it is."""

    step: int
    micro_batch: int
    batch: Any


class _Failure(NamedTuple):
    """What a loader process sends instead of a batch that it couldn't make."""

    error: DataError
    cause: Exception


class MicroBatchLoader:
    """Loads micro-batches of `recipe.data`; with `loader_workers` > 0, `stream` reads ahead in as many processes.

    Deterministic: a batch is a pure function of (recipe, step, micro-batch), also if the data set augments at random
    with Python's, numpy's or torch's global generators; these are left as they were found.
    A data set with `__getitems__` is asked for a micro-batch's samples at once. Owns its processes until `close()`.
    Raises DataError for empty data, and whenever the data set or the collate function raises.
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
        """This micro-batch, made here and now. Raises DataError, naming the micro-batch and its samples."""
        return self._tasks.load(step, micro_batch)

    def stream(self, tasks: Iterable[tuple[int, int]]) -> Iterator[LoadedBatch]:
        """The micro-batches of `tasks`, each a (step, micro-batch), in that order.

        Loader processes take tasks some batches in advance. A new stream ends the one before it.
        Raises DataError like `load`, and if a loader process dies: within seconds, and the processes are gone then.
        """
        if self._ahead is None:
            return (LoadedBatch(step, micro_batch, self.load(step, micro_batch)) for step, micro_batch in tasks)
        return self._unpacked(self._ahead.stream(tasks), self._ahead)

    def close(self) -> None:
        """End the loader processes, if there are any. May be called twice."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _unpacked(self, results: Iterator[bytes], ahead: PrefetchProcesses) -> Iterator[LoadedBatch]:
        for packed in results:
            result: LoadedBatch | _Failure = ForkingPickler.loads(packed)
            if isinstance(result, _Failure):
                ahead.close()
                raise result.error from result.cause
            yield result


class _Tasks(Dataset[Any]):
    """The recipe's data as a map from (step, micro-batch) to a loaded batch, or to what went wrong."""

    def __init__(self, recipe: Recipe) -> None:
        self._data, self._batch, self._seed = recipe.data, recipe.batch, recipe.seed
        self._collate = recipe.collate or default_collate
        self._size = len(recipe.data)

    def load(self, step: int, micro_batch: int) -> Any:
        """The batch of this task. Raises DataError."""
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
                doing = "recipe.collate" if self._collate is not default_collate else "torch's default_collate"
                return self._collate(items)
            except Exception as error:
                raise DataError(
                    f"{doing} raised {type(error).__name__}: {error}",
                    where=f"step {step}, micro-batch {micro_batch}, samples {_listed(indices)}",
                    hint=f"call {doing} by hand to see it alone; the error's own traceback is above or below",
                ) from error

    def __getitem__(self, task: tuple[int, int]) -> bytes:
        """As `load`, in a loader process: the pickled LoadedBatch or _Failure.

        Nothing is raised, because torch would pass on only the error's text. Pickled here, because the queue would
        print the error of a batch that can't be pickled and drop the batch, and its reader would wait for ever.
        """
        step, micro_batch = task
        try:
            return _packed(LoadedBatch(step, micro_batch, self.load(step, micro_batch)))
        except DataError as error:
            return _packed(_failure(error))
        except Exception as error:
            mended = DataError(
                f"a batch can't be sent by a loader process: {type(error).__name__}: {error}",
                where=f"step {step}, micro-batch {micro_batch}",
                hint="make the data set and recipe.collate return tensors, numbers, text and containers of them, "
                "or set strategy.loader_workers = 0",
            )
            mended.__cause__ = error
            return _packed(_failure(mended))


def _packed(result: LoadedBatch | _Failure) -> bytes:
    """Pickled so that tensors stay in shared memory."""
    return bytes(ForkingPickler.dumps(result))


def _failure(error: DataError) -> _Failure:
    """The error and its cause, with the traceback in words: a traceback itself doesn't cross processes."""
    cause = error.__cause__
    error.detail = "".join(traceback.format_exception(cause)) if cause else None
    return _Failure(error, _portable(cause))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: their number changes the bits of some operations, and loader processes can't have more."""
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
    """The error itself if it survives pickling, else its text in a RuntimeError."""
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
