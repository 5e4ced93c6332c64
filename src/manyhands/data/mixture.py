"""Several data sets as one, by weights."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from manyhands.data.order import Permutation
from manyhands.errors import ConfigError
from manyhands.numerics.counters import derive


class Mixture(Dataset[Any]):
    """`samples` items, of each data set the share that its weight says, to within one.

    Data set k's items are one run of indices; a recipe's order mixes them. The j-th of them is item `j % size` of a
    permutation of data set k, a new one each time that all of it has been used: a pure function of (seed, k, j).
    samples: by default, as many as all data sets have together. Raises ConfigError.
    """

    def __init__(
        self, datasets: Sequence[Any], weights: Sequence[float], samples: int | None = None, seed: int = 0
    ) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ConfigError(
                "a mixture wants data sets, and a weight for each", got=f"{len(datasets)}, {len(weights)}"
            )
        if not all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights):
            raise ConfigError("a mixture's weights are numbers above 0", got=list(weights))
        self.datasets, self.seed = list(datasets), seed
        total = sum(map(len, self.datasets)) if samples is None else samples
        if total < 1:
            raise ConfigError("a mixture has at least one sample", got=total)
        self.shares = _shares(weights, total)
        self._starts = list(accumulate(self.shares, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        dataset = self.datasets[number]
        time, position = divmod(index - self._starts[number], len(dataset))
        return dataset[Permutation(len(dataset), derive(self.seed, "mixture", number, time))[position]]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, as near to the weights as can be: the largest remainders are rounded up."""
    whole = math.fsum(weights)
    exact = [weight / whole * total for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
