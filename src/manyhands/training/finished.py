"""Evaluates a checkpoint of a run, or samples from it, for example after the run has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyhands.checkpoint.find import find_checkpoint
from manyhands.config import Recipe, Strategy
from manyhands.engine.step.figures import Evaluation
from manyhands.errors import ConfigError
from manyhands.options import nearest
from manyhands.output import say
from manyhands.storage.location import location_of
from manyhands.training.engine import Engine
from manyhands.training.given_recipe import check_given_recipe
from manyhands.training.sampling import sample_text
from manyhands.validation import AVERAGED, TRAINED


def evaluate(
    recipe: Recipe,
    run: str | Path,
    *,
    step: int | None = None,
    weights: str = TRAINED,
    only: Sequence[str] = (),
    strategy: Strategy | None = None,
    accept_new_numerics: bool = False,
    show: bool = True,
) -> dict[str, Evaluation]:
    """Evaluate a checkpoint on the recipe's validations, and return the figures by the names of the sets. Collective.

    The figures are those that the run itself computes after this step. Those of the average of the weights have names
    such as "validation.ema". Nothing is written to the run.
    run: a run directory, or a folder or address of checkpoints. step: the step of the checkpoint (default: the last).
    weights: "trained", for the weights that each validation asks for; "ema", for the average only; or "best" as in
    `export`. only: the names of the sets to use (default: all).
    accept_new_numerics: evaluate a checkpoint that was saved under another numerics identity; the last bits of the
    figures may then differ. show: print the figures on worker 0.
    Raises ConfigError, CheckpointError, DataError, NumericsError.
    """
    check_given_recipe(recipe)
    known = recipe.validations
    if not known:
        raise ConfigError(
            "the recipe has no validation",
            expected="validation=manyhands.Validation(...), or a table [validation]",
        )
    for name in only:
        if name not in known:
            raise ConfigError(f"the recipe has no validation {name!r}", got=repr(name), hint=nearest(name, known))
    checkpoint = find_checkpoint(location_of(run), step, weights)
    found: dict[str, Evaluation] = {}
    with Engine(recipe, strategy, resumes=True) as engine:
        engine.load(checkpoint, accept_new_numerics=accept_new_numerics)
        for name in only or known:
            for kind in (AVERAGED,) if weights == AVERAGED else known[name].evaluated_weights:
                each = engine.validate(name, weights=kind)
                found[each.name] = each
                if show and engine.group.rank == 0:
                    say(str(each))
    return found


def sample(
    recipe: Recipe,
    run: str | Path,
    *,
    step: int | None = None,
    weights: str = TRAINED,
    strategy: Strategy | None = None,
    accept_new_numerics: bool = False,
) -> str | None:
    """Return the text of the recipe's sample function for a checkpoint, on worker 0; None on the others. Collective.

    The text is the one that the run itself shows if this is its last step. The arguments are those of `evaluate`.
    Nothing is written to the run. Raises ConfigError, CheckpointError, DataError, NumericsError.
    """
    if recipe.sample is None:
        raise ConfigError("the recipe has no sample function", expected="sample=function, or a table [sample]")
    if weights == AVERAGED:
        raise ConfigError(
            "the recipe's sample function gets the trained weights only",
            expected=f'weights = "{TRAINED}" or "best"',
            got=repr(weights),
            hint="for a text of the average, use manyhands.load_model(..., weights='ema')",
        )
    checkpoint = find_checkpoint(location_of(run), step, weights)
    with Engine(recipe, strategy, resumes=True) as engine:
        engine.load(checkpoint, accept_new_numerics=accept_new_numerics)
        return sample_text(engine)
