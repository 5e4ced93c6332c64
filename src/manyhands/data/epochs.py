"""Divides a run's samples into epochs, steps and micro-batches."""

from __future__ import annotations

import math
from fractions import Fraction

from manyhands.config import Batch, Recipe
from manyhands.data.sample_order import epoch_size_of
from manyhands.errors import ConfigError


class Epochs:
    """The positions of each micro-batch's samples in a run.

    Position p is in epoch p // size, counted from 0, and is place p % size in that epoch's order. What happens at the
    end of an epoch depends on `end`:

    - "join": a step may take its last samples from the next epoch. All steps are complete.
    - "short": the last step of an epoch has the remaining samples, so it may have fewer samples and micro-batches.
    - "drop": the remaining samples are left out. All steps are complete.

    size: the samples in an epoch. islands: the number of islands, whose batches follow each other in the order of the
    samples. steps_per_epoch: the number of batches in an epoch; None for "join". step_index: the index of a step,
    counted from 0; with islands, the index of a batch, see `Recipe.batch_index`. Raises ConfigError if there would be
    no step.
    """

    def __init__(self, size: int, batch: Batch, end: str, islands: int = 1) -> None:
        self.size, self._batch, self._islands = size, batch, islands
        self.steps_per_epoch: int | None = None
        if end == "short":
            self.steps_per_epoch = math.ceil(size / batch.global_size)
        elif end == "drop":
            self.steps_per_epoch = size // batch.global_size
            if not self.steps_per_epoch:
                raise ConfigError(
                    'epoch_end = "drop" leaves no step',
                    expected=f"at least {batch.global_size} samples, as many as a step has",
                    got=f"{size} samples in an epoch",
                )

    @classmethod
    def of(cls, recipe: Recipe) -> Epochs:
        """Return the epochs of a recipe. Raises ConfigError."""
        return cls(epoch_size_of(recipe), recipe.batch, recipe.epoch_end, recipe.num_islands)

    def steps(self, epochs: int) -> int:
        """Return the number of steps in the given number of epochs. With "join", the last one may need more samples."""
        if self.steps_per_epoch is not None:
            return math.ceil(epochs * self.steps_per_epoch / self._islands)
        return math.ceil(epochs * self.size / (self._batch.global_size * self._islands))

    def described(self, steps: int) -> list[str]:
        """Describe a run of `steps` steps in one line, and warn if a step has a sample twice."""
        epochs, size = float(self.complete_after(steps)), self._batch.global_size * self._islands
        passes = f"{epochs:.4g} epoch{'' if epochs == 1 else 's'} of {self.size:,} samples"
        of_islands = f" of {self._islands} islands" if self._islands > 1 else ""
        lines = [f"{steps:,} step{'' if steps == 1 else 's'} = {passes}, {size:,} in a step{of_islands}"]
        if self.steps_per_epoch is None and size > self.size:
            lines.append(
                f"warning: a step takes {size:,} samples, and an epoch has only {self.size:,}: some samples occur "
                "more than once in a step"
            )
        return lines

    def complete_after(self, steps: int) -> Fraction:
        """Return how many epochs are complete after `steps` steps, of all islands if there are several."""
        return self._complete_after_batches(steps * self._islands)

    def _complete_after_batches(self, batches: int) -> Fraction:
        if self.steps_per_epoch is not None:
            return Fraction(batches, self.steps_per_epoch)
        return Fraction(batches * self._batch.global_size, self.size)

    def epoch_of(self, step_index: int) -> int | None:
        """Return the epoch, counted from 1, of the first sample of the step with this index; None for a stream."""
        return int(self._complete_after_batches(step_index)) + 1

    def samples(self, step_index: int) -> int:
        """Return the number of samples in the step with this index. The last step of an epoch may have fewer."""
        size = self._batch.global_size
        return size if self.steps_per_epoch is None else min(size, self.size - step_index % self.steps_per_epoch * size)

    def present(self, step_index: int) -> range:
        """Return the indices of the micro-batches that a step has. Those at the end may be missing."""
        return range(math.ceil(self.samples(step_index) / self._batch.micro_size))

    def positions(self, step_index: int, micro_batch: int) -> range:
        """Return the positions of a micro-batch's samples. In the last step of an epoch, there may be none."""
        start = step_index * self._batch.global_size
        if self.steps_per_epoch is not None:
            epoch, place = divmod(step_index, self.steps_per_epoch)
            start = epoch * self.size + place * self._batch.global_size
        first = micro_batch * self._batch.micro_size
        last = min(first + self._batch.micro_size, self.samples(step_index))
        return range(start + first, start + max(first, last))

    def share(self, step_index: int, micro_batch: int) -> float:
        """Return the micro-batch's number of samples, divided by that of a complete micro-batch."""
        return len(self.positions(step_index, micro_batch)) / self._batch.micro_size
