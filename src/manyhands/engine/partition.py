"""From a model to its units: parameters that travel together, of one dtype, all trainable or all frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from manyhands.config import nearest
from manyhands.errors import ConfigError

SMALL_NUMEL = 1 << 18
"""Neighbours of one kind travel together until they have this many elements: a message has a price of its own."""


@dataclass(frozen=True)
class UnitPlan:
    """A unit to be: its name, its parameters' names in construction order, and what they have in common."""

    name: str
    params: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool


def storage_dtype(owner: nn.Module, precision: str) -> torch.dtype:
    """The dtype in which a module's own parameters are kept. Batch norm stays in fp32: its kernels want it so."""
    if precision == "bf16" and not isinstance(owner, nn.modules.batchnorm._BatchNorm):
        return torch.bfloat16
    return torch.float32


def plan_units(model: nn.Module, precision: str, named_units: Sequence[str] = ()) -> list[UnitPlan]:
    """The model's units, in construction order.

    named_units: modules whose parameters make a unit each; without them, the children of every outermost ModuleList
    and Sequential do. What is left goes by its top module; small neighbours are put together. Raises ConfigError.
    """
    modules = dict(model.named_modules())
    for name in named_units:
        if name not in modules:
            raise ConfigError(
                "strategy.units names a module that the model doesn't have", got=repr(name), hint=nearest(name, modules)
            )
    roots = sorted(named_units, key=len, reverse=True) or _repeated_children(model)
    kinds: dict[tuple[str, torch.dtype, bool], list[str]] = {}
    numels = {}
    for name, param in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        root = next((root for root in roots if name.startswith(root + ".")), name.partition(".")[0])
        kinds.setdefault((root, storage_dtype(owner, precision), param.requires_grad), []).append(name)
        numels[name] = param.numel()
    plans: list[UnitPlan] = []
    roots_of_several = {root for root, *_ in kinds if sum(other == root for other, *_ in kinds) > 1}
    for (root, dtype, trainable), names in kinds.items():
        frozen = "" if trainable else ", frozen"
        name = f"{root} ({str(dtype).removeprefix('torch.')}{frozen})" if root in roots_of_several else root
        last = plans[-1] if plans else None
        alike = last is not None and (last.dtype, last.trainable) == (dtype, trainable) and not named_units
        if last is not None and alike and sum(numels[name] for name in (*last.params, *names)) <= SMALL_NUMEL:
            first = last.name.partition(" to ")[0]
            plans[-1] = UnitPlan(f"{first} to {name}", (*last.params, *names), dtype, trainable)
        else:
            plans.append(UnitPlan(name, tuple(names), dtype, trainable))
    return plans


def _repeated_children(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
            name.startswith(outer + ".") for outer in found
        ):
            found.extend(f"{name}.{child}" if name else child for child, _ in module.named_children())
    return found
