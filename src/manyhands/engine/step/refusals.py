"""Refuses a step on all workers, before any state has changed: values that are not finite, and wrong weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from manyhands.config import Recipe
from manyhands.data.stream_samples import training_samples
from manyhands.engine.step.control import Control, added_in_order
from manyhands.engine.step.loss import LossForm
from manyhands.errors import ConfigError, NumericsError
from manyhands.intervals import step_number

_A_COUNT = "the number of samples or tokens that the sum was taken over"


def not_finite(
    control: Control, param_names: Sequence[str], recipe: Recipe, batch_index: int, hint: str
) -> NumericsError | None:
    """Return the error if a loss, gradient or weight is not finite, or if there is no weight, and otherwise None.

    `control` is the same on all workers, so all of them get the same error.
    """
    step, bad_losses = step_number(batch_index // recipe.num_islands), np.flatnonzero(~np.isfinite(control.losses))
    tag = f"step {step}"
    skip = f"; to continue without this step: --skip-step {step} (skip_steps=[{step}])"
    # A bad loss causes bad gradients, so the loss is reported unless an earlier micro-batch has a bad gradient.
    if control.bad is not None and not (len(bad_losses) and bad_losses[0] <= control.bad[0]):
        loss = control.losses[control.bad[0]]
        return NumericsError(
            f"the gradient of {param_names[control.bad[1]]!r} is not finite in micro-batch {control.bad[0]}",
            where=f"{tag}, {training_samples(recipe).described(batch_index, control.bad[0])}; the loss is {loss:g}",
            hint=f"lower the learning rate, set clip_norm, or inspect those samples; no weight has been changed{skip}",
        )
    if len(bad_losses):
        return NumericsError(
            f"the loss of micro-batch {bad_losses[0]} is {control.losses[bad_losses[0]]:g}",
            where=f"{tag}, {training_samples(recipe).described(batch_index, int(bad_losses[0]))}",
            hint=f"inspect those samples, or lower the learning rate; no weight has been changed{hint}{skip}",
        )
    return _weight_error(control, tag, skip)


def refuse_weights(control: Control, form: LossForm, *, fractional: bool, tag: str) -> None:
    """Raise ConfigError if a weight is negative, or is fractional and `fractional` is False.

    `control` is the same on all workers, so all of them raise.
    """
    for micro_batch, (loss, weight) in enumerate(zip(control.losses, control.weights, strict=True)):
        if weight < 0:
            raise ConfigError(
                f"the weight of micro-batch {micro_batch} is negative: {weight:g}",
                where=tag,
                expected=_A_COUNT,
                hint=_readings(loss, weight),
            )
        if form.weighted and math.isfinite(weight) and not weight.is_integer() and not fractional:
            raise ConfigError(
                f"the weight of micro-batch {micro_batch} is not a whole number: {weight:g}",
                where=tag,
                expected=f"(sum, weight), where the weight is {_A_COUNT}",
                got=f"({loss:g}, {weight:g})",
                hint=_readings(loss, weight),
            )


def _readings(loss: float, weight: float) -> str:
    mean = f" (a mean of {loss / weight:g})" if weight else ""
    return (
        f"the pair is read as a sum of {loss:g} over {weight:g} samples or tokens{mean}, and the step divides its"
        " gradient by the total weight. To report another figure, return it as a metric:"
        ' (loss, {"accuracy": (correct, count)}). If the weights are meant to be fractions, set'
        " fractional_weights = true in the recipe"
    )


def _weight_error(control: Control, tag: str, skip: str) -> NumericsError | None:
    """Return the error for weights that aren't finite, or whose sum isn't positive, and otherwise None."""
    bad = np.flatnonzero(~np.isfinite(control.weights))
    if len(bad):
        return NumericsError(
            f"the weight of micro-batch {bad[0]} is {control.weights[bad[0]]:g}",
            where=tag,
            expected=_A_COUNT,
            hint=_readings(control.losses[bad[0]], control.weights[bad[0]]) + skip,
        )
    weight = added_in_order(control.weights)
    if 0 < weight < math.inf:
        return None
    return NumericsError(
        "the global batch has no weight",
        where=tag,
        expected="a positive sum of the loss function's weights",
        got=weight,
        hint=_readings(added_in_order(control.losses), weight) + skip,
    )
