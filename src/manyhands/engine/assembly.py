"""Builds a model's units and their buffers."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.config import Batch, Recipe, Strategy
from manyhands.engine.agreement import all_gather_json
from manyhands.engine.sharding import REPLICATED, SHARDED, Sharding, sharding_named
from manyhands.engine.step.buffers import may_change
from manyhands.engine.step.reduce import levels_of
from manyhands.engine.units.gradients import Gradients, KeptGradients, PassingGradients, Ring, RingGradients
from manyhands.engine.units.params import OffloadedParams, OnDemandParams, Params, ReplicatedParams, ShardedParams
from manyhands.engine.units.partition import UnitPlan, plan_units, storage_dtype
from manyhands.engine.units.unit import ParamUnit, Unit
from manyhands.layout import Layout, Range, UnitLayout, build_layout
from manyhands.models.building import evict_model
from manyhands.offload.allocator import Allocator, BufferPool
from manyhands.offload.scratch import check_space
from manyhands.optim.sliced import SlicedOptimizer


@dataclass(frozen=True)
class Storage:
    """The laid out model. units: of trainable parameters; frozen: of the others, where those are gathered, too.
    named_params: the trainable ones, in construction order."""

    layout: Layout
    units: tuple[Unit, ...]
    frozen: tuple[ParamUnit, ...]
    named_params: tuple[tuple[str, nn.Parameter], ...]

    @property
    def gathered_units(self) -> list[ParamUnit]:
        """Those that are whole only now and then."""
        return [unit for unit in (*self.units, *self.frozen) if isinstance(unit.params, OnDemandParams)]


def lay_out(
    model: nn.Module,
    recipe: Recipe,
    group: Group,
    strategy: Strategy,
    unsplittable: Collection[str],
    awaited: Collection[str],
    allocator: Allocator,
) -> Storage:
    """Move the model's parameters into flat buffers. Collective.

    unsplittable: the parameters that their optimizer must see whole. awaited: those without values as yet. home: of
    master
    weights and, if the sharding shards them, of parameters. Frozen parameters are only cast, unless gathered, too.
    """
    sharding = sharding_named(strategy.sharding)
    _cast_frozen(model, recipe.precision, group.device, awaited)
    adding = levels_of(group, sharding, recipe.batch).intra_host
    filler = _Filler(dict(model.named_parameters()), awaited, group, sharding, allocator, adding)
    plans = plan_units(
        model, recipe.precision, strategy.units, unsplittable=unsplittable, workers=group.size, gathered=filler.gathers
    )
    layout = filler.layout_of([plan for plan in plans if plan.trainable])
    trainable = list(zip((plan for plan in plans if plan.trainable), layout.units, strict=True))
    units: dict[str, Unit] = {}
    for dtype in dict.fromkeys(plan.dtype for plan, _ in trainable):
        units |= filler.units([pair for pair in trainable if pair[0].dtype == dtype])
    frozen: list[ParamUnit] = []
    if filler.gathers:
        still = _gathered_frozen(plans, filler.params)
        for plan, unit_layout in zip(still, filler.layout_of(still).units, strict=True):
            frozen.append(ParamUnit(unit_layout, filler.store(unit_layout, plan.dtype), plan.modules))
        group.barrier("start / frozen filled / control")
        for unit in frozen:
            unit.bind(filler.params)
    named = tuple((name, param) for name, param in filler.params.items() if param.requires_grad)
    return Storage(layout, tuple(units[unit.name] for unit in layout.units), tuple(frozen), named)


class _Filler:
    """Moves the model's parameters, `params` by name, into units. gathers: whether units become whole now and
    then only; else they are so for good. awaited: see `lay_out`. adding: see `levels_of`."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        awaited: Collection[str],
        group: Group,
        sharding: Sharding,
        allocator: Allocator,
        adding: Group,
    ) -> None:
        self.params, self._awaited, self._group, self._sharding, self._allocator = (
            params,
            awaited,
            group,
            sharding,
            allocator,
        )
        self._adding = adding
        # Workers that share memory have one copy of the parameters together: there's nothing to shard.
        elsewhere = allocator.on_disk or allocator.device != group.device
        self.gathers = sharding.param is SHARDED and (elsewhere or not group.pieces_are_views)
        self._pool = BufferPool(group.device)

    def layout_of(self, plans: Sequence[UnitPlan]) -> Layout:
        """Of those parameters, in construction order."""
        names = {name for plan in plans for name in plan.params}
        named = [(name, param.numel()) for name, param in self.params.items() if name in names]
        units = [(plan.name, plan.params) for plan in plans]
        return build_layout(
            named, units, self._group.size, unsplittable={plan.name for plan in plans if plan.unsplittable}
        )

    def units(self, plans: Sequence[tuple[UnitPlan, UnitLayout]]) -> dict[str, Unit]:
        """The trainable units of one dtype, by name. Collective."""
        group, dtype = self._group, plans[0][0].dtype
        starts = [0, *accumulate(layout.padded_numel for _, layout in plans)]
        whole = group.empty_replicated(starts[-1], dtype) if not self.gathers else None
        gradients = self._gradients([layout for _, layout in plans], starts, dtype)
        units = {}
        for (plan, layout), start, place in zip(plans, starts, gradients, strict=False):
            full = None if whole is None else whole[start : start + layout.padded_numel]
            store = self.store(layout, dtype, full)
            held = layout.shard(group.rank) if self._sharding.optim is SHARDED else layout.whole
            units[plan.name] = Unit(layout, group.rank, store, held, self._master(store, held), place, plan.modules)
        group.barrier(f"start / {dtype} filled / control")
        for unit in units.values():
            unit.bind(self.params)
        return units

    def store(self, layout: UnitLayout, dtype: torch.dtype, full: Tensor | None = None) -> Params:
        """A unit's parameters: in `full`, or at home. Collective where memory is shared."""
        group = self._group
        writes = layout.part(group.intra_host.rank, group.intra_host.size)  # everyone has all values
        store: Params
        if full is not None:
            store = ReplicatedParams(layout, full)
        elif group.pieces_are_views:
            everything = group.empty_replicated(layout.padded_numel, dtype, self._allocator)
            store = OffloadedParams(layout, everything, self._allocator, self._pool)
        else:
            shard = self._allocator.empty(layout.shard_numel, dtype)
            store = ShardedParams(layout, group.rank, shard, self._allocator, self._pool)
            writes = layout.shard(group.rank)
        self._copy(layout, writes, store.kept(writes))
        evict_model([store.kept(writes)], self._allocator)
        return store

    def _master(self, store: Params, held: Range) -> Tensor:
        # In fp32 the parameters are the master weights, unless others see them while each worker keeps all of its own.
        if store.dtype == torch.float32 and (self._sharding.optim is SHARDED or not self._group.shares_memory):
            kept = store.kept(held)
            if kept.device == self._allocator.device:
                return kept
        master = self._allocator.empty(held.numel, torch.float32)
        self._copy(store.layout, held, master)
        evict_model([master], self._allocator)
        return master

    def _copy(self, layout: UnitLayout, within: Range, out: Tensor) -> None:
        """The model's parameters, as they were built, into `out`, which begins with the first element of `within`."""
        for piece in layout.pieces(within):
            if piece.slot.name in self._awaited:
                continue
            flat = self.params[piece.slot.name].detach().flatten()
            out[piece.in_unit.start - within.start : piece.in_unit.end - within.start].copy_(
                flat[piece.in_param.start : piece.in_param.end]
            )

    def _gradients(self, layouts: Sequence[UnitLayout], starts: Sequence[int], dtype: torch.dtype) -> list[Gradients]:
        group, numels = self._adding, [layout.padded_numel for layout in layouts]
        if self._sharding.grad is REPLICATED or (group.pieces_are_views and self._sharding.param is REPLICATED):
            contribution = group.empty_contribution(starts[-1], dtype)
            pairs = zip(numels, starts, strict=False)
            return [KeptGradients(group, numel, contribution, start) for numel, start in pairs]
        if not group.pieces_are_views:
            return [PassingGradients(group, numel, dtype) for numel in numels]
        ring = Ring(group, max(numels), dtype, len(numels))
        last = len(numels) - 1  # units are sent from the last to the first
        return [RingGradients(group, layout, dtype, ring, last - index) for index, layout in enumerate(layouts)]


def _gathered_frozen(plans: Sequence[UnitPlan], params: Mapping[str, nn.Parameter]) -> list[UnitPlan]:
    """Without those that may change, or can't read as NaN while they're away."""
    found = []
    for plan in plans:
        names = [name for name in plan.params if not may_change(params[name]) and params[name].is_floating_point()]
        if names and not plan.trainable:
            found.append(replace(plan, params=tuple(names)))
    return found


def check_scratch_space(
    allocator: Allocator, group: Group, units: Sequence[Unit], optimizer: SlicedOptimizer, batch: Batch
) -> None:
    """That what the first step will add to the files of all workers finds space: the optimizer's state, and sums of
    gradients. (Master weights and parameters are there by now.) Collective; raises ConfigError."""
    if allocator.scratch is None:
        return
    each, needed = optimizer.state_bytes(), 0.0
    # One sum for each level of the tree, one that is being added to it, and the whole, for the norm.
    sums = batch.virtual_workers.bit_length() + 2
    for unit in units:
        needed += sum(piece.in_unit.numel * each[piece.slot.name] for piece in unit.layout.pieces(unit.held))
        needed += sums * 4 * unit.shard.numel if isinstance(unit.params, OnDemandParams) else 0
    mine = [platform.node(), allocator.scratch.stat().st_dev]
    everyone: list[Any] = all_gather_json(group, [*mine, needed], "start / scratch / control")
    check_space(allocator.scratch, int(sum(theirs for *place, theirs in everyone if place == mine)))


def _cast_frozen(model: nn.Module, precision: str, device: torch.device, awaited: Collection[str]) -> None:
    without_values = {id(param) for name, param in model.named_parameters() if name in awaited}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if not param.requires_grad:
                cast = partial(torch.empty_like, param.data) if id(param) in without_values else param.data.to
                param.data = cast(device=device, dtype=storage_dtype(module, param, precision))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
