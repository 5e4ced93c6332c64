"""Divides a model into units.

A parameter that its optimizer must see in full is *unsplittable*: one worker owns it. All shards of a unit are as long
as its fullest shard, so an uneven division causes padding. So units of unsplittable parameters are merged until the
parameters can be divided among the workers with little padding. For example, the four matrices of a GPT block, with
relative sizes 3, 1, 4 and 4, fit three workers exactly. The matrices of two blocks fit two workers, and the matrices of
four blocks fit four workers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from manyhands.errors import ConfigError
from manyhands.options import nearest
from manyhands.shard_layout import blocks_of, divide_evenly

SMALL_NUMEL = 1 << 18
"""Neighbouring units of one kind are merged up to this many elements, because every message has a fixed cost.

Units decide only how bytes are sent, never the bits of the result: see shard_layout.py for the numbering of blocks.
"""

MAX_PADDING_FRACTION = 1 / 16
"""An unsplittable unit is not merged further if its padding is at most this fraction of its blocks."""

MIN_UNSPLITTABLE_MERGED = 4
"""If the padding is larger, merges of up to this many neighbours are considered, or of more neighbours if the largest
parameter does not fit into one worker's share. The merge with the least padding is used.
"""


@dataclass(frozen=True)
class UnitPlan:
    """The plan of a unit: its name, the names of its parameters in construction order, and their common properties.

    unsplittable: True if each parameter has one owner.
    modules: for units that are unsharded on demand, the names of the modules whose forwards use the parameters. These
    are the repeated or named modules that contain the parameters, and the modules that own one of them. The tuple is
    empty if the parameters are outside of repeated and named modules, because they may then be used anywhere.
    """

    name: str
    params: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool
    unsplittable: bool = False
    modules: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool]:
        """Return the properties that all parameters of a unit share."""
        return self.dtype, self.trainable, self.unsplittable, bool(self.modules)


def storage_dtype(owner: nn.Module, param: nn.Parameter, precision: str) -> torch.dtype:
    """Return the dtype in which a module's own parameter is stored. Batch norm's kernels require fp32."""
    if param.dtype != torch.float32:  # only a frozen parameter may have another dtype, which the user chose
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
    on_demand: bool = False,
) -> list[UnitPlan]:
    """Return the plans of the model's units, in the construction order of their first parameters.

    named_units: modules whose parameters form one unit each. If there are none, each child of an outermost ModuleList
    or Sequential forms a unit, and small neighbours are merged. Other parameters form one unit per top-level module.
    unsplittable: names of the parameters that must have one owner each. workers: the number of possible owners.
    on_demand: True if units are unsharded only while they are needed. In that case, parameters of these modules and
    parameters that may be used anywhere are in separate units.
    Raises ConfigError if `named_units` names a module that doesn't exist.
    """
    modules = dict(model.named_modules())
    for name in named_units:
        if name not in modules:
            raise ConfigError(
                "strategy.units names a module that the model doesn't have", got=repr(name), hint=nearest(name, modules)
            )
    # A parameter's own name may contain dots, so its owner can't be derived from the name. Several modules may own one
    # parameter; the first owner counts.
    backwards = reversed(list(model.modules()))
    owners = {id(param): module for module in backwards for param in module.parameters(recurse=False)}
    # If named modules contain each other, a parameter belongs to the unit of the innermost one.
    roots = sorted(named_units, key=len, reverse=True) or repeated_children(model)
    kinds: dict[tuple[str, torch.dtype, bool, bool], list[str]] = {}
    numels = {}
    for name, param in model.named_parameters():
        root = next((root for root in roots if name.startswith(root + ".")), name.partition(".")[0])
        kind = (root, storage_dtype(owners[id(param)], param, precision), param.requires_grad, name in unsplittable)
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
            modules=_using_modules(model, names, root) if on_demand and root in roots else (),
        )
        by_kind.setdefault(plan.kind, []).append(plan)
    if not named_units:
        by_kind = {kind: _merge_small(plans, numels) for kind, plans in by_kind.items()}
        by_kind = {
            kind: _merge_evenly(plans, numels, workers) if plans[0].unsplittable else plans
            for kind, plans in by_kind.items()
        }
    position = {name: index for index, name in enumerate(numels)}
    return sorted((plan for plans in by_kind.values() for plan in plans), key=lambda plan: position[plan.params[0]])


def _merge(plans: Sequence[UnitPlan]) -> UnitPlan:
    """Merge neighbours of one kind into one plan."""
    first, last = plans[0], plans[-1]
    return replace(
        first,
        name=first.name if first is last else f"{first.name.partition(' to ')[0]} to {last.name.rpartition(' to ')[2]}",
        params=tuple(name for plan in plans for name in plan.params),
        modules=tuple(dict.fromkeys(name for plan in plans for name in plan.modules)),
    )


def _merge_small(plans: Sequence[UnitPlan], numels: Mapping[str, int]) -> list[UnitPlan]:
    """Merge neighbours while they have at most SMALL_NUMEL elements together."""
    found: list[UnitPlan] = []
    for plan in plans:
        if found and sum(numels[name] for name in (*found[-1].params, *plan.params)) <= SMALL_NUMEL:
            found[-1] = _merge([found[-1], plan])
        else:
            found.append(plan)
    return found


def _merge_evenly(plans: Sequence[UnitPlan], numels: Mapping[str, int], workers: int) -> list[UnitPlan]:
    """Merge as few neighbours as `workers` workers can share with little padding, or else those with the least
    padding.
    """
    found, left = [], list(plans)
    while left:
        padding: list[float] = []
        for count in range(1, len(left) + 1):
            blocks = [blocks_of(numels[name]) for plan in left[:count] for name in plan.params]
            heaviest = sum(blocks[index] for index in divide_evenly(blocks, workers)[0])
            padding.append(heaviest * workers / max(1, sum(blocks)) - 1)
            if padding[-1] <= MAX_PADDING_FRACTION or (
                count >= MIN_UNSPLITTABLE_MERGED and max(blocks) * workers <= sum(blocks)
            ):
                break
        best = padding.index(min(padding)) + 1
        found.append(_merge(left[:best]))
        left = left[best:]
    return found


def _using_modules(model: nn.Module, names: Sequence[str], root: str) -> tuple[str, ...]:
    """Return `root`, and the modules that own one of these parameters (tied ones have several owners)."""
    params = dict(model.named_parameters())
    ids = {id(params[name]) for name in names}
    owners = [
        name
        for name, module in model.named_modules()
        if any(id(param) in ids for param in module.parameters(recurse=False))
    ]
    return tuple(dict.fromkeys([root, *owners]))


def repeated_children(model: nn.Module) -> list[str]:
    """Return the names of the children of every outermost ModuleList and Sequential."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
            name == outer or name.startswith(f"{outer}.") for outer in found
        ):
            found.extend(f"{name}.{child}" if name else child for child, _ in module.named_children())
    return found


def called_units(model: nn.Module) -> list[str]:
    """Return the names of the modules after whose calls random generators are seeded.

    These are the children of every outermost ModuleList and Sequential, and the outermost other modules that have
    parameters. The names depend only on the model, because they determine the random numbers.
    """
    modules = dict(model.named_modules())
    blocks = repeated_children(model)
    around_blocks = {name[:end] for name in blocks for end in range(len(name)) if name[end] == "."}
    found: list[str] = []
    for name, module in modules.items():
        inside = not name or (found and name.startswith(f"{found[-1]}."))
        # A model calls what a ModuleList or ModuleDict contains, never the container.
        if inside or name in around_blocks or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        parent = modules.get(name.rpartition(".")[0])
        in_container = isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        if in_container or any(True for _ in module.parameters()):
            found.append(name)
    return found
