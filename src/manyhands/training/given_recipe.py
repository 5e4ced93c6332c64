"""Checks that what a caller passes as the recipe is one."""

from __future__ import annotations

import os

from manyhands.config import Recipe
from manyhands.errors import ConfigError


def check_given_recipe(recipe: object) -> None:
    """Raise ConfigError unless `recipe` is a Recipe. The path of a recipe file, for example, is not."""
    if isinstance(recipe, Recipe):
        return
    hint = None
    if isinstance(recipe, (str, os.PathLike)):
        hint = "read the recipe file first: manyhands.load_recipe(path).recipe"
    elif isinstance(getattr(recipe, "recipe", None), Recipe):
        hint = "pass its attribute recipe, and its steps and strategy as arguments"
    raise ConfigError(
        "the recipe has the wrong type", expected="manyhands.Recipe(...)", got=repr(recipe)[:80], hint=hint
    )
