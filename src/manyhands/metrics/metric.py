"""The interface of metrics: parts of micro-batches, which are added, and a figure made of the totals.

A metric sees one micro-batch at a time, and returns arrays. The evaluation adds them over all micro-batches: int64
arrays exactly, fp64 arrays in the order of the micro-batches. The metric then computes its figure from the totals. So
the figure doesn't depend on which worker computed which micro-batch, and nothing is averaged before the end.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manyhands.errors import ConfigError

Totals = Mapping[str, NDArray[Any]]
"""Arrays by name, each of dtype int64 (counts) or float64 (sums)."""

Figure = float | None | Mapping[str, "Figure"] | Sequence["Figure"]
"""A number, None if no sample counts, or several of them by name or in a list."""


class Measured(NamedTuple):
    """The results of one micro-batch.

    output: what the model returned. batch: as collated. loss, weight: the loss function's sum and its weight. If it
    returned a mean, the sum is the mean times the number of samples, and the weight is the number of samples.
    weighted: True if the loss function returned a weight. samples: the number of samples in the micro-batch.
    """

    output: Any
    batch: Any
    loss: float
    weight: float
    weighted: bool
    samples: int


class Metric(ABC):
    """A figure of an evaluation. Derive a class from this one if a function isn't enough.

    name: the default name of the figure.
    """

    name: str

    @abstractmethod
    def measure(self, measured: Measured) -> Totals:
        """Return this micro-batch's part: arrays whose names, shapes and dtypes are the same for all micro-batches.

        Integers become int64, floating-point numbers fp64. This is called without gradients, on one worker.
        """

    @abstractmethod
    def figure(self, totals: Totals) -> Figure:
        """Compute the figure from the totals. Every worker calls this with the same totals."""


class FunctionMetric(Metric):
    """The ratio of the sum and the weight that a function (output, batch) -> (sum, weight) returns."""

    def __init__(self, function: Callable[[Any, Any], Any], name: str) -> None:
        self._function, self.name = function, name

    def measure(self, measured: Measured) -> Totals:
        pair = self._function(measured.output, measured.batch)
        if not isinstance(pair, tuple) or len(pair) != 2:
            got = type(pair).__name__ if not isinstance(pair, tuple) else f"a tuple of {len(pair)}"
            raise ConfigError(
                f"the metric {self.name} returned something other than (sum, weight)",
                expected="two numbers or tensors of one element: (correct, len(batch))",
                got=got,
                hint="for a mean, return (mean * count, count); for metrics that need all predictions, use "
                "manyhands.metrics.collected",
            )
        return {"sum": self._single(pair[0]), "weight": self._single(pair[1])}

    def figure(self, totals: Totals) -> Figure:
        return ratio(totals["sum"], totals["weight"])

    def _single(self, value: object) -> NDArray[Any]:
        """Return one number as fp64, because a function may return the integer 0 for some micro-batches only."""
        found = number(value)
        if found.shape not in ((), (1,)):
            raise ConfigError(
                f"the metric {self.name} returned more than one number as the sum or as the weight",
                expected="two numbers or tensors of one element: (correct, len(batch))",
                got=f"shape {list(found.shape)}",
                hint="return the sums over the micro-batch: (errors.sum(), len(errors))",
            )
        return found.reshape(()).astype(np.float64)


def metric_named(name: str, function: Metric | Callable[..., Any]) -> Metric:
    """Return the metric under the given name. Raises ConfigError if it is neither a metric nor a function."""
    if isinstance(function, Metric):
        renamed = copy.copy(function)
        renamed.name = name
        return renamed
    if not callable(function):
        raise ConfigError(
            f"the metric {name} can't be called",
            expected="a name, a metric, or a function (output, batch) -> (sum, weight)",
            got=repr(function),
        )
    return FunctionMetric(function, name)


def name_of_function(function: Callable[..., Any]) -> str:
    """Return the name of a function. Raises ConfigError if it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    if name == "<lambda>":
        raise ConfigError(
            "a metric has no name, because it is a lambda",
            expected='a name for it: metrics={"error": lambda output, batch: ...}',
            got=repr(function),
        )
    return str(name)


def number(value: object) -> NDArray[Any]:
    """Return a number of Python, NumPy or torch, or an array of them, as int64 or fp64. Raises ConfigError."""
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    if isinstance(array, Tensor):
        array = array.double().numpy() if array.is_floating_point() else array.numpy()
    found = np.asarray(array)
    if found.dtype.kind in "biu":
        return found.astype(np.int64)
    if found.dtype.kind != "f":
        raise ConfigError(
            "a metric returned something that isn't a number",
            expected="an integer, a float, or a tensor or array of them",
            got=type(value).__name__ if found.dtype.kind == "O" else f"dtype {found.dtype}",
        )
    return found.astype(np.float64)


def ratio(total: Any, weight: Any) -> float | None:
    """Return total / weight, or None if the weight is zero."""
    return float(total) / float(weight) if float(weight) else None
