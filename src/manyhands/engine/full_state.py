"""The complete weights and state of a model, gathered from all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.engine.units.unit import Unit


def full_params(units: Sequence[Unit], shapes: Mapping[str, torch.Size], group: Group, tag: str) -> dict[str, Tensor]:
    """Return the complete master weights of every trainable parameter by name, fp32 on the CPU. Collective."""
    full = {}
    for unit in units:
        mine = torch.zeros(unit.layout.shard_numel)
        start = unit.shard.start - unit.held.start
        mine[: unit.shard.numel] = unit.master[start : start + unit.shard.numel]
        unsharded = torch.cat(group.all_gather_small(mine, f"{tag} / {unit.name} / full"))
        for slot in unit.layout.slots:
            full[slot.name] = unsharded[slot.range.start : slot.range.end].view(shapes[slot.name]).clone()
    return full


def full_state_dict(model: nn.Module, trained: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return the model's state_dict on the CPU. trained: the values of trainable parameters, by the parameter's id."""
    state = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in trained:
            state[key] = trained[id(value)]
        else:
            state[key] = value.detach().cpu().clone() if isinstance(value, Tensor) else deepcopy(value)
    return state
