"""The evaluate command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.workers import Workers, start_workers, workers_for


def evaluate_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)],
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory, or a folder or address of checkpoints.", show_default=False
        ),
    ],
    step: Annotated[
        int | None,
        typer.Option(metavar="N", help="The checkpoint after N steps (default: the last).", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this validation of the recipe. Repeat as needed.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, such as validation.batch=64. Repeat as needed.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    accept_new_numerics: Annotated[
        bool,
        typer.Option(
            "--accept-new-numerics",
            help="Evaluate a checkpoint that was saved with different numerics. The last bits of the figures may "
            "differ.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Evaluate a checkpoint on the recipe's validations. The figures are the same for any number of workers.

    Nothing is written to the run.

    Example: `manyhands evaluate recipe.toml runs/first --step 500`
    """
    from manyhands.documents.recipe_file import check_recipe

    checked = check_recipe(recipe, set_ or ())
    allowed = workers_for(workers, checked.threads_per_worker, checked.batch.build().micro_batches)
    request = {
        "recipe": str(recipe.absolute()),
        "overrides": set_ or [],
        "json": as_json,
        "evaluation": {
            "run": run,
            "step": step,
            "only": only or [],
            "accept_new_numerics": accept_new_numerics,
        },
    }
    command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
    start_workers(command, allowed.most, None, {}, cooperates=True)
