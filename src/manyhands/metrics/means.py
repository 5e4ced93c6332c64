"""Metrics that are sums of floating-point numbers: errors of regression, and figures made of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from manyhands.errors import ConfigError
from manyhands.metrics.metric import Figure, Measured, Metric, Totals, number, ratio
from manyhands.metrics.predictions import Pick, output_and_labels


class _MeanError(Metric):
    def __init__(self, name: str, power: int, pick: Pick) -> None:
        self.name, self._power, self._pick = name, power, pick

    def measure(self, measured: Measured) -> Totals:
        predictions, labels = self._pick(measured.output, measured.batch)
        if predictions.shape != labels.shape:
            raise ConfigError(
                f"{self.name} got predictions and labels of different shapes",
                expected=f"the labels' shape, {list(labels.shape)}",
                got=list(predictions.shape),
                hint="torch would repeat them to a common shape; use squeeze(-1) in a pick function, for example",
            )
        error = (predictions.double() - labels.double()).abs() ** self._power
        return {"sum": error.sum().cpu().numpy(), "count": np.array(error.numel())}

    def figure(self, totals: Totals) -> Figure:
        return ratio(totals["sum"], totals["count"])


def mean_squared_error(*, pick: Pick = output_and_labels) -> Metric:
    """The mean of (prediction - label)^2 over all elements. pick: (output, batch) -> (predictions, labels)."""
    return _MeanError("mean_squared_error", 2, pick)


def mean_absolute_error(*, pick: Pick = output_and_labels) -> Metric:
    """The mean of |prediction - label| over all elements. pick: (output, batch) -> (predictions, labels)."""
    return _MeanError("mean_absolute_error", 1, pick)


class _OfLoss(Metric):
    """A figure made of the loss in nats, and of a second count."""

    def __init__(self, name: str, count: Callable[[Any], Any] | None, figure: Callable[[float, float], float]) -> None:
        self.name, self._count, self._figure = name, count, figure

    def measure(self, measured: Measured) -> Totals:
        if self._count is not None and not measured.weighted:
            raise ConfigError(
                f"{self.name} needs the sum of the loss over all tokens",
                expected="(sum, number of tokens) from the loss function",
                got="a mean",
            )
        count = measured.weight if self._count is None else self._count(measured.batch)
        return {"loss": np.array(measured.loss), "count": number(count)}

    def figure(self, totals: Totals) -> Figure:
        count = float(totals["count"])
        return self._figure(float(totals["loss"]), count) if count else None


def perplexity() -> Metric:
    """exp(loss), where the loss is the mean over all tokens, in nats.

    It is exact if the loss function returns (sum, number of tokens), or if all samples have the same number of tokens.
    """

    def of(loss: float, count: float) -> float:
        try:
            return math.exp(loss / count)
        except OverflowError:
            return math.inf

    return _OfLoss("perplexity", None, of)


def bits_per_byte(num_bytes: Callable[[Any], Any]) -> Metric:
    """The loss in bits, divided by the number of bytes of the text. It doesn't depend on the tokenizer.

    num_bytes: (batch) -> the number of bytes that the tokens of the micro-batch stand for. The loss function must
    return (sum, weight), with the sum in nats.
    """
    return _OfLoss("bits_per_byte", num_bytes, lambda loss, count: loss / math.log(2) / count)
