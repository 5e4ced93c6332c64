"""From a model to its units: parameters that travel together, of one dtype, all trainable or all frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from manyhands.config import nearest
from manyhands.errors import ConfigError

SMALL_NUMEL = 1 << 18
"""Neighbours of one kind travel together until they have this many elements: a message has a price of its own."""


@dataclass(frozen=True)
class UnitPlan:
    """A unit to be: its name, its parameters' names in construction order, and what they have in common.

    modules: the names of the modules in whose forwards they are used: the repeated or named ones that they belong to,
    and those that own one of them. () for what belongs to no such module, and may be used anywhere.
    """

    name: str
    params: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool
    modules: tuple[str, ...] = ()


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
        plan = UnitPlan(
            name, tuple(names), dtype, trainable, _using_modules(model, names, root) if root in roots else ()
        )
        if last is not None and not named_units and _may_join(last, plan, numels):
            first = last.name.partition(" to ")[0]
            using = tuple(dict.fromkeys(last.modules + plan.modules))
            plans[-1] = replace(plan, name=f"{first} to {name}", params=last.params + plan.params, modules=using)
        else:
            plans.append(plan)
    return plans


def _may_join(last: UnitPlan, plan: UnitPlan, numels: Mapping[str, int]) -> bool:
    alike = (last.dtype, last.trainable, bool(last.modules)) == (plan.dtype, plan.trainable, bool(plan.modules))
    return alike and sum(numels[name] for name in (*last.params, *plan.params)) <= SMALL_NUMEL


def _using_modules(model: nn.Module, names: Sequence[str], root: str) -> tuple[str, ...]:
    params = dict(model.named_parameters())
    wanted = {id(params[name]) for name in names}
    owners = [
        name
        for name, module in model.named_modules()
        if any(id(param) in wanted for param in module.parameters(recurse=False))
    ]
    return tuple(dict.fromkeys([root, *owners]))


def _repeated_children(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
            name.startswith(outer + ".") for outer in found
        ):
            found.extend(f"{name}.{child}" if name else child for child, _ in module.named_children())
    return found
