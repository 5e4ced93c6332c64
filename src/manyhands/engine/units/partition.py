"""Divides a model into units.

none.

A parameter that its optimizer must see whole is *unsplittable*: it has one owner, and a unit's shards are as long as
the load
of the unit's busiest owner. So unsplittable parameters are put together until they can be shared out with little
padding: the
four matrices of a GPT's block (3 + 1 + 4 + 4) fit three workers exactly, those of two blocks two workers, those of four
blocks four.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from manyhands.config import nearest
from manyhands.errors import ConfigError
from manyhands.layout import blocks_of, shared_evenly

SMALL_NUMEL = 1 << 18
"""Neighbours of one kind travel together until they have this many elements: a message has a price of its own."""

LITTLE_PADDING = 1 / 16
"""An unsplittable unit whose padding is at most this part of it is left as it is."""

UNSPLITTABLE_TOGETHER = 4
"""Otherwise so many neighbours may be put together, or as many as it takes for the largest parameter to be no more
than a worker's share."""


@dataclass(frozen=True)
class UnitPlan:
    """A unit to be: its name, its parameters' names in construction order, and what they have in common.

    modules: of units that are gathered, the names of the modules in whose forwards they are used: the repeated or named
    ones that they belong to, and those that own one of them. () for what belongs to none, and may be used anywhere.
    """

    name: str
    params: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool
    unsplittable: bool = False  # each parameter has one owner
    modules: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool]:
        """What all that travel together have in common."""
        return self.dtype, self.trainable, self.unsplittable, bool(self.modules)


def storage_dtype(owner: nn.Module, param: nn.Parameter, precision: str) -> torch.dtype:
    """The dtype in which a module's own parameter is kept. Batch norm stays in fp32: its kernels want it so."""
    if param.dtype != torch.float32:  # it's frozen, and was made so on purpose
        return param.dtype
    if precision == "bf16" and not isinstance(owner, nn.modules.batchnorm._BatchNorm):
        return torch.bfloat16
    return torch.float32


def plan_units(
    model: nn.Module,
    precision: str,
    named_units: Sequence[str] = (),
    *,
    unsplittable: Collection[str] = (),
    workers: int = 1,
    gathered: bool = False,
) -> list[UnitPlan]:
    """The model's units, in the construction order of their first parameters.

    named_units: modules whose parameters make a unit each; without them, the children of every outermost ModuleList
    and Sequential do. What is left goes by its top module; small neighbours are put together.
    unsplittable: parameters that must have one owner each, among `workers`. gathered: whether units are whole now
    and then
    only; what may be used anywhere is then kept apart from what belongs to modules. Raises ConfigError.
    """
    modules = dict(model.named_modules())
    for name in named_units:
        if name not in modules:
            raise ConfigError(
                "strategy.units names a module that the model doesn't have", got=repr(name), hint=nearest(name, modules)
            )
    roots = sorted(named_units, key=len, reverse=True) or repeated_children(model)
    kinds: dict[tuple[str, torch.dtype, bool, bool], list[str]] = {}
    numels = {}
    for name, param in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        root = next((root for root in roots if name.startswith(root + ".")), name.partition(".")[0])
        kind = (root, storage_dtype(owner, param, precision), param.requires_grad, name in unsplittable)
        kinds.setdefault(kind, []).append(name)
        numels[name] = param.numel()
    roots_of_several = {root for root, *_ in kinds if sum(other == root for other, *_ in kinds) > 1}
    by_kind: dict[tuple[torch.dtype, bool, bool, bool], list[UnitPlan]] = {}
    for (root, dtype, trainable, is_unsplittable), names in kinds.items():
        description = f"{str(dtype).removeprefix('torch.')}{'' if trainable else ', frozen'}"
        description += ", unsplittable" if is_unsplittable else ""
        plan = UnitPlan(
            name=f"{root} ({description})" if root in roots_of_several else root,
            params=tuple(names),
            dtype=dtype,
            trainable=trainable,
            unsplittable=is_unsplittable,
            modules=_using_modules(model, names, root) if gathered and root in roots else (),
        )
        by_kind.setdefault(plan.kind, []).append(plan)
    if not named_units:
        by_kind = {kind: _small_together(plans, numels) for kind, plans in by_kind.items()}
        by_kind = {
            kind: _evenly_together(plans, numels, workers) if plans[0].unsplittable else plans
            for kind, plans in by_kind.items()
        }
    position = {name: index for index, name in enumerate(numels)}
    return sorted((plan for plans in by_kind.values() for plan in plans), key=lambda plan: position[plan.params[0]])


def _together(plans: Sequence[UnitPlan]) -> UnitPlan:
    """One plan for neighbours of one kind."""
    first, last = plans[0], plans[-1]
    return replace(
        first,
        name=first.name if first is last else f"{first.name.partition(' to ')[0]} to {last.name.rpartition(' to ')[2]}",
        params=tuple(name for plan in plans for name in plan.params),
        modules=tuple(dict.fromkeys(name for plan in plans for name in plan.modules)),
    )


def _small_together(plans: Sequence[UnitPlan], numels: Mapping[str, int]) -> list[UnitPlan]:
    found: list[UnitPlan] = []
    for plan in plans:
        if found and sum(numels[name] for name in (*found[-1].params, *plan.params)) <= SMALL_NUMEL:
            found[-1] = _together([found[-1], plan])
        else:
            found.append(plan)
    return found


def _evenly_together(plans: Sequence[UnitPlan], numels: Mapping[str, int], workers: int) -> list[UnitPlan]:
    """As few neighbours as can be shared out with little padding; or as many as leave the least."""
    found, left = [], list(plans)
    while left:
        padding: list[float] = []
        for count in range(1, len(left) + 1):
            blocks = [blocks_of(numels[name]) for plan in left[:count] for name in plan.params]
            heaviest = sum(blocks[index] for index in shared_evenly(blocks, workers)[0])
            padding.append(heaviest * workers / max(1, sum(blocks)) - 1)
            if padding[-1] <= LITTLE_PADDING or (
                count >= UNSPLITTABLE_TOGETHER and max(blocks) * workers <= sum(blocks)
            ):
                break
        together = padding.index(min(padding)) + 1
        found.append(_together(left[:together]))
        left = left[together:]
    return found


def _using_modules(model: nn.Module, names: Sequence[str], root: str) -> tuple[str, ...]:
    params = dict(model.named_parameters())
    wanted = {id(params[name]) for name in names}
    owners = [
        name
        for name, module in model.named_modules()
        if any(id(param) in wanted for param in module.parameters(recurse=False))
    ]
    return tuple(dict.fromkeys([root, *owners]))


def repeated_children(model: nn.Module) -> list[str]:
    """The names of the children of every outermost ModuleList and Sequential."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
            name.startswith(outer + ".") for outer in found
        ):
            found.extend(f"{name}.{child}" if name else child for child, _ in module.named_children())
    return found
