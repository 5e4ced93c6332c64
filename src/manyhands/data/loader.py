"""Makes micro-batches, in the worker or in processes that prefetch.

    task (step index, micro-batch) -> sample indices -> items -> collated batch

A batch has the same bits whether the worker or a loader process makes it, because the random generators are seeded for
each task, and only one CPU thread is used. Indices of steps are counted from 0.
"""

from __future__ import annotations

import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate

from manyhands.config import Recipe
from manyhands.data.prefetch import PER_PROCESS, PrefetchProcesses, ended_stream
from manyhands.data.samples import HeldOutSamples, Samples
from manyhands.data.stream_part import StreamError
from manyhands.data.stream_samples import StreamLog, StreamMarks, StreamPosition, StreamSamples, training_samples
from manyhands.errors import DataError
from manyhands.numerics.alignment import ALIGNMENT
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.numerics.values import plain_values

DEFAULT_COLLATE = "torch's default_collate"

TRAINING = ""
"""The name of the recipe's own data among the sets from which a loader loads."""


class LoadedBatch(NamedTuple):
    """A loaded micro-batch, with the index of its step and its own index.

    marks: positions in a stream from which reading can continue.
    """

    step_index: int
    micro_batch: int
    batch: Any
    marks: StreamMarks | None = None


class _Failure(NamedTuple):
    """The value that a loader process sends instead of a batch that it failed to load."""

    error: DataError
    cause: Exception


class MicroBatchLoader:
    """Loads micro-batches of `recipe.data`, and of its validation data.

    With `loader_workers` > 0, `stream` prefetches in that many processes. A batch is a pure function of (recipe, set,
    step index, micro-batch), even if the data set draws random numbers from the global generators of Python, numpy or
    torch.
    The generators' states are restored afterwards. If the data set has `__getitems__`, it is called once per
    micro-batch. The loader owns its processes until `close()`.

    held_out: the data of validations, by name. Raises DataError for empty data, and if the data set or the collate
    function raises.
    """

    def __init__(self, recipe: Recipe, loader_workers: int = 0) -> None:
        self.held_out = {name: HeldOutSamples(name, each, recipe) for name, each in recipe.validations.items()}
        training = training_samples(recipe)
        self._stream = training if isinstance(training, StreamSamples) else None
        self._log = StreamLog(self._stream) if self._stream is not None else None
        self._tasks = _Tasks({TRAINING: training, **self.held_out})
        self._ahead = PrefetchProcesses(self._tasks, loader_workers) if loader_workers > 0 else None
        self._window = PER_PROCESS * loader_workers  # the largest number of tasks that are read ahead
        self._number = 0  # of the stream in progress
        self._issued: _Issued | None = None  # the tasks of the stream of training data in progress
        self._results: Iterator[bytes] = iter(())
        self._held: dict[tuple[int, int], bytes] = {}  # training batches that were loaded ahead, by task

    def load(self, step_index: int, micro_batch: int) -> Any:
        """Load a micro-batch in this process. Raises DataError, which names the micro-batch and its samples."""
        loaded = self._tasks.loaded(TRAINING, step_index, micro_batch)
        self._add_marks(loaded)
        return loaded.batch

    def position(self) -> dict[str, Any]:
        """Return the position from which reading of the stream can continue after the batches that this object has
        returned, as JSON values. It is empty for map-style data.
        """
        return {} if self._log is None else self._log.position().as_json()

    def restore(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the positions that the workers of an earlier run returned. Raises CheckpointError.

        positions: none for a checkpoint without positions. The stream is then read from its beginning.
        """
        if self._stream is None or self._log is None:
            return
        position = StreamPosition.merged([StreamPosition.from_json(each, self._stream.parts) for each in positions])
        if self._ahead is not None:
            self._ahead.close()  # new processes get the position when they are forked
            self._issued, self._held = None, {}
        self._stream.restore(position)
        self._log.restore(position)

    def _add_marks(self, loaded: LoadedBatch) -> None:
        if self._log is not None and loaded.marks is not None:
            self._log.add(loaded.marks)

    def facts(self, step_index: int, micro_batch: int, of: str = TRAINING) -> dict[str, str]:
        """Load a micro-batch twice. Return names and hashes of its samples, and of the batch that collate made from
        them.

        The process that loads for `stream` loads it, because some data sets open files when they are first used, and
        these files must not be shared between processes. This ends a stream in progress. Raises DataError if the second
        load gave other samples or another batch. If the data set raises, the facts include the error.
        """
        if self._ahead is None:
            return self._tasks.facts(of, step_index, micro_batch)
        self._hold(self._ahead)
        (loaded,) = self._unpacked(self._ahead.stream([(of, step_index, micro_batch, "facts")]), self._ahead)
        facts: dict[str, str] = loaded.batch
        return facts

    def stream(self, tasks: Iterable[tuple[int, int]], of: str = TRAINING) -> Iterator[LoadedBatch]:
        """Iterate over the micro-batches of `tasks`, in order. Each task is a pair (step index, micro-batch).

        of: the name of the set; the micro-batches of a validation have step index 0. Loader processes consume
        tasks some batches in advance. A new stream ends the previous one. Raises DataError as `load` does. If a loader
        process dies, raises DataError within seconds and ends all loader processes.
        """
        if self._ahead is None:
            return self._loaded((of, step_index, micro_batch) for step_index, micro_batch in tasks)
        self._hold(self._ahead)
        if of != TRAINING:
            return self._unpacked(self._ahead.stream((of, *task) for task in tasks), self._ahead)
        found, rest = self._loaded_ahead(iter(tasks))
        results = self._held_results(found)
        if len(found) <= self._window:
            return self._unpacked(chain(results, self._read_ahead(self._ahead, rest)), self._ahead)
        # Validations follow each other closely. Begin to read ahead when the kept batches are used up.
        later = chain.from_iterable(self._read_ahead(ahead, rest) for ahead in [self._ahead])
        return self._unpacked(chain(results, later), self._ahead)

    def _read_ahead(self, ahead: PrefetchProcesses, tasks: Iterator[tuple[int, int]]) -> Iterator[bytes]:
        self._issued = _Issued(tasks, self._window)
        self._results = ahead.stream(self._issued)
        return self._results

    def _hold(self, ahead: PrefetchProcesses) -> None:
        """End the stream of training data, if any. Keep the batches that it has loaded ahead for the next one.

        Otherwise, each validation would cause them to be loaded again, and a stream of samples to go back.
        """
        if self._issued is not None:
            issued, self._issued = self._issued, None
            issued.is_open = False
            loaded = list(self._results) if ahead.is_streaming else []
            if not ahead.is_streaming:  # a process has died, and with it the memory of the batches
                self._held = {}
            self._held.update(zip(list(issued.last)[len(issued.last) - len(loaded) :], loaded, strict=True))
        if not ahead.is_streaming and self._stream is not None and self._log is not None:
            self._stream.restore(self._log.position())  # new processes read on from here, not from the first sample

    def _loaded_ahead(
        self, tasks: Iterator[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], Iterator[tuple[int, int]]]:
        """Divide tasks into the first ones, whose batches were kept, and the rest. Drop the other batches."""
        found = []
        for task in tasks:
            if task not in self._held:
                tasks = chain([task], tasks)
                break
            found.append(task)
        self._held = {task: self._held[task] for task in found}
        return found, tasks

    def _held_results(self, tasks: list[tuple[int, int]]) -> Iterator[bytes]:
        return (self._held.pop(task) for task in tasks)

    def close(self) -> None:
        """End the loader processes. `close` may be called twice."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _loaded(self, tasks: Iterable[tuple[str, int, int]]) -> Iterator[LoadedBatch]:
        for task in tasks:
            loaded = self._tasks.loaded(*task)
            self._add_marks(loaded)
            yield loaded

    def _unpacked(self, results: Iterator[bytes], ahead: PrefetchProcesses) -> Iterator[LoadedBatch]:
        self._number += 1
        return self._unpacked_in(self._number, results, ahead)

    def _unpacked_in(self, stream: int, results: Iterator[bytes], ahead: PrefetchProcesses) -> Iterator[LoadedBatch]:
        while stream == self._number:
            packed = next(results, None)
            if packed is None:
                return
            result: LoadedBatch | _Failure = ahead.unpickled(packed)
            if isinstance(result, _Failure):
                ahead.close()
                raise result.error from result.cause
            self._add_marks(result)
            yield result
        raise ended_stream()


class _Issued:
    """The tasks of a stream of training data, as loader processes take them. It ends when `is_open` is False.

    last: the last tasks that were taken, among them all whose batches have not been read.
    """

    def __init__(self, tasks: Iterator[tuple[int, int]], window: int) -> None:
        self._tasks, self.is_open = tasks, True
        self.last: deque[tuple[int, int]] = deque(maxlen=window)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        while self.is_open and (task := next(self._tasks, None)) is not None:
            self.last.append(task)
            yield TRAINING, *task


class _Tasks(Dataset[Any]):
    """A map from (name of a set, step index, micro-batch) to a loaded batch or a failure."""

    def __init__(self, sets: Mapping[str, Samples]) -> None:
        self._sets = sets

    def loaded(self, of: str, step_index: int, micro_batch: int) -> LoadedBatch:
        """Return the batch of this task. Raises DataError."""
        samples = self._sets[of]
        batch = load_batch(samples, step_index, micro_batch, preserves=of == TRAINING)
        marks = samples.new_marks() if isinstance(samples, StreamSamples) else None
        return LoadedBatch(step_index, micro_batch, batch, marks)

    def facts(self, of: str, step_index: int, micro_batch: int) -> dict[str, str]:
        """Do the work of `MicroBatchLoader.facts` in this process."""
        samples = self._sets[of]
        if isinstance(samples, StreamSamples):
            with preserved_generators():
                samples.refuse_equal_parts()
        return facts_of(samples, step_index, micro_batch)

    def __getitem__(self, task: tuple[Any, ...]) -> bytes:
        """Load a micro-batch in a loader process and return the pickled LoadedBatch or _Failure.

        task: (set, step index, micro-batch), or (..., "facts") for its facts instead of the batch.
        This method never raises, because torch would pass on only the text of an error. It pickles the result itself,
        because torch's queue would only print an error of pickling and drop the batch, and the reader would wait
        forever.
        """
        of, step_index, micro_batch, *asks_facts = task
        try:
            if asks_facts:
                return _packed(LoadedBatch(step_index, micro_batch, self.facts(of, step_index, micro_batch)))
            return _packed(self.loaded(of, step_index, micro_batch))
        except DataError as error:
            return _packed(_failure(error))
        except Exception as error:
            unsendable = DataError(
                f"a batch can't be sent by a loader process: {type(error).__name__}: {error}",
                where=self._sets[of].place(step_index, micro_batch),
                hint="make the data set and recipe.collate return tensors, numbers, text and containers of them, "
                "or set strategy.loader_workers = 0",
            )
            unsendable.__cause__ = error
            return _packed(_failure(unsendable))


def load_batch(
    samples: Samples,
    step_index: int,
    micro_batch: int,
    look_at: Callable[[list[Any]], None] = lambda samples: None,
    *,
    preserves: bool = True,
) -> Any:
    """Load a micro-batch, and call `look_at` with its samples before they are collated. Raises DataError.

    preserves: whether to restore the global generators. An evaluation restores them itself, once for all micro-batches.
    """
    collate = samples.collate or default_collate
    samples.calling = samples.name
    with preserved_generators() if preserves else nullcontext(), _one_thread():
        seed_generators(samples.seed(step_index, micro_batch))
        try:
            items = samples.read(step_index, micro_batch)
            look_at(items)
            samples.calling = DEFAULT_COLLATE if collate is default_collate else samples.name_of_collate
            batch = collate(items)
            return batch if collate is default_collate else _with_own_memory(batch, items)
        except StreamError:
            raise
        except Exception as error:
            own_collate = "if the samples differ in shape, set recipe.collate to a function that pads them; "
            raise DataError(
                f"{samples.calling} raised {type(error).__name__}: {error}",
                where=f"{samples.place(step_index, micro_batch)}, {samples.listed(step_index, micro_batch)}",
                hint=f"{own_collate if samples.calling == DEFAULT_COLLATE else ''}to reproduce the error, call "
                f"{samples.calling} yourself; the traceback is above or below this message{samples.remedy(step_index)}",
            ) from error


def _with_own_memory(batch: Any, items: list[Any]) -> Any:
    """Return `batch` with copies of the tensors and arrays whose memory may belong to the data set.

    The loss function may change its batch in place. If the batch were a part of the data set, this would change the
    samples of later epochs, in this worker alone. A copy has the same strides and alignment, on which bits depend.
    """
    leaves = tree_leaves(items)
    storages = {leaf.untyped_storage().data_ptr() for leaf in leaves if _is_dense(leaf)}
    arrays = {id(leaf) for leaf in leaves if isinstance(leaf, np.ndarray)}
    copies: dict[int, Any] = {}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            is_shared = leaf.base is not None or id(leaf) in arrays
            return copies.setdefault(id(leaf), leaf.copy(order="K")) if is_shared else leaf
        if not _is_dense(leaf) or leaf.requires_grad:
            return leaf
        storage = leaf.untyped_storage()
        is_shared = leaf._is_view() or not storage.resizable() or storage.data_ptr() in storages
        return copies.setdefault(id(leaf), _copy_of(leaf)) if is_shared else leaf

    return tree_map(own, batch)


def _is_dense(value: object) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu"


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides and alignment; the tensor itself if its elements share memory."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.is_quantized or any(stride == 0 and length > 1 for length, stride in strides):
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() % ALIGNMENT
    memory = torch.empty(offset + max(span, 0), dtype=tensor.dtype)
    return memory.as_strided(tensor.size(), tensor.stride(), offset).copy_(tensor)


def facts_of(samples: Samples, step_index: int, micro_batch: int) -> dict[str, str]:
    """Load a micro-batch twice, and return its facts; see `MicroBatchLoader.facts`. Raises DataError."""
    first, second = _facts(samples, step_index, micro_batch), _facts(samples, step_index, micro_batch)
    for name in [*first, *second]:
        once, again = first.get(name, "nothing"), second.get(name, "nothing")
        if once != again:
            raise DataError(
                "a micro-batch was not the same when it was loaded again",
                where=f"{name}; {samples.place(step_index, micro_batch)}",
                expected=once,
                got=again,
                hint=f"{samples.rule}, and on random numbers of the global generators of torch, numpy and Python, which"
                " are seeded; don't use a generator that the data set owns, a counter, the time, or uninitialized "
                "memory (torch.empty)",
            )
    return first


def _facts(samples: Samples, step_index: int, micro_batch: int) -> dict[str, str]:
    facts: dict[str, str] = {}

    def add_samples(read: list[Any]) -> None:
        for name, sample in zip(samples.names(step_index, micro_batch), read, strict=False):
            facts.update(plain_values(name, sample))

    try:
        batch = load_batch(samples, step_index, micro_batch, add_samples)
    except DataError as error:  # the worker that needs this micro-batch reports the error
        return {samples.name: str(error.what)}
    return facts | plain_values("the batch that collate returned", batch)


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
