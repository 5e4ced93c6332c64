"""The order of the samples in each epoch: random, sequential, drawn by weight, by length, or a user's own function.

An order is a pure function of (seed, epoch, place), so the workers, and interruptions, have no influence on it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from manyhands.data.permutation import Permutation
from manyhands.errors import ConfigError, DataError
from manyhands.numerics.counters import derive, words_at
from manyhands.options import whole_number

if TYPE_CHECKING:
    from manyhands.config import Recipe

GROUP_MICRO_BATCHES = 64
"""The default number of micro-batches whose samples `by_length` sorts together."""


class SampleOrder(ABC):
    """The samples of each epoch. size: the number of samples in an epoch."""

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of the samples at these places of an epoch, which is counted from 0."""

    def at(self, positions: Sequence[int]) -> list[int]:
        """Return the indices of the samples at these positions of the run."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), np.int64(self.size))
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self.indices(int(epoch), places[chosen])
        indices: list[int] = found.tolist()
        return indices


class RandomOrder(SampleOrder):
    """A new permutation of all samples in every epoch, evaluated per place, so that nothing is stored."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self._seed = seed

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return Permutation(self.size, derive(self._seed, "order", epoch)).take(places)


class SequentialOrder(SampleOrder):
    """The samples in the order of the data, in every epoch."""

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places


class _FunctionOrder(SampleOrder):
    """The samples that a user's function (seed, epoch, place) -> index chooses."""

    def __init__(self, size: int, seed: int, function: Callable[[int, int, int], Any]) -> None:
        super().__init__(size)
        self._seed, self._function = seed, function

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        found = []
        for place in places.tolist():
            index = whole_number(self._function(self._seed, epoch, place))
            if index is None or not 0 <= index < self.size:
                raise DataError(
                    "recipe.order returned no valid index",
                    where=f"epoch {epoch}, place {place}",
                    expected=f"an integer from 0 to {self.size - 1}",
                    got=repr(index),
                )
            found.append(index)
        return np.array(found, dtype=np.int64)


class OrderOption(ABC):
    """A value of `Recipe.order` that has options."""

    def size(self, recipe: Recipe) -> int:
        """Return the number of samples in an epoch."""
        return len(recipe.data)

    @abstractmethod
    def of(self, recipe: Recipe) -> SampleOrder:
        """Return the order for the recipe's data. Raises ConfigError."""

    @abstractmethod
    def fact(self) -> str:
        """Return a description that determines the order."""


class _WeightedOrder(SampleOrder):
    def __init__(self, size: int, seed: int, weights: NDArray[np.float64]) -> None:
        super().__init__(size)
        self._seed, self._ends = seed, np.cumsum(weights)
        self._last = int(np.flatnonzero(weights)[-1])

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        words = np.concatenate([words_at(self._seed, "weighted order", epoch, int(place), 1) for place in places])
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        # A sample of weight 0 has the same end as the sample before, so "right" passes over it.
        found = np.searchsorted(self._ends, uniform * self._ends[-1], side="right")
        indices: NDArray[np.int64] = np.minimum(found, self._last).astype(np.int64)
        return indices


class Weighted(OrderOption):
    """Samples drawn with replacement, each with a probability in proportion to its weight. See `weighted`."""

    def __init__(self, weights: Sequence[float], samples: int | None = None) -> None:
        self._weights, self._samples = np.asarray(weights, dtype=np.float64), samples
        if self._weights.ndim != 1 or not np.isfinite(self._weights).all() or (self._weights < 0).any():
            raise ConfigError("the weights of samples must be finite numbers of at least 0", expected="a list of them")
        if not self._weights.sum() > 0:
            raise ConfigError("all weights of samples are 0", expected="at least one positive weight")
        if samples is not None and (whole_number(samples) or 0) < 1:
            raise ConfigError("weighted: samples is out of range", expected="at least 1", got=samples)

    def of(self, recipe: Recipe) -> SampleOrder:
        _check_length("weights", len(self._weights), recipe)
        return _WeightedOrder(self.size(recipe), recipe.seed, self._weights)

    def size(self, recipe: Recipe) -> int:
        return self._samples or len(recipe.data)

    def fact(self) -> str:
        return f"weighted, {self._samples} samples, {hashlib.sha256(self._weights.tobytes()).hexdigest()[:16]}"


def weighted(weights: Sequence[float], samples: int | None = None) -> Weighted:
    """An order for `Recipe.order`: draw samples with replacement, in proportion to their weights.

    weights: one for each sample, at least 0. samples: the number of samples in an epoch (default: as many as weights).
    A sample of weight 0 is never drawn. Every epoch draws anew. Raises ConfigError.
    """
    return Weighted(weights, samples)


class _LengthOrder(SampleOrder):
    def __init__(self, seed: int, lengths: NDArray[np.int64], micro_size: int, group: int, *, joins: bool) -> None:
        super().__init__(len(lengths))
        self._seed, self._lengths, self._micro_size, self._group = seed, lengths, micro_size, group
        self._joins = joins
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # of the last epoch that was requested

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._of(epoch)
        return self._order[places]

    def _of(self, epoch: int) -> NDArray[np.int64]:
        shuffled = Permutation(self.size, derive(self._seed, "order", epoch)).take(np.arange(self.size))
        groups = [shuffled[start : start + self._group] for start in range(0, self.size, self._group)]
        by_length = [group[np.argsort(-self._lengths[group], kind="stable")] for group in groups]
        # If epochs are joined, the first micro-batch of an epoch may have begun in the epoch before.
        begun = -epoch * self.size % self._micro_size if self._joins else 0
        whole = max(0, self.size - begun) // self._micro_size
        ordered = np.concatenate(by_length)
        batches, rest = np.split(ordered, [whole * self._micro_size])
        first, rest = np.split(rest, [begun])
        batches = batches.reshape(whole, self._micro_size)
        if whole:
            shuffle = Permutation(whole, derive(self._seed, "order of micro-batches", epoch))
            batches = batches[shuffle.take(np.arange(whole))]
            if epoch == 0:  # a lack of memory shows in the first step
                longest = int(self._lengths[batches].max(axis=1).argmax())
                batches = np.concatenate([batches[longest : longest + 1], np.delete(batches, longest, axis=0)])
        return np.concatenate([first, batches.reshape(-1), rest])


class ByLength(OrderOption):
    """Samples of similar lengths in the same micro-batch. See `by_length`."""

    def __init__(self, lengths: Sequence[int], group: int | None = None) -> None:
        self._lengths, self._group = np.asarray(lengths), group
        if self._lengths.ndim != 1 or self._lengths.dtype.kind not in "iu":
            raise ConfigError("by_length needs a list of integers", got=f"an array of dtype {self._lengths.dtype}")
        if group is not None and (whole_number(group) or 0) < 1:
            raise ConfigError("by_length: group is out of range", expected="at least 1", got=group)

    def of(self, recipe: Recipe) -> SampleOrder:
        _check_length("lengths", len(self._lengths), recipe)
        micro_size = recipe.batch.micro_size
        group = self._group or GROUP_MICRO_BATCHES * micro_size
        joins = recipe.epoch_end == "join"
        return _LengthOrder(recipe.seed, self._lengths.astype(np.int64), micro_size, group, joins=joins)

    def fact(self) -> str:
        digest = hashlib.sha256(self._lengths.astype(np.int64).tobytes()).hexdigest()[:16]
        return f"by length, groups of {self._group}, {digest}"


def by_length(lengths: Sequence[int], group: int | None = None) -> ByLength:
    """An order for `Recipe.order`: put samples of similar lengths into the same micro-batch, to save padding.

    In every epoch, the samples are shuffled, sorted by length within groups of `group` samples (default: 64
    micro-batches), and divided into micro-batches, which are then shuffled. The first step of a run has the longest
    sample, so that a lack of memory shows at once. lengths: one for each sample. It takes memory for one number per
    sample. Raises ConfigError.
    """
    return ByLength(lengths, group)


def epoch_size_of(recipe: Recipe) -> int:
    """Return the number of samples in an epoch of a recipe, for which its order isn't built."""
    return recipe.order.size(recipe) if isinstance(recipe.order, OrderOption) else len(recipe.data)


def sample_order_of(recipe: Recipe) -> SampleOrder:
    """Return the order of a recipe's samples. Raises ConfigError."""
    order, size = recipe.order, len(recipe.data)
    if isinstance(order, OrderOption):
        return order.of(recipe)
    if callable(order):
        return _FunctionOrder(size, recipe.seed, order)
    return SequentialOrder(size) if order == "sequential" else RandomOrder(size, recipe.seed)


def order_fact(order: Any) -> dict[str, str]:
    """Return the fact about the order that a checkpoint must share with a run, or nothing for the default."""
    if order == "random":
        return {}
    if isinstance(order, OrderOption):
        return {"order": order.fact()}
    return {"order": "a function" if callable(order) else str(order)}


def _check_length(what: str, number: int, recipe: Recipe) -> None:
    if number != len(recipe.data):
        raise ConfigError(
            f"recipe.order has another number of {what} than recipe.data has samples",
            expected=len(recipe.data),
            got=number,
        )
