"""The evaluate command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from manyhands.cli.parameters import with_arguments
from manyhands.cli.saved_run import CheckpointArguments


@dataclass(frozen=True)
class EvaluateArguments(CheckpointArguments):
    """The parameters of the evaluate command."""

    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this validation of the recipe. Repeat as needed.", show_default=False),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False


@with_arguments(EvaluateArguments)
def evaluate_command(arguments: EvaluateArguments) -> None:
    """Evaluate a checkpoint on the recipe's validations. The figures are the same for any number of workers.

    Nothing is written to the run.

    Example: `manyhands evaluate recipe.toml runs/first --step 500`
    """
    arguments.start_workers(evaluation={**arguments.checkpoint(), "only": arguments.only or []}, json=arguments.as_json)
