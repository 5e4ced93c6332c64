"""Reads what `recipe.loss` returned: the loss, its weight, and named metrics.

A loss function returns a scalar, or `(sum, weight)`, or `(either of these, {name: (sum, weight)})`. The sums and the
weights of a step's micro-batches are added in index order, in fp64, and divided once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from manyhands.comm.agreement import agree, all_gather_json
from manyhands.comm.group import Group
from manyhands.engine.step.control import Control, added_in_order
from manyhands.errors import ConfigError

Number = Tensor | float

_EXPECTED = "a scalar tensor with a gradient, or (sum, weight), or (either of these, {name: (sum, weight)})"

_ROUNDED_ABOVE = {"torch.bfloat16": 256, "torch.float16": 2048}
"""For each dtype of low precision: the number up to which it represents every whole number."""


class LossForm(NamedTuple):
    """The form of a loss function's results, which is the same for all micro-batches of a run.

    weighted: True for `(sum, weight)`, False for a scalar. metrics: the names of the metrics, sorted.
    """

    weighted: bool
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class LossResult:
    """The result of the loss function for one micro-batch.

    loss: a scalar tensor with a gradient. weight: the returned weight, or 1.0 if the loss function returned no weight.
    metrics: the (sum, weight) of each metric, in the order of `LossForm.metrics`.
    """

    loss: Tensor
    weight: Number
    metrics: tuple[tuple[Number, Number], ...] = ()

    def of_samples(self, share: float, form: LossForm) -> LossResult:
        """Return the result for a micro-batch that has only a share of the usual samples.

        A mean then has a smaller weight, so that each sample of the step counts the same. A weighted sum is unchanged.
        """
        return self if share == 1 or form.weighted else LossResult(self.loss * share, share, self.metrics)

    def detached(self) -> LossResult:
        """Return the result without its graph, which would take memory until the end of the step."""
        return LossResult(self.loss.detach(), self.weight, self.metrics)


class LossReader:
    """Reads the results of `recipe.loss`, which must have one form in all micro-batches and on all workers.

    trains: False for evaluations, in which a loss has no gradient.
    form: the form of the first result. Before the first result, it is the form of a scalar.
    is_agreed: True if all workers have the same form.
    """

    def __init__(self, *, trains: bool = True) -> None:
        self.form = LossForm(False, ())
        self._trains = trains
        self._is_known = self.is_agreed = False

    def read(self, result: object) -> LossResult:
        """Read a result. Raises ConfigError."""
        form, read = _read(result, self._trains)
        if self._is_known and form != self.form:
            raise ConfigError(
                "recipe.loss returned a different form than before",
                expected=_described(self.form),
                got=_described(form),
                hint="return a result of the same form in every micro-batch: micro-batches with and without weights "
                "can't be averaged;"
                " a metric that a micro-batch lacks is (0, 0)",
            )
        self.form, self._is_known = form, True
        return read

    def agree(self, group: Group) -> None:
        """Check, after the first micro-batches, that all workers have the same form. Collective. Raises ConfigError.

        A worker that has computed no micro-batch takes the form of its peers.
        """
        mine = self.form if self._is_known else None
        forms = [None if form is None else LossForm(form[0], tuple(form[1])) for form in _all_forms(group, mine)]
        known = next((form for form in forms if form is not None), self.form)
        agree(
            group,
            "loss function",
            {"the returned form": _described(self.form if self._is_known else known)},
            hint="return a result of the same form from recipe.loss for all micro-batches",
        )
        self.form, self._is_known, self.is_agreed = known, True, True

    def values(self, results: Mapping[int, LossResult], micro_batches: int) -> np.ndarray:
        """Return the results of this worker's micro-batches as fp64, with zeros for the other micro-batches.

        The shape is [2 + 2 * metrics, micro_batches]. The rows are the losses, the weights, and the sums and weights of
        each metric.
        """
        values = np.zeros((2 + 2 * len(self.form.metrics), micro_batches))
        for micro_batch, result in results.items():
            pairs = ((result.loss, result.weight), *result.metrics)
            values[:, micro_batch] = [float(number) for pair in pairs for number in pair]
        return values

    def metrics(self, control: Control) -> dict[str, float]:
        """Return the step's metrics by name. A metric whose weight is zero in every micro-batch is NaN."""
        found = {}
        for index, name in enumerate(self.form.metrics):
            total, weight = (added_in_order(row) for row in control.metrics[2 * index : 2 * index + 2])
            found[name] = total / weight if weight else math.nan
        return found


def _all_forms(group: Group, mine: LossForm | None) -> list[Any]:
    return all_gather_json(group, mine, "start / form of the loss / control")


def _described(form: LossForm) -> str:
    loss = "(sum, weight)" if form.weighted else "a scalar"
    return f"{loss} and the metrics {', '.join(map(repr, form.metrics))}" if form.metrics else loss


def _read(result: object, trains: bool) -> tuple[LossForm, LossResult]:
    loss, metrics = result, {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, metrics = result[0], {name: _metric(name, pair) for name, pair in result[1].items()}
    weighted = isinstance(loss, tuple) and len(loss) == 2
    loss, weight = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, 1.0)
    if wrong := _wrong_loss(loss, trains):
        raise ConfigError("recipe.loss did not return a loss", expected=_EXPECTED, got=wrong, hint=_hint(result, loss))
    if wrong := _wrong_number(weight):
        raise ConfigError(
            "recipe.loss did not return a loss",
            expected=_EXPECTED,
            got=f"{wrong} as the weight",
            hint=_hint(result, loss),
        )
    form = LossForm(weighted, tuple(sorted(metrics)))
    pairs = tuple(metrics[name] for name in form.metrics)
    return form, LossResult(loss, weight, pairs)  # type: ignore[arg-type]


def _wrong_loss(loss: object, trains: bool) -> str | None:
    """Describe what is wrong with a loss, or return None if it is valid. trains: True if it must have a gradient."""
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    if loss.numel() != 1:
        return f"a tensor of shape {tuple(loss.shape)}"
    if not loss.is_floating_point():
        return f"a tensor of type {loss.dtype}"
    if loss.device.type == "meta":
        return "a tensor without a value, on the meta device"
    return (
        None
        if loss.requires_grad or not trains
        else "a tensor without a gradient (from detach(), no_grad() or item()?)"
    )


def _wrong_number(number: object) -> str | None:
    """Describe what is wrong with a weight or with a number of a metric, or return None if it is valid."""
    if not isinstance(number, Tensor):
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        return None if is_number else f"{number!r}" if isinstance(number, bool) else type(number).__name__
    if number.numel() != 1:
        return f"a tensor of shape {tuple(number.shape)}"
    if number.is_complex() or str(number.dtype) == "torch.bool":
        return f"a tensor of type {number.dtype}"
    if limit := _ROUNDED_ABOVE.get(str(number.dtype)):
        return f"a tensor of type {number.dtype}, which rounds counts above {limit},"
    return "a tensor with a gradient, though weights are constants," if number.requires_grad else None


def _metric(name: object, pair: object) -> tuple[Number, Number]:
    """Check one metric, and detach its sum. Raises ConfigError."""
    wrong: str | None = f"{type(pair).__name__}"
    if isinstance(pair, tuple) and len(pair) == 2:
        total = pair[0].detach() if isinstance(pair[0], Tensor) else pair[0]
        if isinstance(total, Tensor) and str(total.dtype) in _ROUNDED_ABOVE:
            total = total.float()  # a sum may be rounded, but a count may not
        wrong = _wrong_number(total) or _wrong_number(pair[1])
        if wrong is None and isinstance(name, str) and name:
            return total, pair[1]
    raise ConfigError(
        f"recipe.loss returned the metric {name!r} in a form other than (sum, weight)",
        expected="a name and two numbers or scalar tensors, for example {'accuracy': (correct, len(batch))}",
        got=wrong or f"a name of type {type(name).__name__}",
        hint="for a mean over the micro-batch, return (mean * count, count)",
    )


def _hint(result: object, loss: object) -> str:
    """State what to return in place of `result`. loss: the part of `result` that was taken for the loss."""
    of_model = result[0] if isinstance(result, (tuple, list)) and result else result
    if isinstance(of_model, Mapping) or hasattr(of_model, "loss"):
        name = ".loss" if hasattr(of_model, "loss") else '["loss"]'
        return f"if the model returns an object, return only its loss: here, the result's {name}"
    if isinstance(result, list):
        return "return a tuple instead of a list"
    if isinstance(loss, float):
        return "return the tensor itself, before .item() or float(), so that it has a gradient"
    if isinstance(loss, Tensor) and loss.numel() > 1:
        return (
            "if these are the losses of samples or tokens, return loss.mean(), or their sum and number: "
            "(loss.sum(), loss.numel())"
        )
    if isinstance(loss, Tensor) and loss.is_floating_point() and loss.device.type != "meta" and not loss.requires_grad:
        return "compute the loss from the model's output, without detach(), item() and no_grad()"
    return (
        "return only its loss if the model returns more than that, for example model(**batch).loss;"
        ' return other figures as metrics: (loss, {"accuracy": (correct, count)})'
    )
