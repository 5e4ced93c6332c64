"""The reproduce command."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.parameters import overrides_option, with_arguments
from manyhands.cli.train import TrainArguments, new_directory, train_recipe
from manyhands.cli.workers import Workers
from manyhands.errors import ConfigError
from manyhands.formatting import printable
from manyhands.output import say


@dataclass(frozen=True)
class ReproduceArguments:
    """The parameters of the reproduce command."""

    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)]
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The directory of the new run (default: runs/NAME-again-TIME). A run in it is resumed.",
            show_default=False,
        ),
    ] = None
    set_: Annotated[list[str] | None, overrides_option("as the run did")] = None
    workers: Workers = None
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the new run's summary and the comparison as JSON, an object a line.")
    ] = False


@with_arguments(ReproduceArguments)
def reproduce_command(arguments: ReproduceArguments) -> None:
    """Train a run again in a new directory, and compare the digests.

    The new run makes as many steps as RUN has made, with the same skipped steps and changed settings. If the recipe
    sets epochs, the new run completes them, even if RUN was stopped before. The number of workers and the sharding
    don't matter. RUN contains no code, so name its recipe, too.

    The exit code is 0 if the runs are equal, 1 if they differ.

    Example: `manyhands reproduce recipe.toml runs/first`
    """
    from manyhands.doctor.compare import compare_runs, explain_comparison
    from manyhands.documents.recipe_file import check_recipe_file
    from manyhands.listeners.run_directory import RunDirectory

    checked = check_recipe_file(arguments.recipe, arguments.set_ or ())
    run = RunDirectory.open_existing(arguments.run)
    metrics = run.read_metrics()
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "the run can't be reproduced",
            expected="no other launcher, because reproduce starts the workers itself",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
        )
    if not metrics:
        raise ConfigError(
            "the run can't be reproduced",
            where=str(arguments.run.absolute()),
            expected="a run that has made at least one step",
            got="no steps",
        )
    steps = sorted(run.read_step_digests())
    name = f"{checked.name}-again-{datetime.now():%Y%m%d-%H%M%S}"
    again = arguments.run_dir or new_directory(Path("runs") / name)
    if again.resolve() == arguments.run.resolve():
        raise ConfigError("the run would be compared with itself", got=str(again), hint="choose another --run-dir")
    RunDirectory(again).write_amendments(run.read_amendments())
    training = TrainArguments(
        arguments.recipe,
        workers=arguments.workers,
        set_=arguments.set_,
        steps=None if checked.epochs is not None else metrics[-1].step,
        digest_every=math.gcd(*steps[:-1]) or metrics[-1].step,
        run_dir=again,
        as_json=arguments.as_json,
    )
    train_recipe(training, {})
    comparison = compare_runs(arguments.run, again)
    text = printable(explain_comparison(comparison, str(arguments.run), str(again)))
    say(json.dumps(asdict(comparison)) if arguments.as_json else text, to_stdout=True)
    if not comparison.equal:
        raise typer.Exit(1)
