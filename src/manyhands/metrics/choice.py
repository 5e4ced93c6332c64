"""Finds metrics by name, and gives each figure its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.errors import ConfigError
from manyhands.metrics import classification, means
from manyhands.metrics.collected import Collected, collected
from manyhands.metrics.metric import Metric, metric_named, name_of_function
from manyhands.metrics.torchmetric import is_torchmetric, torchmetric
from manyhands.options import nearest

NAMED = {
    "accuracy": classification.accuracy,
    "auroc": classification.auroc,
    "confusion": classification.confusion,
    "f1": classification.f1,
    "mean_absolute_error": means.mean_absolute_error,
    "mean_squared_error": means.mean_squared_error,
    "perplexity": means.perplexity,
    "precision": classification.precision,
    "recall": classification.recall,
    "top_k": classification.top_k,
    "bits_per_byte": means.bits_per_byte,
    "collected": collected,
}
"""The functions that create metrics, by name."""

RESERVED = ("loss", "weight", "step", "set", "samples", "seconds")

_TOP = re.compile(r"top_(\d+)")


def chosen_metrics(given: Sequence[Any] | Mapping[str, Any], of: str) -> dict[str, Metric | Collected]:
    """Return metrics by the names of their figures. of: the name of the validation, for errors. Raises ConfigError."""
    pairs: list[tuple[str | None, Any]] = (
        list(given.items()) if isinstance(given, Mapping) else [(None, x) for x in given]
    )
    found: dict[str, Metric | Collected] = {}
    for name, value in pairs:
        if isinstance(given, Mapping) and not (isinstance(name, str) and name):
            raise ConfigError(f"the name of a metric of {of} is not text", got=repr(name))
        metric = _metric(value, name)
        if metric.name in found or metric.name in RESERVED:
            taken = "is the name of another figure" if metric.name in RESERVED else "occurs twice"
            raise ConfigError(
                f"the name of a metric of {of} {taken}",
                got=repr(metric.name),
                hint=f'name the metrics: metrics={{"my_{metric.name}": ...}}',
            )
        found[metric.name] = metric
    return found


def _metric(value: Any, name: str | None) -> Metric | Collected:
    if isinstance(value, str):
        value = _of_name(value)
    elif is_torchmetric(value):
        value = torchmetric(value)
    if isinstance(value, Collected):
        return value if name is None else value.named(name)
    if name is None:
        name = value.name if isinstance(value, Metric) else name_of_function(value)
    return metric_named(name, value)


def _of_name(name: str) -> Metric:
    top = _TOP.fullmatch(name)
    if top is not None:
        return classification.top_k(int(top[1]))
    if name not in NAMED or name in ("top_k", "bits_per_byte", "collected"):
        needs = f"manyhands.metrics.{name}(...), because it has arguments" if name in NAMED else None
        raise ConfigError(
            f"there is no metric {name!r}" if needs is None else f"the metric {name!r} needs arguments",
            expected=needs or "a name, a metric, or a function (output, batch) -> (sum, weight)",
            hint=None if needs else nearest(name, NAMED),
        )
    return NAMED[name]()  # type: ignore[operator, no-any-return]
