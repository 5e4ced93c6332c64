"""The arguments with which commands name a checkpoint of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from manyhands.cli.parameters import overrides_option
from manyhands.cli.workers import Workers, start_workers, workers_for
from manyhands.validation import AVERAGED, TRAINED

SavedRun = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run directory, or a folder or address of checkpoints.", show_default=False),
]

ChosenStep = Annotated[
    int | None,
    typer.Option(metavar="N", help="The checkpoint after N steps (default: the last).", show_default=False),
]

ChosenWeights = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"{TRAINED}; {AVERAGED}: the average of the weights, whatever its kind; or best: the checkpoint that "
        "--keep-best kept. best:validation.loss:min names one of several.",
    ),
]


@dataclass(frozen=True)
class CheckpointArguments:
    """The parameters of a command that loads a checkpoint of a run with the workers of its recipe."""

    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)]
    run: SavedRun
    step: ChosenStep = None
    weights: ChosenWeights = TRAINED
    set_: Annotated[list[str] | None, overrides_option("such as validation.batch=64")] = None
    workers: Workers = None
    accept_new_numerics: Annotated[
        bool,
        typer.Option(
            "--accept-new-numerics",
            help="Load a checkpoint that was saved with different numerics. The last bits of the results may differ.",
        ),
    ] = False

    def start_workers(self, **request: Any) -> None:
        """Start the workers of the recipe, and wait for their end.

        request: entries of the request that each worker gets, besides the recipe. Raises ConfigError, WorkerError.
        """
        from manyhands.documents.recipe_file import check_recipe_file

        checked = check_recipe_file(self.recipe, self.set_ or ())
        allowed = workers_for(self.workers, checked.threads_per_worker, checked.batch.build().micro_batches)
        request |= {"recipe": str(self.recipe.absolute()), "overrides": self.set_ or []}
        command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
        start_workers(command, allowed.most, None, {}, cooperates=True)

    def checkpoint(self) -> dict[str, Any]:
        """Return the choice of the checkpoint, as arguments of `training.finished`."""
        return {
            "run": self.run,
            "step": self.step,
            "weights": self.weights,
            "accept_new_numerics": self.accept_new_numerics,
        }
