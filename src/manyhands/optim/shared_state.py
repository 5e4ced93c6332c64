"""The state that an optimizer keeps for all of its parameters together: attributes, and entries of its param groups.

torch's own optimizers change neither in a step. Others do: `group["step"] += 1`, `self.k += 1`. A step calls a working
copy once for each run, so every call of a step must start from the same values and end with the same values. The end
values are then stored in the recipe's optimizer, where schedules, hooks and the next step find them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from manyhands.optim.plain_values import copied, is_plain

_NOT_SHARED = {
    # Attributes of torch's base class.
    "state",
    "param_groups",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
    "_zero_grad_profile_name",
    "_warned_capturable_if_run_uncaptured",
    # Notes that torch's optimizers and schedules make: what they have checked, and whether `step` was called.
    "_need_device_dtype_check_for_fused",
    "_opt_called",
    "step",
}
"""Attributes that are not shared state."""


@dataclass(frozen=True)
class SharedState:
    """The plain attributes and the param groups' entries of an optimizer at one time.

    used: by group, True if a parameter of the group had a gradient in the call that led to these values.
    """

    attributes: dict[str, Any]
    groups: list[dict[str, Any]]
    used: list[bool]


def shared_state_of(optimizer: torch.optim.Optimizer) -> SharedState:
    """Return a copy of an optimizer's shared state."""
    return SharedState(
        plain_attributes_of(optimizer),
        [entries_of(group) for group in optimizer.param_groups],
        [any(param.grad is not None for param in group["params"]) for group in optimizer.param_groups],
    )


def restore_shared_state(optimizer: torch.optim.Optimizer, shared: SharedState) -> None:
    """Set an optimizer's shared state. Its groups keep their parameters."""
    attributes = vars(optimizer)
    for name in [name for name, value in attributes.items() if is_shared(name, value)]:
        if name not in shared.attributes:
            del attributes[name]
    attributes.update(copied(shared.attributes))
    for group, entries in zip(optimizer.param_groups, shared.groups, strict=True):
        for key in entries_of(group).keys() - entries.keys():
            del group[key]
        group.update(copied(entries))


def entries_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a param group's entries, without its parameters."""
    return {key: copied(value) for key, value in group.items() if key not in ("params", "param_names")}


def difference(first: SharedState, second: SharedState) -> str | None:
    """Describe the first value in which two calls of the same step differ; return None if they agree."""
    found = _differing("attribute", first.attributes, second.attributes)
    for index, (one, other) in enumerate(zip(first.groups, second.groups, strict=True)):
        if found is None and first.used[index] == second.used[index]:
            found = _differing(f"param group {index}'s", one, other)
    return found


def merged(first: SharedState, second: SharedState) -> SharedState:
    """Combine the equal values of two calls of a step. Entries come from a call that used the group, if there is one.

    (An optimizer may skip groups whose parameters have no gradient.)
    """
    pairs = zip(first.groups, second.groups, second.used, strict=True)
    groups = [other if used else one for one, other, used in pairs]
    used = [one or other for one, other in zip(first.used, second.used, strict=True)]
    return SharedState(first.attributes, groups, used)


def _differing(what: str, first: dict[str, Any], second: dict[str, Any]) -> str | None:
    for name in [*first, *second]:
        one, other = (repr(values[name]) if name in values else "nothing" for values in (first, second))
        if one != other:  # compared as text, so that NaN equals NaN, and 1 differs from True
            return f"{what} {name!r}: {one} and {other}"
    return None


def is_shared(name: str, value: object) -> bool:
    """Return True if an attribute with this name and value is shared state."""
    return name not in _NOT_SHARED and is_plain(value)


def plain_attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of the plain attributes, without most attributes of torch's base class."""
    return {name: copied(value) for name, value in vars(optimizer).items() if is_shared(name, value)}


def other_attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the attributes that are not plain, and that torch's base class does not set."""
    return {name: value for name, value in vars(optimizer).items() if name not in _NOT_SHARED and not is_plain(value)}
