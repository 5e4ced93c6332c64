"""Metrics of the library torchmetrics, which is not imported: its objects describe their own states."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.metrics.collected import Collected, plain_figure
from manyhands.metrics.metric import Figure, Measured, Metric, Totals, number
from manyhands.metrics.predictions import Pick, output_and_labels

_SUM, _CAT = "dim_zero_sum", "dim_zero_cat"

# These apply a softmax to scores that aren't probabilities.
_SOFTMAX = ("MulticlassCalibrationError", "MulticlassHingeLoss")


def is_torchmetric(value: object) -> bool:
    """Return True for a metric of torchmetrics."""
    return isinstance(getattr(value, "_reductions", None), dict) and isinstance(getattr(value, "_defaults", None), dict)


class _Summed(Metric):
    """A metric whose states are sums."""

    def __init__(self, metric: Any, pick: Pick) -> None:
        self.name, self._metric, self._pick = _name(metric), metric, pick

    def measure(self, measured: Measured) -> Totals:
        predictions, labels = self._pick(measured.output, measured.batch)
        refuse_decisions(self._metric, predictions)
        own = copy.deepcopy(self._metric).to(predictions.device)
        own.reset()
        own.update(predictions, labels)
        return {state: number(getattr(own, state)) for state in own._reductions}

    def figure(self, totals: Totals) -> Figure:
        own = copy.deepcopy(self._metric).cpu()
        own.sync_on_compute = False  # the states already include those of all workers
        for state, total in totals.items():
            default = own._defaults[state]
            setattr(own, state, torch.from_numpy(np.array(total)).to(default.dtype).view(default.shape))
        own._update_count = 1
        return plain_figure(self.name, own.compute())


def torchmetric(metric: Any, *, pick: Pick = output_and_labels) -> Metric | Collected:
    """A metric of torchmetrics. A recipe may also list the object itself, without this function.

    If all of its states are sums, its states are added. If it stores predictions ("cat"), the predictions and labels of
    all samples are collected first, as `collected` does. pick: (output, batch) -> (predictions, labels), the arguments
    of its `update`. Raises ConfigError for a metric with other states.
    """
    reductions = {getattr(each, "__name__", str(each)) for each in metric._reductions.values()}
    if reductions == {_SUM}:
        if getattr(metric, "data_range", 0) is None:
            raise ConfigError(
                f"{type(metric).__name__} takes the range of values from each batch",
                expected="data_range=..., which is the same for all batches",
                got="data_range=None",
            )
        return _Summed(metric, pick)
    if reductions <= {_SUM, _CAT}:

        def then(values: tuple[Any, Any]) -> Any:
            own = copy.deepcopy(metric).cpu()
            own.sync_on_compute = False
            own.reset()
            own.update(*(torch.from_numpy(np.array(value)) for value in values))
            return own.compute()

        return Collected(_name(metric), pick, then)
    raise ConfigError(
        f"{type(metric).__name__} can't be computed from parts of the data",
        expected="a metric whose states are sums, or lists of predictions",
        got=f"states that are reduced by {', '.join(sorted(reductions - {_SUM, _CAT}))}",
        hint="use manyhands.metrics.collected, and compute it from all predictions",
    )


def refuse_decisions(metric: Any, predictions: Tensor) -> None:
    """Raise ConfigError if the metric would treat these predictions as logits because of their values.

    torchmetrics decides this for each batch separately. A batch of logits that happen to lie between 0 and 1 is then
    taken for probabilities, and the figure depends on the division of the data (torchmetrics, issue 1989).
    """
    kind = type(metric)
    decides = kind.__module__.startswith("torchmetrics.classification") and (
        kind.__name__.startswith(("Binary", "Multilabel"))
        or kind.__name__ in _SOFTMAX
        or (kind.__name__.startswith("Multiclass") and hasattr(metric, "thresholds"))
    )
    if not (decides and predictions.is_floating_point() and predictions.numel()):
        return
    low, high = float(predictions.min()), float(predictions.max())
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            f"{kind.__name__} decides from the values of each batch whether they are logits",
            expected="probabilities from 0 to 1",
            got=f"predictions from {low:g} to {high:g}",
            hint="convert them yourself: manyhands.metrics.torchmetric(metric, pick=lambda output, batch: "
            "(output.sigmoid(), batch[1]))",
        )


def _name(metric: Any) -> str:
    """Return the class's name in lower case with underscores: BinaryF1Score becomes binary_f1_score."""
    name = ""
    for before, letter in zip(" " + type(metric).__name__, type(metric).__name__, strict=False):
        name += f"_{letter.lower()}" if letter.isupper() and before.islower() else letter.lower()
    return name
