"""Facts that must match between workers, and between a run and its checkpoints.

A fact is a name and a value. Both are strings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manyhands.comm.group import Group
from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.models.building import evict_model
from manyhands.numerics.digest import fingerprint
from manyhands.offload.allocator import Allocator
from manyhands.optim.sliced import SlicedOptimizer


def all_gather_json(group: Group, value: object, tag: str) -> list[object]:
    """Return all workers' values, by rank. Collective. Makes two collective calls, which is too slow for every step."""
    text = json.dumps(value).encode()
    lengths = [int(length) for length in group.all_gather_small(torch.tensor([len(text)]), tag)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = group.all_gather_small(padded, tag)
    return [json.loads(bytes(other[:length].numpy())) for other, length in zip(texts, lengths, strict=True)]


def agree(group: Group, what: str, facts: Mapping[str, str], *, hint: str) -> None:
    """Check that all workers have the same facts. Collective. Raises the same ConfigError on all of them."""
    all_facts: Sequence[dict[str, str]] = all_gather_json(group, dict(facts), f"start / {what} / control")  # type: ignore[assignment]
    for rank, theirs in enumerate(all_facts):
        for name in [*all_facts[0], *theirs]:
            first, other = all_facts[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != other:
                raise ConfigError(
                    f"workers 0 and {group.workers[rank]} don't have the same {what}: they differ in {name}",
                    expected=f"{first} (worker 0)",
                    got=f"{other} (worker {group.workers[rank]})",
                    hint=hint,
                )


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """Return the recipe's settings that decide the bits. Functions and data can't be compared, except for len(data)."""
    facts = {
        f"batch.{name}": str(getattr(recipe.batch, name)) for name in ("global_size", "micro_size", "virtual_workers")
    }
    names = ["precision", "clip_norm", "seed", "threads_per_worker", "device"]
    if recipe.compile:  # only if it is set, because checkpoints from before this option existed lack the fact
        names.append("compile")
    for name in names:
        facts[name] = str(getattr(recipe, name))
    return facts | {"len(data)": str(len(recipe.data))}


def optimizer_facts(optimizer: SlicedOptimizer) -> dict[str, str]:
    """Return the optimizers' classes, and each param group's hyperparameters and parameter names."""
    kinds = zip(optimizer.fronts, optimizer.kinds, strict=True)
    facts = {"optimizer": ", ".join(f"{type(front).__qualname__} ({kind})" for front, kind in kinds)}
    for index, group in enumerate(optimizer.hyperparameters()):
        facts.update({f"optimizer group {index}.{key}": str(value) for key, value in group.items()})
        facts[f"optimizer group {index}.params"] = " ".join(optimizer.names_in_group(index))
    return facts


def frozen_facts(model: nn.Module, pending: Container[str], allocator: Allocator) -> dict[str, str]:
    """Return fingerprints of the frozen parameters, which the digest doesn't cover since no step changes them.

    pending: names of the parameters that have no values yet; they are left out.
    allocator: the allocator of the parameters' buffers.
    """
    facts = {}
    for name, param in model.named_parameters():
        if not (param.requires_grad or name in pending):
            facts[f"frozen parameter {name}"] = fingerprint(name, param)
            evict_model([param], allocator)
    return facts


def schedule_facts(schedules: Sequence[LRScheduler]) -> dict[str, str]:
    """Return the schedules' classes and their numeric state before the first step. Raises ConfigError."""
    facts = {"schedule": ", ".join(type(schedule).__qualname__ for schedule in schedules) or "none"}
    for index, schedule in enumerate(schedules):
        if isinstance(schedule, ReduceLROnPlateau):
            raise ConfigError(
                "recipe.schedule requires a measurement after each step",
                got="ReduceLROnPlateau",
                hint="use a schedule that depends on the step alone",
            )
        numbers = {key: value for key, value in schedule.state_dict().items() if isinstance(value, (int, float, list))}
        facts |= {f"schedule {index}.{key}": str(value) for key, value in numbers.items() if not key.startswith("_")}
    return facts


def agree_on_model(model: nn.Module, pending: Collection[str], group: Group, allocator: Allocator) -> None:
    """Check that every worker built the same model, bit for bit. Collective. Raises ConfigError.

    pending: names of the parameters that have no values yet; only their shapes are compared.
    allocator: the allocator of the parameters' buffers.
    """
    facts = {}
    for name, param in model.named_parameters():
        values = "pending" if name in pending else fingerprint(name, param)
        facts[name] = f"{list(param.shape)} {param.requires_grad} {values}"
        evict_model([param], allocator)
    agree(
        group,
        "model",
        facts,
        hint="build the same model on every worker: don't use the rank, the time or an unseeded random generator",
    )
