"""What workers, and a run and its checkpoints, must have in common: facts by name, as text."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.models.fingerprint import fingerprint
from manyhands.offload.construction import let_go
from manyhands.offload.home import Home
from manyhands.optim.sliced import SlicedOptimizer


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """Of what decides the bits, as far as it can be told."""
    facts = {
        f"batch.{name}": str(getattr(recipe.batch, name)) for name in ("global_size", "micro_size", "virtual_workers")
    }
    for name in ("precision", "clip_norm", "seed", "threads_per_worker", "device", *["compile"] * recipe.compile):
        facts[name] = str(getattr(recipe, name))
    return facts | {"len(data)": str(len(recipe.data))}


def optimizer_facts(optimizer: SlicedOptimizer) -> dict[str, str]:
    """The optimizers' classes, and each param group's hyperparameters and parameters."""
    kinds = zip(optimizer.fronts, optimizer.kinds, strict=True)
    facts = {"optimizer": ", ".join(f"{type(front).__qualname__} ({kind})" for front, kind in kinds)}
    for index, group in enumerate(optimizer.hyperparameters()):
        facts.update({f"optimizer group {index}.{key}": str(value) for key, value in group.items()})
        facts[f"optimizer group {index}.params"] = " ".join(optimizer.names_in_group(index))
    return facts


def frozen_facts(model: nn.Module, awaited: Container[str], home: Home) -> dict[str, str]:
    """What the digest doesn't cover, since no step changes it: the bits of frozen parameters, which are at `home`;
    without those that have no values as yet."""
    facts = {}
    for name, param in model.named_parameters():
        if not (param.requires_grad or name in awaited):
            facts[f"frozen parameter {name}"] = fingerprint(name, param)
            let_go([param], home)
    return facts


def schedule_facts(schedules: Sequence[LRScheduler]) -> dict[str, str]:
    """Their classes and plain numbers, as they are before the first step."""
    facts = {"schedule": ", ".join(type(schedule).__qualname__ for schedule in schedules) or "none"}
    for index, schedule in enumerate(schedules):
        if isinstance(schedule, ReduceLROnPlateau):
            raise ConfigError(
                "recipe.schedule wants to be told a measurement after each step",
                got="ReduceLROnPlateau",
                hint="use a schedule that depends on the step alone",
            )
        numbers = {key: value for key, value in schedule.state_dict().items() if isinstance(value, (int, float, list))}
        facts |= {f"schedule {index}.{key}": str(value) for key, value in numbers.items() if not key.startswith("_")}
    return facts
