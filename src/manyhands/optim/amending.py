"""Changes hyperparameters of optimizers in the middle of a run.

A setting is `optimizer.KEY`, for the entry KEY of all param groups, or `optimizer.2.KEY`, for the third group alone.
`optimizer.lr` changes the learning rate at which schedules start, so the rate of each later step changes in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manyhands.errors import ConfigError
from manyhands.options import hint_nearest

_RATES = ("lr", "max_lr", "min_lr")
"""Entries of a param group that are proportional to its initial learning rate. OneCycleLR adds the last two."""

_LISTS_OF_RATES = ("base_lrs", "max_lrs")
"""Attributes in which schedules keep a rate for each param group. CyclicLR has the second one."""


class _Group(NamedTuple):
    """A param group of `optimizer`: entries, and its position in that optimizer."""

    optimizer: Optimizer
    entries: dict[str, Any]
    position: int


def check_change(key: str, value: Any, optimizers: Sequence[Optimizer]) -> None:
    """Raise ConfigError if the optimizers have no setting `key`, or if it can't have this value."""
    for index, group in _targets(key, optimizers):
        name = key.rpartition(".")[2]
        old = group.entries[name]
        is_list = isinstance(old, (list, tuple))
        fits = len(old) == len(value) if is_list and isinstance(value, list) else is_list == isinstance(value, list)
        if isinstance(old, (bool, str)) or old is None or not fits:
            raise ConfigError(
                f"{key} can't be amended to this value",
                where=f"param group {index}",
                expected="a number, or a list of numbers of the same length, like the present value",
                got=f"{value!r}; the present value is {old!r}",
            )
        if name == "lr" and not value >= 0:
            raise ConfigError(f"{key} is out of range", expected="a number of at least 0", got=repr(value))
        if name == "lr" and not group.entries.get("initial_lr", 1):
            raise ConfigError(
                f"{key} can't be amended, because the schedule starts at 0",
                where=f"param group {index}",
                expected="an initial learning rate above 0, because the schedule's rates are proportional to it",
            )
    names = [index for index, _ in _targets(key, optimizers)]
    values = {repr(_present(group, key.rpartition(".")[2])) for _, group in _targets(key, optimizers)}
    if len(values) > 1:
        raise ConfigError(
            f"the param groups have different values of {key}",
            got=", ".join(sorted(values)),
            hint=f"name one group: optimizer.{names[0]}.{key.rpartition('.')[2]}, or another number up to {names[-1]}",
        )


def apply_changes(
    changes: Mapping[str, Any], optimizers: Sequence[Optimizer], schedules: Sequence[LRScheduler]
) -> None:
    """Change settings in the optimizers' param groups, and in the schedules that start from them. Call this once for
    the changes of a step.

    changes: setting -> new value. If two of them change the same entry of a param group, the later one decides.
    """
    last: dict[tuple[int, str], tuple[_Group, Any]] = {}
    for key, value in changes.items():
        for index, group in _targets(key, optimizers):
            last[index, key.rpartition(".")[2]] = group, value
    for (_, name), (group, value) in last.items():
        if name == "lr" and "initial_lr" in group.entries:
            _rescale(group, float(value), schedules)
        else:
            is_float = isinstance(group.entries[name], float)
            group.entries[name] = tuple(value) if isinstance(value, list) else float(value) if is_float else value


def _rescale(group: _Group, value: float, schedules: Sequence[LRScheduler]) -> None:
    if group.entries["initial_lr"] == 0 != value:
        raise ConfigError(
            "a learning rate of 0 can't be amended under a schedule",
            expected="an earlier rate above 0, because the schedule's rates are multiplied by new rate / earlier rate",
            got=f"{value:g} after 0",
            hint="amend the rate to a small number instead of 0, or skip the steps with --skip-step",
        )
    ratio = value / group.entries["initial_lr"] if value else 0.0
    for name in _RATES:
        if name in group.entries:
            group.entries[name] = group.entries[name] * ratio
    group.entries["initial_lr"] = value
    for schedule in schedules:
        if getattr(schedule, "optimizer", None) is group.optimizer:
            for each in _with_inner(schedule):
                for name in _LISTS_OF_RATES:
                    rates = getattr(each, name, None)
                    if isinstance(rates, list):
                        rates[group.position] = value if name == "base_lrs" else rates[group.position] * ratio


def _with_inner(schedule: LRScheduler) -> Iterator[LRScheduler]:
    yield schedule
    for inner in getattr(schedule, "_schedulers", ()):
        yield from _with_inner(inner)


def _present(group: _Group, name: str) -> Any:
    return group.entries.get("initial_lr", group.entries["lr"]) if name == "lr" else group.entries[name]


def _targets(key: str, optimizers: Sequence[Optimizer]) -> list[tuple[int, _Group]]:
    """Return the param groups that a setting belongs to, with their numbers. Raises ConfigError if there are none."""
    groups = [
        _Group(optimizer, group, position)
        for optimizer in optimizers
        for position, group in enumerate(optimizer.param_groups)
    ]
    table, _, rest = key.partition(".")
    number, _, name = rest.rpartition(".")
    found = [
        (index, group)
        for index, group in enumerate(groups)
        if table == "optimizer" and number in ("", str(index)) and name in group.entries and name != "params"
    ]
    if not found or (not number and len(found) < len(groups)):
        names = sorted({name for group in groups for name in group.entries} - {"params", "param_names", "initial_lr"})
        known = ["clip_norm", *(f"optimizer.{name}" for name in names)]
        raise ConfigError(
            f"there is no setting {key} that can be amended",
            expected=f"{', '.join(known)}; of one param group alone: optimizer.0.lr, for example",
            hint=hint_nearest(key.replace("arguments.", ""), known),
        )
    return found
