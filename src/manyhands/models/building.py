"""Builds a recipe's model with its initial weights; without them, where files have them."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.models.admission import admit
from manyhands.numerics.seeds import derive, preserved_generators, seed_generators
from manyhands.offload.construction import BuiltAt, Unwritten, is_unwritten
from manyhands.offload.home import Home


def build_model(recipe: Recipe, home: Home) -> tuple[nn.Module, frozenset[str]]:
    """The recipe's model with its initial weights, a function of the recipe and its seed alone; and the names of the
    parameters whose values are still to come, from the recipe's files. Raises ConfigError.

    home: of what is built, until it's laid out; if it's apart, the whole model is never in memory. Nor are large
    parameters whose values are to come.
    """
    weights = recipe.initial_weights
    if weights is None:
        return _build(recipe, home), frozenset()
    with Unwritten():
        model = _build(recipe, home)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    kept = {param for param in names if weights.may_lack(names[param])}
    awaited = frozenset(names[param][0] for param in names.keys() - kept)
    if any(map(is_unwritten, kept)):  # it has the value that it would have without files: all is drawn before it
        model = _build(recipe, home)
    return model, awaited


def _build(recipe: Recipe, home: Home) -> nn.Module:
    with preserved_generators(), BuiltAt(home) if home.is_apart else nullcontext():
        seed_generators(derive(recipe.seed, "init"))
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError("recipe.model did not return a model", expected="a torch.nn.Module", got=repr(model))
    admit(model)
    return model
