"""Finds predictions and labels in a model's output and in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.errors import ConfigError

LABELS = ("labels", "label", "targets", "target", "y")

Pick = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""A function (output, batch) -> (predictions, labels)."""

_HINT = "give the metric a function that finds both: pick=lambda output, batch: (output.logits, batch['labels'])"


def output_and_labels(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the predictions in `output` and the labels in `batch`. Raises ConfigError if they aren't obvious.

    The output is a tensor, or an object or mapping with `logits`, as transformers returns. The batch is a pair
    (inputs, labels), or a mapping with one of the keys in LABELS.
    """
    return _predictions(output), _labels(batch)


def _predictions(output: Any) -> Tensor:
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ConfigError(
        "a metric doesn't find the predictions in the model's output",
        expected="a tensor, or an object or mapping with logits",
        got=_described(output),
        hint=_HINT,
    )


def _labels(batch: Any) -> Tensor:
    found: list[Any] = []
    if isinstance(batch, Mapping):
        found = [batch[key] for key in LABELS if key in batch]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = [batch[1]]
    if len(found) == 1 and isinstance(found[0], Tensor):
        return found[0]
    raise ConfigError(
        "a metric doesn't find the labels in the batch",
        expected=f"a pair (inputs, labels), or a mapping with one of the keys {', '.join(LABELS)}",
        got=_described(batch),
        hint=_HINT,
    )


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


class Classes(NamedTuple):
    """Predicted and true classes of the samples that count, each [n] int64; number: how many classes there are.

    They are arrays of numpy, because counting a micro-batch's classes takes torch several times as long.
    """

    predicted: NDArray[np.int64]
    true: NDArray[np.int64]
    number: int


class ClassPicker:
    """Turns predictions and labels into classes, without ever guessing from their values what they mean.

    classes: the number of classes; needed if predictions are classes already. threshold: with one score per label, the
    smallest score with which a label is predicted. class_dim: the dimension of the classes in scores. ignore_index: the
    label of samples that don't count.
    """

    def __init__(
        self, classes: int | None, threshold: float | None, class_dim: int, ignore_index: int | None, pick: Pick
    ) -> None:
        self.classes, self.threshold, self.class_dim = classes, threshold, class_dim
        self.ignore_index, self.pick = ignore_index, pick

    def classes_of(self, output: Any, batch: Any) -> Classes:
        """Return the classes of a micro-batch. Raises ConfigError."""
        predictions, labels = self.pick(output, batch)
        number, are_indices = self.classes, False
        if predictions.shape == labels.shape:
            if predictions.is_floating_point():
                predictions, number = self._above_threshold(predictions), number or 2
            elif number is None:
                raise ConfigError(
                    "the number of classes isn't known, because the predictions are classes already",
                    expected="classes=..., the number of classes",
                    got=f"predictions of type {predictions.dtype}",
                )
        else:
            scores = self.scores_of(predictions, labels)
            number, predictions = number or scores.shape[-1], scores.argmax(-1)
            are_indices = number >= scores.shape[-1]
        predicted, true = _as_array(predictions), _as_array(labels)
        if self.ignore_index is not None:
            counts = true != self.ignore_index
            predicted, true = predicted[counts], true[counts]
        if not are_indices:
            predicted = self._checked(predicted, number, "predicted class")
        return Classes(predicted.ravel(), self._checked(true, number, "label").ravel(), number)

    def scores_of(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return the scores with the classes as their last dimension: [*labels.shape, classes]. Raises ConfigError."""
        if predictions.ndim == labels.ndim + 1:
            scores = predictions.movedim(self.class_dim, -1)
            if scores.shape[:-1] == labels.shape and scores.shape[-1] > 1:
                return scores
        raise ConfigError(
            "the shapes of predictions and labels don't match",
            expected=f"scores of the labels' shape {list(labels.shape)}, and the classes as dimension {self.class_dim}",
            got=f"predictions of shape {list(predictions.shape)}",
            hint="set class_dim=1 if the classes are the second dimension, as in images [n, classes, height, width]; "
            "give one score per label the labels' shape, with squeeze(-1) in a pick function, and set threshold; "
            "a language model's labels may have to be shifted by a pick function",
        )

    def _above_threshold(self, scores: Tensor) -> Tensor:
        if self.threshold is None:
            raise ConfigError(
                "there is one score for each label, but no threshold",
                expected="threshold=0.5 for probabilities, or threshold=0.0 for logits",
                got=f"predictions of shape {list(scores.shape)} and type {scores.dtype}",
            )
        return (scores >= self.threshold).long()

    def _checked(self, given: NDArray[Any], number: int, what: str) -> NDArray[np.int64]:
        """Return classes as int64. Raises ConfigError for numbers that are not classes. what: "label", for example."""
        if given.dtype.kind == "f" and not (np.isfinite(given) & (given == np.trunc(given))).all():
            raise ConfigError(f"a {what} is not a whole number", expected=f"classes from 0 to {number - 1}")
        classes = given.astype(np.int64, copy=False)
        if not classes.size:
            return classes
        lowest, highest = int(classes.min()), int(classes.max())
        if lowest < 0 or highest >= number:
            ignored = f", or {self.ignore_index} for samples that don't count" if what == "label" else ""
            raise ConfigError(
                f"a {what} is out of range",
                expected=f"0 to {number - 1}{ignored}",
                got=f"classes from {lowest} to {highest}",
            )
        return classes


def _as_array(classes: Tensor) -> NDArray[Any]:
    """Return classes as an array of numpy. Numbers of any floating-point type become fp64."""
    return (classes.double() if classes.is_floating_point() else classes).numpy(force=True)


def counting(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Return a mask of the labels that count."""
    return torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
