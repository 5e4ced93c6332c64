"""From a model to units: builds it, lays it out, and moves its parameters into flat buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from manyhands.models.admission import admit
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
    admit(model)
    return model


def agree_on_model(model: nn.Module, group: Group) -> None:
    """That every worker built the same model, to the bit. Collective; raises ConfigError."""
    facts = {}
    for name, param in model.named_parameters():
        facts[name] = f"{list(param.shape)} {param.requires_grad} {fingerprint(name, param)}"
    agree(
        group,
        "model",
        facts,
        hint="the model's construction must not depend on the worker's number, the time, or its own generator",
    )


def fingerprint(name: str, param: Tensor) -> str:
    """16 hex digits that tell a parameter's bits."""
    if param.dtype == torch.float32:
        return digest_of_tensors([(name, param)])[:16]
    in_bytes = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # frozen: of whatever dtype
    return hashlib.sha256(in_bytes.numpy().tobytes()).hexdigest()[:16]


def lay_out(model: nn.Module, recipe: Recipe, group: Group, stage: Stage, named_units: Sequence[str]) -> Storage:
    """Move the model's trainable parameters into flat buffers; the others are only cast. Collective."""
    plans = [plan for plan in plan_units(model, recipe.precision, named_units) if plan.trainable]
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    layout = build_layout(
        [(name, param.numel()) for name, param in named], [(plan.name, plan.params) for plan in plans], group.size
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
            if not param.requires_grad:  # one that isn't fp32 was made so on purpose
                dtype = storage_dtype(module, precision) if param.dtype == torch.float32 else param.dtype
                param.data = param.data.to(device=device, dtype=dtype)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
