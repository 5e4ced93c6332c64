"""The command line: what a person types, checked before anything is started."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from manyhands import __version__
from manyhands.cli.export import export
from manyhands.config import GROUPS, HOMES, STAGES
from manyhands.errors import ConfigError, Interrupted, InvariantError, ManyhandsError, WorkerError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train one PyTorch model with any number of workers: the same recipe gives the same bits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
FAILED = 1
WRONG = 2


def main() -> None:
    """Run the command line; what went wrong is told on stderr, without a traceback unless it's a bug."""
    try:
        app(standalone_mode=True)
    except ManyhandsError as error:
        passed_on = error.__cause__ if isinstance(error, WorkerError) else None  # what a worker has raised on purpose
        told = passed_on if isinstance(passed_on, ManyhandsError) and not _is_ours(passed_on) else error
        _leave(
            str(told),
            INTERRUPTED if isinstance(told, Interrupted) else WRONG if isinstance(told, ConfigError) else FAILED,
        )


def _is_ours(error: ManyhandsError) -> bool:
    """A bug of ours, or news of another worker: there, who and how is what matters."""
    return isinstance(error, (InvariantError, WorkerError))


def _leave(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"{text}\n")
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manyhands {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _from_one(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} is not a whole number of at least 1")
    return value


Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-n",
        metavar="N",
        callback=_from_one,
        help="Worker processes on this machine (default: as many as its CPUs allow).",
        show_default=False,
    ),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)],
    workers: Workers = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Who holds what: {', '.join(STAGES)}.", show_default=False),
    ] = None,
    home: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Where state lives: {', '.join(HOMES)}.", show_default=False),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"How bytes travel: {', '.join(GROUPS)}.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=_from_one,
            help="Train until this many steps are made (default: as the recipe says).",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, such as seed=1 or batch.micro_size=2. Repeat as needed.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where figures and checkpoints go; an earlier run's is continued (default: runs/NAME-TIME).",
            show_default=False,
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Steps or time between checkpoints: 500, 30s, 10m, 2h (default: only at the end, and when stopped).",
            show_default=False,
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            metavar="N", callback=_from_one, help="How many checkpoints stay (default: 3).", show_default=False
        ),
    ] = 3,
    keep_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=_from_one,
            help="Keep the checkpoints of every N-th step for good.",
            show_default=False,
        ),
    ] = None,
    digest_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=_from_one,
            help="Steps between digests of the weights (default: 10).",
            show_default=False,
        ),
    ] = 10,
    accept_new_numerics: Annotated[
        bool,
        typer.Option(
            "--accept-new-numerics",
            help="Go on with a run begun under other numerics (another torch, CPU kind, thread count).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")] = False,
) -> None:
    """Train a recipe. The same recipe gives the same bits with any number of workers and any stage.

    Ctrl-C stops after the step at hand, with a checkpoint; the same command with the same `--run-dir` goes on.

    Example: `manyhands train recipe.toml --workers 4 --stage zero2 --set seed=1`
    """
    from manyhands.training.every import every
    from manyhands.training.recipe_file import check_recipe

    if checkpoint_every is not None:
        every(checkpoint_every)
    overrides = list(set_ or [])
    strategy = {"stage": stage, "home": home, "group": group}
    overrides += [f"strategy.{key}={value}" for key, value in strategy.items() if value is not None]
    checked = check_recipe(recipe, overrides)
    batch = checked.batch.build()
    if workers is None:
        workers = default_workers(checked.threads_per_worker, batch.micro_batches)
    batch.check_workers(workers)
    if steps is None and checked.steps is None:
        raise ConfigError(
            "nobody says how many steps to train", where=str(recipe), hint="use --steps N, or steps = N in the recipe"
        )
    directory = run_dir or Path("runs") / f"{checked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    from manyhands.report.run_directory import RunDirectory

    RunDirectory(directory)  # a wrong place is refused before workers start
    request = {
        "recipe": str(recipe),
        "overrides": overrides,
        "steps": steps or checked.steps,
        "run_dir": str(directory),
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "keep_every": keep_every,
        "digest_every": digest_every,
        "accept_new_numerics": accept_new_numerics,
        "json": as_json,
    }
    try:
        command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
        _run_workers(command, workers, directory / "logs", holds_signals=True)
    except Interrupted as error:
        raise _with_the_way_on(error, directory, given=run_dir is not None) from None


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Annotated[
        Path,
        typer.Argument(metavar="SCRIPT", help="Your script; what follows it are its arguments.", show_default=False),
    ],
    workers: Workers = None,
) -> None:
    """Run your own script in N workers, as `torchrun` would, but quietly and with errors that name the culprit.

    Inside, `manyhands.train` or `manyhands.Engine` finds the other workers.

    Example: `manyhands run --workers 4 script.py --its-own-option`
    """
    if not script.is_file():
        raise ConfigError("there is no such script", where=str(script.absolute()))
    _run_workers(
        [sys.executable, str(script), *context.args], workers or default_workers(1, None), None, holds_signals=False
    )


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say that two runs are equal, or name the first step, parameter and block at which they differ.

    Exit code 0: equal; 1: different; 2: they can't be compared.

    Example: `manyhands compare runs/first runs/second`
    """
    from dataclasses import asdict

    from manyhands.report.compare import compare_runs, explain

    comparison = compare_runs(run, other)
    typer.echo(json.dumps(asdict(comparison)) if as_json else explain(comparison, str(run), str(other)))
    if not comparison.equal:
        raise typer.Exit(1)


app.command()(export)


def default_workers(threads_per_worker: int, micro_batches: int | None) -> int:
    """As many workers as the CPUs that this process may use allow, but no more than there are micro-batches."""
    import os

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cpus // threads_per_worker)
    return workers if micro_batches is None else min(workers, micro_batches)


def _run_workers(command: list[str], workers: int, log_dir: Path | None, *, holds_signals: bool) -> None:
    try:
        from manyhands.launching.launcher import run_workers

        run_workers(command, workers=workers, log_dir=log_dir, holds_signals=holds_signals)
    except KeyboardInterrupt:  # before the launcher listened to signals
        raise Interrupted("stopped before any worker began, as asked (SIGINT)") from None


def _with_the_way_on(error: Interrupted, directory: Path, *, given: bool) -> Interrupted:
    """The same, with where the last checkpoint is and how to go on from it; or that there is none."""
    from manyhands.checkpoint.format import list_checkpoints

    found = list_checkpoints(directory / "checkpoints")
    again = shlex.join(["manyhands", *sys.argv[1:], *([] if given else ["--run-dir", str(directory)])])
    return Interrupted(
        error.what,
        where=f"its last checkpoint is {found[-1][1]}" if found else "there is no checkpoint: no step was finished",
        hint=f"to go on: {again}" if found else None,
        detail=error.detail,
    )


if __name__ == "__main__":
    main()
