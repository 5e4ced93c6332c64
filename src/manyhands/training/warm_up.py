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


def warm_steps_in(recipe: Recipe, run_dir: str | Path | None) -> Location | None:
    """Return the checkpoint after the warm steps of a recipe, or None if the run directory has none."""
    if recipe.islands is None or run_dir is None:
        return None
    made = dict(list_checkpoints(Path(run_dir) / ISLANDS / FOLDER / "checkpoints"))
    return made.get(recipe.islands.warm_steps)


def warm_up(recipe: Recipe, run_dir: str | Path | None, train: Callable[..., object]) -> Location:
    """Make the warm steps of a recipe. Return the checkpoint after them. Collective.

    train: `manyhands.train` with the options that both runs share. Raises ConfigError without a run directory.
    """
    if recipe.islands is None:
        raise InvariantError("the recipe has no islands")
    if run_dir is None:
        raise ConfigError(
            "warm steps need a run directory",
            expected="run_dir=..., because the islands begin with a checkpoint of the warm steps",
        )
    train(synchronous(recipe), steps=recipe.islands.warm_steps, run_dir=Path(run_dir) / ISLANDS / FOLDER)
    made = warm_steps_in(recipe, run_dir)
    if made is None:
        raise InvariantError("the warm steps have left no checkpoint", where=str(run_dir))
    return made
