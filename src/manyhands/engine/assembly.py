"""Builds a model's units and their buffers.

A unit's parameters, master weights and gradients lie in flat buffers. The sharding, the offload and the group determine
where these buffers are (in shared memory, in each worker's own memory, in a file) and how much of the unit they hold.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.config import Recipe, Strategy
from manyhands.engine.sharding import REPLICATED, SHARDED, Sharding, sharding_named
from manyhands.engine.step.buffers import may_change
from manyhands.engine.step.reduce import levels_of
from manyhands.engine.units.gradient_buffers import (
    Gradients,
    PersistentGradients,
    Ring,
    RingGradients,
    TransientGradients,
)
from manyhands.engine.units.params import OffloadedParams, OnDemandParams, Params, ReplicatedParams, ShardedParams
from manyhands.engine.units.unit import ParamUnit, Unit
from manyhands.engine.units.unit_plan import UnitPlan, plan_units, storage_dtype
from manyhands.models.building import evict_model
from manyhands.numerics.alignment import is_aligned, with_aligned_storage
from manyhands.offload.allocator import Allocator, BufferPool
from manyhands.offload.scratch import check_space
from manyhands.optim.sliced import SlicedOptimizer
from manyhands.shard_layout import Layout, Range, UnitLayout, build_layout


@dataclass(frozen=True)
class Storage:
    """A model whose parameters lie in units.

    units: the units of the trainable parameters.
    frozen: the units of the frozen parameters if these are sharded, else empty.
    named_params: the trainable parameters by name, in construction order.
    """

    layout: Layout
    units: tuple[Unit, ...]
    frozen: tuple[ParamUnit, ...]
    named_params: tuple[tuple[str, nn.Parameter], ...]

    @property
    def on_demand_units(self) -> list[ParamUnit]:
        """Return the units that are unsharded only while they are needed."""
        return [unit for unit in (*self.units, *self.frozen) if isinstance(unit.params, OnDemandParams)]


def lay_out(
    model: nn.Module,
    recipe: Recipe,
    group: Group,
    strategy: Strategy,
    unsplittable: Collection[str],
    pending: Collection[str],
    allocator: Allocator,
) -> Storage:
    """Move the model's parameters into flat buffers. Collective.

    unsplittable: names of the parameters that their optimizer must see in full.
    pending: names of the parameters that have no values yet; they are not copied.
    allocator: creates the buffers of master weights, and of parameters if these are unsharded on demand.
    Frozen parameters that are not sharded are only cast and moved to the device.
    """
    sharding = sharding_named(strategy.sharding)
    _cast_frozen(model, recipe.precision, group.device, pending)
    reducing_group = levels_of(group, sharding, recipe.batch).intra_host
    builder = _UnitBuilder(dict(model.named_parameters()), pending, group, sharding, allocator, reducing_group)
    plans = plan_units(
        model,
        recipe.precision,
        strategy.units,
        unsplittable=unsplittable,
        workers=group.size,
        on_demand=builder.on_demand,
    )
    trainable_plans = [plan for plan in plans if plan.trainable]
    layout = builder.layout_of(trainable_plans)
    trainable = list(zip(trainable_plans, layout.units, strict=True))
    units: dict[str, Unit] = {}
    # Create one buffer per dtype. The dtypes are in construction order, so all workers create the buffers in the same
    # order.
    for dtype in dict.fromkeys(plan.dtype for plan, _ in trainable):
        units |= builder.units([pair for pair in trainable if pair[0].dtype == dtype])
    frozen: list[ParamUnit] = []
    if builder.on_demand:
        frozen_plans = _shardable_frozen(plans, builder.params)
        for plan, unit_layout in zip(frozen_plans, builder.layout_of(frozen_plans).units, strict=True):
            frozen.append(ParamUnit(unit_layout, builder.params_of(unit_layout, plan.dtype), plan.modules))
        # Several workers fill a shared buffer, so bind the model to it only after all of them have finished.
        group.barrier("start / frozen filled / control")
        for unit in frozen:
            unit.bind(builder.params)
    named = tuple((name, param) for name, param in builder.params.items() if param.requires_grad)
    return Storage(layout, tuple(units[unit.name] for unit in layout.units), tuple(frozen), named)


class _UnitBuilder:
    """Moves the model's parameters into units.

    params: the model's parameters by name.
    on_demand: True if units are unsharded only while they are needed; otherwise they are unsharded permanently.
    pending: see `lay_out`.
    reducing_group: the workers that add gradients in each round, see `levels_of`.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        pending: Collection[str],
        group: Group,
        sharding: Sharding,
        allocator: Allocator,
        reducing_group: Group,
    ) -> None:
        self.params, self._pending = params, pending
        self._group, self._reducing_group = group, reducing_group
        self._sharding, self._allocator = sharding, allocator
        # Workers that share memory have one physical copy of the parameters, so sharding saves nothing unless that copy
        # is offloaded.
        offloaded = allocator.on_disk or allocator.device != group.device
        self.on_demand = sharding.param is SHARDED and (offloaded or not group.pieces_are_views)
        self._pool = BufferPool(group.device)

    def layout_of(self, plans: Sequence[UnitPlan]) -> Layout:
        """Return the layout of these units. Blocks are numbered in construction order."""
        names = {name for plan in plans for name in plan.params}
        named = [(name, param.numel()) for name, param in self.params.items() if name in names]
        units = [(plan.name, plan.params) for plan in plans]
        return build_layout(
            named, units, self._group.size, unsplittable={plan.name for plan in plans if plan.unsplittable}
        )

    def units(self, plans: Sequence[tuple[UnitPlan, UnitLayout]]) -> dict[str, Unit]:
        """Build the trainable units of one dtype, by name. Collective."""
        group, dtype = self._group, plans[0][0].dtype
        starts = [0, *accumulate(layout.padded_numel for _, layout in plans)]
        # Create one buffer for all units of the dtype, because creating a shared buffer is a collective call.
        replicated = None if self.on_demand else group.empty_replicated(starts[-1], dtype)
        gradients = self._gradients([layout for _, layout in plans], starts, dtype)
        units = {}
        # strict=False: `starts` has one more item, the end of the last unit.
        for (plan, layout), start, unit_gradients in zip(plans, starts, gradients, strict=False):
            full = None if replicated is None else replicated[start : start + layout.padded_numel]
            params = self.params_of(layout, dtype, full)
            held = layout.shard(group.rank) if self._sharding.optim is SHARDED else layout.extent
            master = self._master(params, held)
            units[plan.name] = Unit(layout, group.rank, params, held, master, unit_gradients, plan.modules)
        # Several workers fill a shared buffer, so bind the model to it only after all of them have finished.
        group.barrier(f"start / {dtype} filled / control")
        for unit in units.values():
            unit.bind(self.params)
        return units

    def params_of(self, layout: UnitLayout, dtype: torch.dtype, full: Tensor | None = None) -> Params:
        """Create and fill a unit's parameters, in `full` or in a new buffer. Collective where memory is shared."""
        group = self._group
        # Every worker has built the complete model, so workers that share memory each fill one part of the buffer.
        writes = layout.part(group.intra_host.rank, group.intra_host.size)
        params: Params
        if full is not None:
            params = ReplicatedParams(layout, full)
        elif group.pieces_are_views:
            shared = group.empty_replicated(layout.padded_numel, dtype, self._allocator)
            params = OffloadedParams(layout, shared, self._allocator, self._pool)
        else:
            shard = self._allocator.empty(layout.shard_numel, dtype)
            params = ShardedParams(layout, group.rank, shard, self._allocator, self._pool)
            writes = layout.shard(group.rank)
        self._copy(layout, writes, params.stored(writes))
        evict_model([params.stored(writes)], self._allocator)
        return params

    def _master(self, params: Params, held: Range) -> Tensor:
        """Return the master weights of `held`, [held.numel] fp32. They are an alias of fp32 parameters if possible."""
        # fp32 parameters are their own master weights, since a copy would cost 4 bytes per parameter. A copy is needed
        # if each worker has all master weights while the workers share one copy of the parameters: without it, several
        # workers would update the shared copy. The updater recognizes an alias by its address (updater.py:_is_alias).
        if params.dtype == torch.float32 and (self._sharding.optim is SHARDED or not self._group.shares_memory):
            stored = params.stored(held)
            if stored.device == self._allocator.device:
                return stored
        master = self._allocator.empty(held.numel, torch.float32)
        self._copy(params.layout, held, master)
        evict_model([master], self._allocator)
        return master

    def _copy(self, layout: UnitLayout, within: Range, out: Tensor) -> None:
        """Copy the range `within` of the unit's elements from the built model to `out`, of shape [within.numel]."""
        for piece in layout.pieces(within):
            if piece.slot.name in self._pending:
                continue
            flat = self.params[piece.slot.name].detach().flatten()
            out[piece.in_unit.start - within.start : piece.in_unit.end - within.start].copy_(
                flat[piece.in_param.start : piece.in_param.end]
            )

    def _gradients(self, layouts: Sequence[UnitLayout], starts: Sequence[int], dtype: torch.dtype) -> list[Gradients]:
        """Create the gradient buffers of units of one dtype. Collective where memory is shared."""
        group, numels = self._reducing_group, [layout.padded_numel for layout in layouts]
        if self._sharding.grad is REPLICATED or (group.pieces_are_views and self._sharding.param is REPLICATED):
            contribution = group.empty_contribution(starts[-1], dtype)
            pairs = zip(numels, starts, strict=False)
            return [PersistentGradients(group, numel, contribution, start) for numel, start in pairs]
        if not group.pieces_are_views:
            return [TransientGradients(group, numel, dtype) for numel in numels]
        ring = Ring(group, max(numels), dtype, len(numels))
        last = len(numels) - 1  # units are sent from the last to the first
        return [RingGradients(group, layout, dtype, ring, last - index) for index, layout in enumerate(layouts)]


def _shardable_frozen(plans: Sequence[UnitPlan], params: Mapping[str, nn.Parameter]) -> list[UnitPlan]:
    """Return the plans of the frozen parameters that can be sharded.

    Parameters that may change in forward are left out. Integer parameters are left out too, because a resharded
    parameter must read as NaN.
    """
    found = []
    for plan in plans:
        names = [name for name in plan.params if not may_change(params[name]) and params[name].is_floating_point()]
        if names and not plan.trainable:
            found.append(replace(plan, params=tuple(names)))
    return found


def check_scratch_space(
    allocator: Allocator, group: Group, units: Sequence[Unit], optimizer: SlicedOptimizer, recipe: Recipe
) -> None:
    """Check that the disk has space for what all workers add in the first step. Collective. Raises ConfigError.

    The first step adds the optimizer's state and sums of gradients, and a later step adds the average of the weights.
    Master weights and parameters already have files.
    """
    if allocator.scratch is None:
        return
    state_bytes, needed = optimizer.state_bytes(), 0.0
    # Count one partial sum per level of the tree, one that is being added, and the total gradient, which the norm
    # needs.
    sums = recipe.batch.virtual_workers.bit_length() + 2
    average_bytes = 0 if recipe.average_of_weights is None else 4
    for unit in units:
        needed += sum(piece.in_unit.numel * state_bytes[piece.slot.name] for piece in unit.layout.pieces(unit.held))
        needed += average_bytes * unit.held.numel
        needed += sums * 4 * unit.shard.numel if isinstance(unit.params, OnDemandParams) else 0
    mine = [platform.node(), allocator.scratch.stat().st_dev]
    all_needs: list[Any] = all_gather_json(group, [*mine, needed], "start / scratch / control")
    # Workers whose scratch folders are on this worker's file system share its space.
    check_space(allocator.scratch, int(sum(theirs for *file_system, theirs in all_needs if file_system == mine)))


def _cast_frozen(model: nn.Module, precision: str, device: torch.device, pending: Collection[str]) -> None:
    """Cast frozen parameters to their storage dtype, and move them and all buffers to aligned memory of the device."""
    copies: dict[int, torch.UntypedStorage] = {}
    without_values = {id(param) for name, param in model.named_parameters() if name in pending}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if not param.requires_grad:
                # Reading a parameter without values would allocate memory for its untouched pages.
                cast = partial(torch.empty_like, param.data) if id(param) in without_values else param.data.to
                param.data = cast(device=device, dtype=storage_dtype(module, param, precision))
                if not is_aligned(param.data):
                    param.data = param.data.clone()
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = with_aligned_storage(buffer.to(device), copies)
