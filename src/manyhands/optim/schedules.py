"""Builds and advances the recipe's LR schedules, and describes them so that a change of the recipe is noticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manyhands.errors import ConfigError

_PROGRESS = ("_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
"""Entries of a schedule's state that only record its progress."""


def build_schedules(
    schedule: Callable[[Optimizer], LRScheduler] | None, optimizers: Sequence[Optimizer], figure: str | None
) -> tuple[LRScheduler, ...]:
    """Call the recipe's `schedule` for each optimizer. Raises ConfigError if it does not return a usable schedule.

    figure: the name of the figure of a validation for schedules that need one, or None.
    """
    built = () if schedule is None else tuple(_call(schedule, index, optimizers) for index in range(len(optimizers)))
    for found, optimizer in zip(built, optimizers, strict=False):
        if not all(callable(getattr(found, name, None)) for name in ("step", "state_dict", "load_state_dict")):
            raise ConfigError(
                "recipe.schedule did not return a schedule",
                expected="a torch LR scheduler, such as CosineAnnealingLR(optimizer, T_max=1000)",
                got=repr(found),
                hint="return the scheduler" if found is None else None,
            )
        if isinstance(found, type) or getattr(found, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                "recipe.schedule returned a schedule of another optimizer",
                expected="a schedule of the optimizer that was passed to it",
                got=repr(found),
                hint="build the schedule with the argument of recipe.schedule",
            )
    needs_figure = any(isinstance(each, ReduceLROnPlateau) for each in built)
    if needs_figure and figure is None:
        raise ConfigError(
            "recipe.schedule needs a figure of a validation",
            expected='schedule_on="validation.loss", for example',
            got="ReduceLROnPlateau",
        )
    if figure is not None and not needs_figure:
        raise ConfigError(
            "recipe.schedule_on is set, but no schedule needs a figure",
            expected="a schedule that is a ReduceLROnPlateau",
            got=", ".join(type(each).__qualname__ for each in built) or "no schedule",
        )
    return built


def _call(schedule: Callable[[Optimizer], LRScheduler], index: int, optimizers: Sequence[Optimizer]) -> LRScheduler:
    """Call the recipe's `schedule` for one optimizer. If it raises, a note says which optimizer it was called for."""
    try:
        return schedule(optimizers[index])
    except Exception as error:
        if len(optimizers) > 1:
            error.add_note(
                f"recipe.schedule is called once for each of the {len(optimizers)} optimizers. This call was for the "
                f"one at index {index}, {type(optimizers[index]).__name__}, which has "
                f"{len(optimizers[index].param_groups)} param group(s)."
            )
        raise


def advance(schedules: Sequence[LRScheduler]) -> None:
    """Advance the schedules after a step, except for those that a figure of a validation advances."""
    for schedule in schedules:
        if not isinstance(schedule, ReduceLROnPlateau):
            schedule.step()


def advance_by_figure(schedules: Sequence[LRScheduler], value: float | None) -> None:
    """Advance the schedules that need the figure of a validation.

    A figure of None, for which no sample counts, has the effect of NaN.
    """
    for schedule in schedules:
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(math.nan if value is None else value)


def schedule_facts(
    schedules: Sequence[LRScheduler], groups: Sequence[Mapping[str, Any]], facts: Mapping[str, str]
) -> dict[str, str]:
    """Return the schedules' classes and their state before the first step, as text. Raises ConfigError.

    Schedules inside of others (SequentialLR, ChainedScheduler) are described in the same way. groups: the param groups
    of all optimizers. The result includes entries that schedules added to them, as OneCycleLR does. facts: the
    optimizers' facts from before the schedules were built.
    """
    found = {"schedule": ", ".join(type(schedule).__qualname__ for schedule in schedules) or "none"}
    for index, schedule in enumerate(schedules):
        found |= _facts_of(schedule, f"schedule {index}.", is_inner=False)
    for index, group in enumerate(groups):
        added = {f"optimizer group {index}.{key}": str(value) for key, value in group.items() if key != "initial_lr"}
        found |= {name: value for name, value in added.items() if schedules and name not in facts}
    return found


def _facts_of(schedule: LRScheduler, prefix: str, *, is_inner: bool = True) -> dict[str, str]:
    if is_inner and isinstance(schedule, ReduceLROnPlateau):
        raise ConfigError(
            "a schedule that needs a figure of a validation is inside another schedule",
            expected="ReduceLROnPlateau alone, or schedules that depend on the step alone",
            got=f"ReduceLROnPlateau as {prefix.strip('.')}",
        )
    _refuse_unsaved_functions(schedule)
    inner = getattr(schedule, "_schedulers", ())
    state = {key: value for key, value in schedule.state_dict().items() if key not in (*_PROGRESS, "_schedulers")}
    found = {f"{prefix}{key}": str(_comparable(value)) for key, value in state.items()}
    for number, each in enumerate(inner):
        name = f"{prefix}schedule {number}"
        found |= {name: type(each).__qualname__, **_facts_of(each, f"{name}.")}
    return {name: value for name, value in found.items() if value != "None"}


def _refuse_unsaved_functions(schedule: LRScheduler) -> None:
    """Raise ConfigError if a schedule calls a function that returns a different value when it is called again.

    A checkpoint has the state of callable objects, but not what a function keeps in variables. (torch's LambdaLR and
    MultiplicativeLR save the __dict__ of their objects.)
    """
    for function in getattr(schedule, "lr_lambdas", ()):
        if not isinstance(function, (FunctionType, partial)):
            continue
        first, second = function(schedule.last_epoch), function(schedule.last_epoch)
        if repr(first) != repr(second):
            raise ConfigError(
                "a function of recipe.schedule returned a different value when it was called again",
                expected=f"{first!r} in both calls with the argument {schedule.last_epoch}",
                got=repr(second),
                hint="checkpoints don't hold what a function counts: let it depend on its argument alone, or pass a"
                " callable object, whose attributes are saved",
            )


def _comparable(value: Any) -> Any:
    """Return plain values unchanged. For other objects, return the type, because their text may contain an address."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    if isinstance(value, dict):
        return {_comparable(key): _comparable(item) for key, item in value.items()}
    return type(value).__qualname__
