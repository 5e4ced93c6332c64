"""Working copies of the recipe's optimizers, which update the slices of a run."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import torch
from torch.optim import optimizer as torchs

from manyhands.errors import ConfigError
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.optim.plain_values import copied, is_plain
from manyhands.optim.shared_state import (
    SharedState,
    difference,
    is_shared,
    merged,
    restore_shared_state,
    shared_state_of,
)

_HOOK_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""The code of the function that torch puts around `step` to call the step hooks."""


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the full name of the optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


class WorkingCopy:
    """A copy of an optimizer that updates slices. It calls no step hooks, because it is called several times per step.

    tracks: True if the optimizer may change its shared state in a step. in_bf16: True if it multiplies in bf16.
    optimizer: the copy. Its state belongs to the slices.
    """

    def __init__(self, front: torch.optim.Optimizer, *, tracks: bool, in_bf16: bool) -> None:
        self.optimizer, self.tracks = _copy_of(front), tracks
        self._in_bf16 = in_bf16
        self._before: SharedState | None = None
        self._after: SharedState | None = None

    def begin_step(self, shared: SharedState) -> None:
        """Set the values from which all calls of the next step start."""
        self._before, self._after = shared, None

    def step(self, groups: list[dict[str, Any]]) -> None:
        """Update the slices in these param groups; those without a gradient are not changed.

        If the shared state is tracked, `groups` are all groups of the optimizer, in order, some of them without slices.
        Raises ConfigError if the shared state then differs from that after an earlier call of the same step.
        """
        copy = self.optimizer
        if not self.tracks:
            copy.param_groups = groups
            self._call()
        elif any(param.grad is not None for group in groups for param in group["params"]):
            self._add(self._called(groups))

    def end_step(self) -> SharedState | None:
        """Return the shared state after the step; None if no slice had a gradient."""
        return self._after

    def step_without_gradients(self) -> SharedState:
        """Return the shared state after a step in which no parameter has a gradient, on any worker."""
        if self._before is None:
            raise ValueError("begin_step was not called")
        return self._called([{"params": []} for _ in self._before.groups])

    def _called(self, groups: list[dict[str, Any]]) -> SharedState:
        copy = self.optimizer
        copy.param_groups = [
            {key: list(group[key]) for key in ("params", "param_names") if key in group} for group in groups
        ]
        if self._before is not None:
            restore_shared_state(copy, self._before)
        self._call()
        found = shared_state_of(copy)
        for index, entries in enumerate(found.groups):
            for key, value in entries.items():
                if not is_plain(value):
                    raise untracked(copy, f"entry {key!r} of param group {index}: {value!r}")
        return found

    def _call(self) -> None:
        with bf16_products_in_fp32(self._in_bf16):
            _without_hooks(type(self.optimizer).step)(self.optimizer)

    def _add(self, found: SharedState) -> None:
        self._after = found if self._after is None else agreed(self._after, found, self.optimizer)


def agreed(first: SharedState, second: SharedState, optimizer: torch.optim.Optimizer) -> SharedState:
    """Return the shared state after two calls of a step. Raises ConfigError if they differ."""
    differing = difference(first, second)
    if differing is not None:
        raise ConfigError(
            f"{class_name(optimizer)} can't be applied to parts of the parameters: a value that it keeps for "
            "all of them (an attribute, or an entry of a param group) depends on which parts it is given",
            expected="the same value after each call of `step`, whatever parameters its param groups hold",
            got=differing,
            hint="keep what depends on a parameter in self.state[param]",
        )
    return merged(first, second)


def untracked(optimizer: torch.optim.Optimizer, got: str) -> ConfigError:
    """Return the error for shared state that can't be copied, compared and saved."""
    return ConfigError(
        f"{class_name(optimizer)} changes values in its step that can't be tracked",
        expected="plain numbers and text as attributes and param group entries; tensors in self.state[param]",
        got=got,
    )


def _without_hooks(step: Any) -> Any:
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOK_WRAPPER else step


def _refuse_global_hooks(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise ConfigError if there are global hooks. This hook runs if `step` calls the `step` of a base class.

    torch lets that `step` call hooks only if an object of the base class was created before.
    """
    if torchs._global_optimizer_pre_hooks or torchs._global_optimizer_post_hooks:
        raise ConfigError(
            f"the step of {class_name(optimizer)} calls step hooks that are registered for all optimizers",
            expected="such hooks to be called once in a step",
            got="a call of super().step(), which calls them for each part of the parameters",
            hint="register the hooks on the optimizer, with register_step_post_hook",
        )


def _copy_of(front: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a copy without state, groups and hooks. It shares with `front` only attributes that are not plain."""
    copy: torch.optim.Optimizer = object.__new__(type(front))
    attributes = vars(copy)
    attributes.update(vars(front), state=defaultdict(dict), param_groups=[])
    attributes["_optimizer_step_pre_hooks"] = {0: _refuse_global_hooks}
    attributes["_optimizer_step_post_hooks"] = {}
    attributes.pop("step", None)  # a schedule's wrapper; other replacements are refused
    for name, value in attributes.items():
        if isinstance(value, types.MethodType) and value.__self__ is front:
            attributes[name] = types.MethodType(value.__func__, copy)
        elif is_shared(name, value):
            attributes[name] = copied(value)
    return copy
