"""Calls the recipe's sample function, which returns a text to show."""

from __future__ import annotations

from manyhands.errors import ConfigError
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import seed_generators
from manyhands.training.engine import Engine


def sample_text(engine: Engine) -> str | None:
    """Return the text of `recipe.sample` on worker 0; None on the others, and if there is no such function. Collective.

    The text depends on the weights and the recipe only: before the call, the generators are seeded with the recipe's
    seed. Raises ConfigError.
    """
    if engine.recipe.sample is None:
        return None
    sample = None
    with engine.evaluating() as model:
        if engine.group.rank == 0:
            seed_generators(derive(engine.recipe.seed, "sample"))
            sample = engine.recipe.sample(model)
            if not (sample is None or isinstance(sample, str)):
                raise ConfigError("recipe.sample did not return text", got=repr(sample)[:80])
    return sample
