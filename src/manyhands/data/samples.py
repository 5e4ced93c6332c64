"""Chooses the samples of each micro-batch, for training and for validation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from manyhands.config import Recipe
from manyhands.data.epochs import Epochs
from manyhands.data.permutation import Permutation
from manyhands.data.sample_order import sample_order_of
from manyhands.errors import DataError
from manyhands.intervals import step_number
from manyhands.numerics.counters import derive
from manyhands.validation import Validation

_SHOWN = 16
"""The number of samples that an error lists."""


class Samples(ABC):
    """Data, divided into micro-batches.

    name, name_of_collate: what errors call the data set and the collate function. step_index: the index of a step,
    counted from 0; with islands, of a batch, see `Recipe.batch_index`. Users see the number of a step, counted from 1.
    """

    name: str
    name_of_collate: str
    collate: Callable[[list[Any]], Any] | None
    rule: str = "let a sample depend on its index alone"
    """What the samples must fulfil, for errors."""
    calling: str = ""
    """The call of the user's code that is in progress, for errors."""

    @abstractmethod
    def read(self, step_index: int, micro_batch: int) -> list[Any]:
        """Read a micro-batch's samples."""

    @abstractmethod
    def names(self, step_index: int, micro_batch: int) -> list[str]:
        """Return what errors call the samples of the micro-batch that was read last."""

    @abstractmethod
    def listed(self, step_index: int, micro_batch: int) -> str:
        """Return a list of the micro-batch's samples, for errors."""

    @abstractmethod
    def seed(self, step_index: int, micro_batch: int) -> int:
        """Return the seed with which the micro-batch is loaded."""

    @abstractmethod
    def place(self, step_index: int, micro_batch: int) -> str:
        """Return a description of the micro-batch, for errors."""

    def remedy(self, step_index: int) -> str:
        """Return how to continue without the micro-batch, for the end of a hint."""
        return ""


class IndexedSamples(Samples):
    """A map-style data set, divided into micro-batches."""

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self.data, self.collate = data, collate
        self.size = len(data)
        if self.size < 1:
            raise DataError(
                f"{self.name} is empty",
                expected="at least one sample",
                got=f"a {type(data).__name__} with len() = {self.size}",
                hint="check the path and the filters that the data set was built with",
            )

    @abstractmethod
    def indices(self, step_index: int, micro_batch: int) -> list[int]:
        """Return the indices of a micro-batch's samples."""

    def read(self, step_index: int, micro_batch: int) -> list[Any]:
        indices = self.indices(step_index, micro_batch)
        if hasattr(self.data, "__getitems__"):
            self.calling = f"{self.name}.__getitems__"
            samples: list[Any] = self.data.__getitems__(indices)
            return samples
        samples = []
        try:
            for index in indices:
                samples.append(self.data[index])
        except Exception:
            self.calling = f"{self.name}[{indices[len(samples)]}]"
            raise
        return samples

    def names(self, step_index: int, micro_batch: int) -> list[str]:
        return [f"{self.name}[{index}]" for index in self.indices(step_index, micro_batch)]

    def listed(self, step_index: int, micro_batch: int) -> str:
        indices = self.indices(step_index, micro_batch)
        shown, more = ", ".join(map(str, indices[:_SHOWN])), len(indices) - _SHOWN
        return f"samples [{shown}]" if more <= 0 else f"samples [{shown}, ... {more} more]"


class TrainingSamples(IndexedSamples):
    """The samples of the steps of a recipe."""

    name, name_of_collate = "recipe.data", "recipe.collate"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.data, recipe.collate)
        self._seed = recipe.seed
        self.epochs, self._order, self._islands = Epochs.of(recipe), sample_order_of(recipe), recipe.num_islands

    def indices(self, step_index: int, micro_batch: int) -> list[int]:
        return self._order.at(self.epochs.positions(step_index, micro_batch))

    def seed(self, step_index: int, micro_batch: int) -> int:
        return derive(self._seed, "data", step_index, micro_batch)

    def place(self, step_index: int, micro_batch: int) -> str:
        step_index, island = divmod(step_index, self._islands)
        of_island = f" of island {island}" if self._islands > 1 else ""
        return f"step {step_number(step_index)}{of_island}, micro-batch {micro_batch}"

    def described(self, step_index: int, micro_batch: int) -> str:
        """Return a description of a micro-batch's samples, for errors in the step."""
        positions, found = self.epochs.positions(step_index, micro_batch), self.indices(step_index, micro_batch)
        indices = ", ".join(map(str, found[:_SHOWN]))
        more = ", ..." if len(found) > _SHOWN else ""
        return f"samples {positions[0]} to {positions[-1]} in the run's order (in recipe.data: {indices}{more})"

    def remedy(self, step_index: int) -> str:
        number = step_number(step_index // self._islands)
        return f"; to continue without this step: --skip-step {number} (skip_steps=[{number}])"


class HeldOutSamples(IndexedSamples):
    """The samples of a validation, in the order of the data. The last micro-batch may be smaller than the others.

    With a limit on the number of samples, they are drawn from the data once, as a function of (seed, name).
    """

    def __init__(self, name: str, validation: Validation, recipe: Recipe) -> None:
        self.set_name, self.name, self.name_of_collate = name, f"{name}.data", f"{name}.collate"
        super().__init__(validation.data, validation.collate or recipe.collate)
        self.num_samples = min(self.size, validation.samples or self.size)
        self.micro_size, self._seed = validation.batch or recipe.batch.micro_size, recipe.seed
        self._drawn: list[int] | None = None
        if self.num_samples < self.size:
            permutation = Permutation(self.size, derive(self._seed, "validation samples", name))
            self._drawn = sorted(permutation[position] for position in range(self.num_samples))

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches."""
        return math.ceil(self.num_samples / self.micro_size)

    def indices(self, step_index: int, micro_batch: int) -> list[int]:
        first = micro_batch * self.micro_size
        places = range(first, min(first + self.micro_size, self.num_samples))
        return list(places) if self._drawn is None else [self._drawn[place] for place in places]

    def seed(self, step_index: int, micro_batch: int) -> int:
        return derive(self._seed, "validation data", self.set_name, micro_batch)

    def seed_of_forward(self, micro_batch: int) -> int:
        """Return the seed with which the model computes the micro-batch."""
        return derive(self._seed, "validation", self.set_name, micro_batch)

    def place(self, step_index: int, micro_batch: int) -> str:
        return f"micro-batch {micro_batch} of {self.set_name}"
