"""From a model to units: builds it, lays it out, and moves its parameters into flat buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyhands.comm.group import Contribution, Group
from manyhands.config import Recipe
from manyhands.engine.control import agree
from manyhands.engine.partition import UnitPlan, plan_units, storage_dtype
from manyhands.engine.unit import Unit
from manyhands.errors import ConfigError
from manyhands.layout import Layout, UnitLayout, build_layout
from manyhands.numerics.digest import digest_of_tensors
from manyhands.numerics.seeds import derive, preserved_generators, seed_generators
from manyhands.sharding.stage import REPLICATED, SHARDED, Stage


@dataclass(frozen=True)
class Storage:
    """The laid out model. named_params: the trainable ones, in construction order."""

    layout: Layout
    units: tuple[Unit, ...]
    named_params: tuple[tuple[str, nn.Parameter], ...]


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its initial weights: a function of the recipe and its seed alone. Raises ConfigError."""
    with preserved_generators():
        seed_generators(derive(recipe.seed, "init"))
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError("recipe.model did not return a model", expected="a torch.nn.Module", got=repr(model))
    for name, param in model.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ConfigError(
                f"parameter {name!r} has no shape yet", hint="run the lazy module once before returning it"
            )
        if param.dtype != torch.float32 or param.device.type != "cpu":
            raise ConfigError(
                f"parameter {name!r} is not built in fp32 on the CPU",
                expected="torch.float32 on cpu",
                got=f"{param.dtype} on {param.device}",
                hint="leave dtype and device to the recipe's precision and device",
            )
    if not any(param.requires_grad for param in model.parameters()):
        raise ConfigError("the model has no trainable parameter")
    return model


def agree_on_model(model: nn.Module, group: Group) -> None:
    """That every worker built the same model, to the bit. Collective; raises ConfigError."""
    facts = {}
    for name, param in model.named_parameters():
        facts[name] = f"{list(param.shape)} {param.requires_grad} {digest_of_tensors([(name, param)])[:16]}"
    agree(
        group,
        "model",
        facts,
        hint="the model's construction must not depend on the worker's number, the time, or its own generator",
    )


def lay_out(
    model: nn.Module, recipe: Recipe, group: Group, stage: Stage, named_units: Sequence[str], uncut: Collection[str]
) -> Storage:
    """Move the model's trainable parameters into flat buffers; the others are only cast. Collective.

    uncut: the parameters that their optimizer must see whole.
    """
    planned = plan_units(model, recipe.precision, named_units, uncut=uncut, workers=group.size)
    plans = [plan for plan in planned if plan.trainable]
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    layout = build_layout(
        [(name, param.numel()) for name, param in named],
        [(plan.name, plan.params) for plan in plans],
        group.size,
        uncut={plan.name for plan in plans if plan.uncut},
    )
    _cast_frozen(model, recipe.precision, group.device)
    units: list[Unit] = []
    for dtype in dict.fromkeys(plan.dtype for plan in plans):
        alike = [(plan, unit) for plan, unit in zip(plans, layout.units, strict=True) if plan.dtype == dtype]
        units += _fill_pool(alike, dict(named), group, stage)
    ordered = sorted(units, key=lambda unit: [plan.name for plan in plans].index(unit.name))
    return Storage(layout, tuple(ordered), tuple(named))


def _fill_pool(
    plans: Sequence[tuple[UnitPlan, UnitLayout]], params: dict[str, nn.Parameter], group: Group, stage: Stage
) -> list[Unit]:
    """The units of one dtype, in one flat buffer for parameters and one for gradients."""
    dtype, numel = plans[0][0].dtype, sum(unit.padded_numel for _, unit in plans)
    pool = group.empty_replicated(numel, dtype)
    persistent = stage.grad is REPLICATED or group.pieces_are_views
    grads: Contribution | None = group.empty_contribution(numel, dtype) if persistent else None
    units, start = [], 0
    for _, layout in plans:
        view = pool[start : start + layout.padded_numel]
        units.append(_fill_unit(layout, view, params, group, stage))
        units[-1].give_grads(grads, start)
        start += layout.padded_numel
    group.barrier(f"start / {dtype} filled / control")
    for unit in units:
        unit.bind(params)
    return units


def _fill_unit(layout: UnitLayout, view: Tensor, params: dict[str, nn.Parameter], group: Group, stage: Stage) -> Unit:
    shard = layout.shard(group.rank)
    held = shard if stage.optim is SHARDED else layout.whole
    writes = shard if group.shares_memory else layout.whole
    for piece in layout.pieces(writes):
        flat = params[piece.slot.name].detach().flatten()
        view[piece.in_unit.start : piece.in_unit.end].copy_(flat[piece.in_param.start : piece.in_param.end])
    # In fp32 the parameters are the master weights, unless others see them while each worker keeps all of its own.
    if view.dtype == torch.float32 and (stage.optim is SHARDED or not group.shares_memory):
        master = view[held.start : held.end]
    else:
        master = torch.zeros(held.numel, device=group.device)
        for piece in layout.pieces(held):
            flat = params[piece.slot.name].detach().flatten()
            start = piece.in_unit.start - held.start
            master[start : start + piece.in_unit.numel].copy_(flat[piece.in_param.start : piece.in_param.end])
    return Unit(layout, group.rank, view, held, master)


def _cast_frozen(model: nn.Module, precision: str, device: torch.device) -> None:
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if not param.requires_grad:
                param.data = param.data.to(device=device, dtype=storage_dtype(module, precision))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
