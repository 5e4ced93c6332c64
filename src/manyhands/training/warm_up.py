"""The synchronous steps at the start of a run with islands: a run of its own, with the batches of all islands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from manyhands.checkpoint.format import list_checkpoints
from manyhands.config import Batch, Recipe
from manyhands.engine.agreement import recipe_facts
from manyhands.errors import ConfigError, InvariantError
from manyhands.listeners.run_directory import ISLANDS
from manyhands.storage.location import Location

FOLDER = "warm"
"""The run directory of the warm steps, in the folder `islands` of a run directory."""


def synchronous(recipe: Recipe) -> Recipe:
    """Return the recipe of the warm steps. A step has the batches of all islands, in the order of the islands."""
    count, batch = recipe.num_islands, recipe.batch
    large = Batch(
        global_size=count * batch.global_size,
        micro_size=batch.micro_size,
        virtual_workers=count * batch.virtual_workers,
    )
    return replace(recipe, islands=None, batch=large, epochs=None, name=f"{recipe.name} (warm steps)")


def facts_of_warm_steps(recipe: Recipe) -> dict[str, str | None]:
    """Return the facts in which a checkpoint of the warm steps differs from one of the recipe. None: it lacks it."""
    warm, own = recipe_facts(synchronous(recipe)), recipe_facts(recipe)
    return {name: warm.get(name) for name in own if own[name] != warm.get(name)}


def warm_up(recipe: Recipe, run_dir: str | Path | None, train: Callable[..., object]) -> Location:
    """Make the warm steps of a recipe, unless they are made already. Return their last checkpoint. Collective.

    train: `manyhands.train` with the options that both runs share. Raises ConfigError without a run directory.
    """
    if recipe.islands is None:
        raise InvariantError("the recipe has no islands")
    if run_dir is None:
        raise ConfigError(
            "warm steps need a run directory",
            expected="run_dir=..., because the islands begin with a checkpoint of the warm steps",
        )
    folder = Path(run_dir) / ISLANDS / FOLDER
    train(synchronous(recipe), steps=recipe.islands.warm_steps, run_dir=folder)
    return list_checkpoints(folder / "checkpoints")[-1][1]
