"""The command line: all commands, and the exit codes of errors."""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from manyhands import __version__
from manyhands.cli.doctor import doctor_command
from manyhands.cli.evaluate import evaluate_command
from manyhands.cli.export import export_command
from manyhands.cli.hosts import join_command
from manyhands.cli.new import new_command
from manyhands.cli.prepare import prepare_command
from manyhands.cli.reproduce import reproduce_command
from manyhands.cli.sample import sample_command
from manyhands.cli.train import train_command
from manyhands.cli.workers import Workers, print_restart, snapshot_memory, start_workers, workers_for
from manyhands.errors import ConfigError, Interrupted, InvariantError, ManyhandsError, WorkerError
from manyhands.formatting import printable
from manyhands.output import protect_output, say
from manyhands.surroundings import LAUNCH_VARIABLE, RESTARTS_VARIABLE, to_handle

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train one PyTorch model with any number of workers: the same recipe gives the same bits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The exit codes. An interrupted command has the code of a process that SIGINT ended: 128 + 2.
FAILED = 1

WRONG = 2

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Errors go to stderr, with a traceback only if they are bugs."""
    protect_output()
    # torch warns about every connection that it retries, but users of the command can do nothing about these warnings.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # All stop signals act like Ctrl-C until a command installs its own handler.
    for number in to_handle():
        if number != signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
    try:
        app(standalone_mode=True)
    except ManyhandsError as error:
        shown = _error_to_show(error)
        code = FAILED
        if isinstance(shown, Interrupted):
            code = INTERRUPTED
        elif isinstance(shown, ConfigError):
            code = WRONG
        say(printable(str(shown)))  # the error may quote untrusted text
        sys.exit(code)


def _error_to_show(error: ManyhandsError) -> ManyhandsError:
    """Return the error that a worker raised on purpose, instead of the WorkerError that reports it.

    If the cause is a bug or a report about another worker, the WorkerError is returned, because it states which worker
    failed and how.
    """
    cause = error.__cause__ if isinstance(error, WorkerError) else None
    if isinstance(cause, ManyhandsError) and not isinstance(cause, (InvariantError, WorkerError)):
        return cause
    return error


def _version(requested: bool) -> None:
    if requested:
        say(f"manyhands {__version__}", to_stdout=True)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("new")(new_command)

app.command("train")(train_command)


@app.command(
    "run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run_command(
    context: typer.Context,
    script: Annotated[
        Path,
        typer.Argument(
            metavar="SCRIPT", help="Your script. All arguments after it are passed to the script.", show_default=False
        ),
    ],
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module, as for `python -m`.")
    ] = False,
    workers: Workers = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Maximum number of restarts of the script after failures. A newly saved step resets the count.",
        ),
    ] = 0,
) -> None:
    """Run your own script in N workers, as `torchrun` does, but with less output and with errors that name the root
    cause.

    In the script, `manyhands.train` or `manyhands.Engine` connects to the other workers. After a restart, the script
    runs again from its start, and `train` resumes.

    Example: `manyhands run --workers 4 script.py --its-own-option`
    """
    if not module and not script.is_file():
        hint = "to run a module, use -m" if "." in str(script) and not str(script).endswith(".py") else None
        raise ConfigError("there is no such script", where=str(script.absolute()), hint=hint)
    if not module and script.suffix == ".toml":
        raise ConfigError(
            "this is not a Python script",
            where=str(script.absolute()),
            hint=f"train a recipe file: manyhands train {script} --workers N",
        )
    from manyhands.launching.restarts import run_with_restarts

    program = ["-m", str(script)] if module else [str(script)]
    command, allowed = [sys.executable, *program, *context.args], workers_for(workers, 1, None)
    launch = uuid.uuid4().hex
    with snapshot_memory("auto" if max_restarts else "never", allowed.most) as snapshots:
        run_with_restarts(
            lambda failures: start_workers(
                command,
                allowed.after(failures),
                None,
                snapshots.variables | {RESTARTS_VARIABLE: str(failures), LAUNCH_VARIABLE: launch},
                cooperates=False,
            ),
            saved_step=snapshots.newest_step,
            limit=max_restarts,
            on_restart=lambda restart: print_restart(restart, allowed.after(restart.number)),
        )


@app.command("compare")
def compare_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another run directory.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare two runs. Report that they are equal, or the first step, parameter and block at which they differ.

    The exit code is 0 if they are equal, 1 if they differ, and 2 if they can't be compared.

    Example: `manyhands compare runs/first runs/second`
    """
    from dataclasses import asdict

    from manyhands.doctor.compare import compare_runs, explain_comparison

    comparison = compare_runs(run, other)
    text = printable(explain_comparison(comparison, str(run), str(other)))
    say(json.dumps(asdict(comparison)) if as_json else text, to_stdout=True)
    if not comparison.equal:
        raise typer.Exit(1)


app.command("reproduce")(reproduce_command)

app.command("prepare")(prepare_command)

app.command("evaluate")(evaluate_command)

app.command("sample")(sample_command)

app.command("export")(export_command)

app.command("join")(join_command)

app.command("doctor")(doctor_command)

if __name__ == "__main__":
    main()
