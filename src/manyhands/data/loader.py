"""Makes micro-batches out of a recipe's data, in the worker itself or in processes that read ahead of it.

    task (step, micro-batch) -> positions -> sample indices -> items -> collated batch

Whoever does it, the batch has the same bits: the generators are seeded for the task, and one CPU thread is used.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from manyhands.config import Recipe
from manyhands.data.order import micro_batch_positions, sample_indices
from manyhands.data.read_ahead import ReadAhead
from manyhands.errors import DataError
from manyhands.numerics.seeds import derive, preserved_generators, seed_generators


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
        self._ahead = ReadAhead(self._tasks, loader_workers) if loader_workers > 0 else None

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

    def _unpacked(self, results: Iterator[bytes], ahead: ReadAhead) -> Iterator[LoadedBatch]:
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
