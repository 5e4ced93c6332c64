"""Metrics of classification: counts only, so that they are exact for any division of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manyhands.errors import ConfigError
from manyhands.metrics.metric import Figure, Measured, Metric, Totals, ratio
from manyhands.metrics.predictions import Classes, ClassPicker, Pick, counting, output_and_labels
from manyhands.options import whole_number

AVERAGES = ("macro", "micro", "weighted", "binary", "none")


class _OfClasses(Metric):
    """A metric of predicted and true classes."""

    def __init__(
        self,
        name: str,
        picker: ClassPicker,
        count: Callable[[Classes], Totals],
        figure: Callable[[Totals], Figure],
    ) -> None:
        self.name, self._picker, self._count, self._figure = name, picker, count, figure

    def measure(self, measured: Measured) -> Totals:
        return self._count(self._picker.classes_of(measured.output, measured.batch))

    def figure(self, totals: Totals) -> Figure:
        return self._figure(totals)


def accuracy(
    *,
    classes: int | None = None,
    threshold: float | None = None,
    class_dim: int = -1,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The share of labels that are predicted correctly.

    Predictions are scores [n, ..., classes], of which the largest decides; one score per label, with a `threshold` (0.5
    for probabilities, 0.0 for logits); or integer classes, with their number in `classes`.
    class_dim: the dimension of the classes in scores. ignore_index: labels with this value don't count.
    pick: (output, batch) -> (predictions, labels).
    """

    def count(of: Classes) -> Totals:
        return {"correct": np.array(np.count_nonzero(of.predicted == of.true)), "labels": np.array(of.true.size)}

    picker = ClassPicker(classes, threshold, class_dim, ignore_index, pick)
    return _OfClasses("accuracy", picker, count, lambda totals: ratio(totals["correct"], totals["labels"]))


class _TopK(Metric):
    def __init__(self, k: int, picker: ClassPicker) -> None:
        self.name, self._k, self._picker = f"top_{k}", k, picker

    def measure(self, measured: Measured) -> Totals:
        predictions, labels = self._picker.pick(measured.output, measured.batch)
        scores = self._picker.scores_of(predictions, labels)
        if scores.shape[-1] < self._k:
            raise ConfigError(f"{self.name} needs at least {self._k} classes", got=f"{scores.shape[-1]} classes")
        counts = counting(labels, self._picker.ignore_index)
        best = scores[counts].topk(self._k, dim=-1).indices
        correct = (best == labels[counts].unsqueeze(-1)).any(-1).sum()
        return {"correct": np.array(int(correct)), "labels": np.array(int(counts.sum()))}

    def figure(self, totals: Totals) -> Figure:
        return ratio(totals["correct"], totals["labels"])


def top_k(k: int, *, class_dim: int = -1, ignore_index: int | None = -100, pick: Pick = output_and_labels) -> Metric:
    """The share of labels that are among the `k` classes with the largest scores. Its name is top_5, for example.

    The other arguments are those of `accuracy`.
    """
    if k < 1:
        raise ConfigError("k is out of range", expected="at least 1", got=k)
    return _TopK(k, ClassPicker(None, None, class_dim, ignore_index, pick))


def _counts_per_class(of: Classes) -> Totals:
    def count(classes: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(classes, minlength=of.number)

    return {"hits": count(of.true[of.predicted == of.true]), "predicted": count(of.predicted), "true": count(of.true)}


def _check_positive(name: str, positive: int, classes: int | None) -> None:
    """Raise ConfigError if `positive` is not a class. classes: their number, if it is known."""
    number = whole_number(positive)
    if number is None or number < 0 or (classes is not None and number >= classes):
        last = "" if classes is None else f" and less than {classes}"
        raise ConfigError(
            f"{name}: positive is not a class", expected=f"an integer of at least 0{last}", got=repr(positive)
        )


def _averaged(
    name: str,
    average: str,
    positive: int,
    picker: ClassPicker,
    divide: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]],
) -> Metric:
    """Return a metric of numerators and denominators per class. A class without a denominator is absent."""
    if average not in AVERAGES:
        raise ConfigError(f"{name} has an unknown average", expected=f"one of {', '.join(AVERAGES)}", got=repr(average))
    if average != "binary" and positive != 1:
        raise ConfigError(
            f'{name}: positive has no effect without average="binary"',
            got=f"average={average!r}, positive={positive!r}",
        )
    _check_positive(name, positive, picker.classes)

    def figure(totals: Totals) -> Figure:
        hits, predicted, true = totals["hits"], totals["predicted"], totals["true"]
        if average == "micro":
            above, below = divide(hits.sum(), predicted.sum(), true.sum())
            return ratio(above, below)
        above, below = divide(hits, predicted, true)
        each = [ratio(*pair) for pair in zip(above, below, strict=True)]
        if average == "none":
            return {str(number): value for number, value in enumerate(each)}
        if average == "binary":
            _check_positive(name, positive, len(each))
            return each[positive]
        # A class that is in neither the labels nor the predictions is absent, so that `classes` may be larger than
        # needed. For a class that is in one of them, but has no denominator, the figure is 0.
        present = (predicted + true) > 0
        values = [value or 0.0 for value, counts in zip(each, present, strict=True) if counts]
        weights = true[present] if average == "weighted" else np.ones(len(values), dtype=np.int64)
        total = 0.0
        for value, weight in zip(values, weights, strict=True):
            total += value * float(weight)
        return ratio(total, weights.sum())

    return _OfClasses(name, picker, _counts_per_class, figure)


def f1(
    *,
    average: str = "macro",
    positive: int = 1,
    classes: int | None = None,
    threshold: float | None = None,
    class_dim: int = -1,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The harmonic mean of precision and recall: 2 hits / (predicted + true).

    average: "macro" (the mean over the classes that are in the labels or in the predictions), "weighted" (by the number
    of labels), "micro" (over all counts), "binary" (the class `positive`), or "none" (each class by its number; None
    for an absent class). The other arguments are those of `accuracy`.
    """
    picker = ClassPicker(classes, threshold, class_dim, ignore_index, pick)
    return _averaged("f1", average, positive, picker, lambda hits, predicted, true: (2 * hits, predicted + true))


def precision(
    *,
    average: str = "macro",
    positive: int = 1,
    classes: int | None = None,
    threshold: float | None = None,
    class_dim: int = -1,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The share of predictions of a class that are right: hits / predicted. The arguments are those of `f1`."""
    picker = ClassPicker(classes, threshold, class_dim, ignore_index, pick)
    return _averaged("precision", average, positive, picker, lambda hits, predicted, true: (hits, predicted))


def recall(
    *,
    average: str = "macro",
    positive: int = 1,
    classes: int | None = None,
    threshold: float | None = None,
    class_dim: int = -1,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The share of labels of a class that are predicted correctly: hits / true. The arguments are those of `f1`."""
    picker = ClassPicker(classes, threshold, class_dim, ignore_index, pick)
    return _averaged("recall", average, positive, picker, lambda hits, predicted, true: (hits, true))


def confusion(
    *,
    classes: int | None = None,
    threshold: float | None = None,
    class_dim: int = -1,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The confusion matrix: for each true class, the counts of the predicted classes. The arguments are those of
    `accuracy`.
    """

    def count(of: Classes) -> Totals:
        cells = np.bincount(of.true * of.number + of.predicted, minlength=of.number**2)
        return {"cells": cells.reshape(of.number, of.number)}

    picker = ClassPicker(classes, threshold, class_dim, ignore_index, pick)
    return _OfClasses(
        "confusion", picker, count, lambda totals: [[int(cell) for cell in row] for row in totals["cells"]]
    )


class _Auroc(Metric):
    name = "auroc"

    def __init__(self, thresholds: int, from_logits: bool, ignore_index: int | None, pick: Pick) -> None:
        self._thresholds, self._from_logits = thresholds, from_logits
        self._ignore_index, self._pick = ignore_index, pick

    def measure(self, measured: Measured) -> Totals:
        scores, labels = self._pick(measured.output, measured.batch)
        if scores.shape != labels.shape or not scores.is_floating_point():
            raise ConfigError(
                "auroc needs one score for each label",
                expected=f"scores of shape {list(labels.shape)}",
                got=f"shape {list(scores.shape)}, type {scores.dtype}",
                hint="for scores of two classes, pick the difference: pick=lambda output, batch: "
                "(output[:, 1] - output[:, 0], batch[1]), with from_logits=True",
            )
        counts = counting(labels, self._ignore_index)
        scores, labels = scores[counts].double(), labels[counts]
        if self._from_logits:
            scores = scores.sigmoid()
        elif scores.numel() and not (float(scores.min()) >= 0 and float(scores.max()) <= 1):
            raise ConfigError(
                "auroc got scores that aren't probabilities",
                expected="scores from 0 to 1, or from_logits=True",
                got=f"scores from {float(scores.min()):g} to {float(scores.max()):g}",
            )
        bins = (scores * self._thresholds).long().clamp(max=self._thresholds - 1)
        found = [torch.bincount(bins[labels == label], minlength=self._thresholds) for label in (0, 1)]
        if sum(int(each.sum()) for each in found) != labels.numel():
            raise ConfigError("auroc needs labels of 0 and 1", got=f"labels of type {labels.dtype} with other values")
        return {"negatives": found[0].cpu().numpy(), "positives": found[1].cpu().numpy()}

    def figure(self, totals: Totals) -> Figure:
        negatives, positives = totals["negatives"], totals["positives"]
        below = np.concatenate([[0], np.cumsum(negatives)[:-1]])
        # Pairs in one bin count half. The number of pairs may exceed int64, but Python's integers don't overflow.
        bins = zip(positives.tolist(), below.tolist(), negatives.tolist(), strict=True)
        twice = sum(positive * (2 * lower + negative) for positive, lower, negative in bins)
        return ratio(twice, 2 * int(negatives.sum()) * int(positives.sum()))


def auroc(
    *,
    thresholds: int = 200,
    from_logits: bool = False,
    ignore_index: int | None = -100,
    pick: Pick = output_and_labels,
) -> Metric:
    """The area under the ROC curve of binary labels, from histograms of the scores in `thresholds` equal bins.

    Pairs of samples in the same bin count half, so the figure is exact up to the resolution of the bins. For the exact
    figure, use `collected`. from_logits: apply the sigmoid to the scores; without it they must be from 0 to 1.
    """
    if thresholds < 2:
        raise ConfigError("thresholds is out of range", expected="at least 2", got=thresholds)
    return _Auroc(thresholds, from_logits, ignore_index, pick)
