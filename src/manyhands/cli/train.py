"""The train command: turns its options into overrides of the recipe file, and starts the workers.

The workers build the `Recipe` and the `Strategy` from the file and the overrides (see cli/run_arguments.py). The
command itself only validates the file (`check_recipe_file`), and does not import what the file names.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli.hosts import first_host, train_together
from manyhands.cli.parameters import with_parameters
from manyhands.cli.run_arguments import RunArguments, run_fingerprints
from manyhands.cli.workers import (
    Bounds,
    bounds,
    check_snapshot_every,
    ending_reported,
    number_of_workers,
    record_restart,
    record_run_failure,
    snapshot_memory,
    start_workers,
    workers_for,
)
from manyhands.config import Strategy
from manyhands.errors import CheckpointError, ConfigError
from manyhands.output import say

if TYPE_CHECKING:
    from manyhands.documents.recipe_file import RecipeSchema
    from manyhands.storage.location import Location


@dataclass(frozen=True)
class TrainArguments(RunArguments):
    """The parameters of the train command.

    `config.Strategy` declares further parameters, such as `--loader-workers`.
    """

    snapshot_every: Annotated[
        str,
        typer.Option(
            metavar="N",
            callback=check_snapshot_every,
            help="Steps between snapshots in memory, from which workers restart after a failure: a number, auto "
            "(snapshots take 2 % of the time), or never. With --hosts there are no snapshots.",
        ),
    ] = "auto"
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="The maximum number of restarts after failures. A newly saved step resets the count, except with "
            "--hosts.",
        ),
    ] = 3
    hosts: Annotated[
        Bounds | None,
        typer.Option(
            metavar="N",
            parser=bounds,
            help="The number of hosts, including this one: 2, or a range such as 1:4, in which hosts may join "
            "(`manyhands join`) and leave.",
            show_default=False,
        ),
    ] = None
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --hosts: the address at which other hosts reach this host (default: its name, port 29400).",
            show_default=False,
        ),
    ] = None
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Continue from checkpoints that belong to another run. Then only this run may write to their folder.",
        ),
    ] = False
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over",
            help="Begin the run in --run-dir anew. Its metrics, events, digests and checkpoints move to a subfolder.",
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only try the recipe out, on this host: two steps, one micro-batch of each validation and one "
            "checkpoint. Print the memory, the time, and the size of a checkpoint. Nothing is kept, and no run "
            "directory is used.",
        ),
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")] = False

    def request(self, overrides: list[str], steps: int | None, run_dir: Path) -> dict[str, Any]:
        request = super().request(overrides, steps, run_dir)
        return {**request, "json": self.as_json, "training": {**request["training"], "adopt": self.adopt}}


@with_parameters(TrainArguments, Strategy, after="workers", as_overrides=True)
def train_command(arguments: TrainArguments, strategy: dict[str, Any]) -> None:
    """Train a recipe. The same recipe gives the same bits with any number of workers and any sharding.

    Ctrl-C stops the run after the current step, with a checkpoint. The same command with the same `--run-dir` resumes
    it.

    On several hosts, use --hosts on the first host and `manyhands join` on the others, or let torchrun start this
    command on all of them. See docs/hosts.md.

    Example: `manyhands train recipe.toml --workers 4 --sharding zero2 --set seed=1`
    """
    train_recipe(arguments, strategy)


def train_recipe(arguments: TrainArguments, strategy: dict[str, Any]) -> None:
    """Train a recipe with the arguments of the train command. Raises the errors of `manyhands.train`."""
    from manyhands.documents.recipe_file import check_recipe_file

    overrides = arguments.overrides(strategy)
    checked = check_recipe_file(arguments.recipe, overrides)
    batch = checked.batch.build()
    launched = _launched_workers(arguments)
    allowed = workers_for(arguments.workers, checked.threads_per_worker, batch.micro_batches)
    batch.check_workers(launched or allowed.most)
    steps = arguments.last_step(checked)
    if arguments.dry_run:
        _try_out(arguments, overrides, steps, allowed.most)
        return
    directory = arguments.run_dir or new_directory(Path("runs") / f"{checked.name}-{datetime.now():%Y%m%d-%H%M%S}")
    from manyhands.checkpoint.format import checkpoints_of
    from manyhands.listeners.run_directory import RunDirectory
    from manyhands.storage.run_lock import run_lock
    from manyhands.training.run_record import start_over

    RunDirectory(directory)  # this refuses a path that can't be a run directory before workers start
    checkpoints = checkpoints_of(directory, arguments.checkpoint_dir)
    request = arguments.request(overrides, steps, directory)
    if launched:
        from manyhands.cli.worker import work

        request["training"]["start_over"] = arguments.start_over
        with run_lock(directory) if os.environ.get("RANK") == "0" else nullcontext():
            raise typer.Exit(work(request))
    record = partial(record_run_failure, RunDirectory(directory))
    with ExitStack() as stack:
        stack.enter_context(run_lock(directory))
        if arguments.start_over:  # not in the workers, which would start over again at each restart
            start_over(directory, checkpoints)
        stack.enter_context(ending_reported(record, directory, checkpoints, given=arguments.run_dir is not None))
        if arguments.hosts is None:
            _train_on_this_host(arguments, request, allowed, describer_of_samples(checked), checkpoints)
            return
        batch.check_workers(allowed.most * arguments.hosts.most)
        rendezvous = first_host(
            arguments.hosts,
            arguments.rendezvous,
            run_fingerprints(checked, request),
            arguments.max_restarts,
            partial(record, restart=0),
        )
        if arguments.hosts.most > 1:
            join = ["manyhands", "join", rendezvous.endpoint, *arguments.options(overrides, directory, allowed.most)]
            say(f"other hosts join this run with: {shlex.join(join)}")
        train_together(rendezvous, request, allowed.most)


def _try_out(arguments: TrainArguments, overrides: list[str], steps: int | None, workers: int) -> None:
    """Start the workers for a dry run. Its temporary folder is deleted even if they are killed."""
    if arguments.hosts is not None or "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "a dry run is made on one host",
            expected="manyhands train --dry-run without --hosts and without another launcher",
            got=shlex.join(sys.argv[1:]),
        )
    with tempfile.TemporaryDirectory(prefix="manyhands-dry-run-") as folder:
        request = {
            "recipe": str(arguments.recipe.absolute()),
            "overrides": overrides,
            "json": arguments.as_json,
            "dry_run": {"steps": steps, "folder": folder},
        }
        command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
        say(f"starting {number_of_workers(workers)} ...")
        start_workers(command, workers, None, {}, cooperates=True)


def new_directory(path: Path) -> Path:
    """Create the folder `path`, or `path-2` and so on if it exists: another run may start in the same second."""
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # RunDirectory reports the error
            pass
        return candidate
    return path


def describer_of_samples(checked: RecipeSchema) -> Callable[[int, int], str]:
    """Return a function that describes the samples of (step, micro-batch).

    If epochs end with a short step or drop samples, the samples follow from the size of the data, which only workers
    know. Then the description is empty.
    """
    return checked.batch.build().samples_of if checked.epoch_end == "join" else lambda step, micro_batch: ""


def _train_on_this_host(
    arguments: TrainArguments,
    request: dict[str, Any],
    allowed: Bounds,
    samples_of: Callable[[int, int], str],
    checkpoints: Location,
) -> None:
    """Start the workers, and start them again after failures. Raises WorkerError and Interrupted."""
    from manyhands.launching.restarts import run_with_restarts
    from manyhands.listeners.run_directory import RunDirectory

    command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
    directory = Path(request["run_dir"])
    say(f"starting {number_of_workers(allowed.most)} ...")
    with snapshot_memory(arguments.snapshot_every if arguments.max_restarts else "never", allowed.most) as snapshots:
        run_with_restarts(
            lambda failures: start_workers(
                command, allowed.after(failures), directory / "logs", snapshots.variables, cooperates=True
            ),
            saved_step=lambda: max(snapshots.newest_step(), (0, _last_checkpoint(checkpoints))),
            limit=arguments.max_restarts,
            on_restart=lambda restart: record_restart(RunDirectory(directory), restart, allowed.after(restart.number)),
            samples_of=samples_of,
        )


def _launched_workers(arguments: TrainArguments) -> int:
    """Return the number of workers if another launcher (torchrun) started this process as a worker; otherwise 0."""
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if launched and (arguments.workers is not None or arguments.run_dir is None):
        raise ConfigError(
            "manyhands train was started by another launcher",
            expected="--run-dir DIR, the same for all workers, and no --workers: that launcher sets their number",
            got=shlex.join(sys.argv[1:]),
            hint="with several hosts, DIR must be on a file system that all of them share; without a launcher, unset "
            "RANK and WORLD_SIZE",
        )
    return launched


def _last_checkpoint(checkpoints: Location) -> int:
    """Return the step of the last checkpoint, or 0 if there is none or if its storage is temporarily unreachable."""
    from manyhands.checkpoint.format import list_checkpoints

    try:
        return max((step for step, _ in list_checkpoints(checkpoints)), default=0)
    except CheckpointError:
        return 0
