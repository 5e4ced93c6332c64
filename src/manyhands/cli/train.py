"""The train command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import ExitStack, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.hosts import first_host, train_together
from manyhands.cli.workers import (
    Bounds,
    Workers,
    bounds,
    check_from_one,
    check_snapshot_every,
    ending_reported,
    record_restart,
    record_run_failure,
    snapshot_memory,
    start_workers,
    workers_for,
)
from manyhands.config import OFFLOADS, SHARDINGS, TRANSPORTS
from manyhands.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from manyhands.storage.location import Location


def train_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)],
    workers: Workers = None,
    sharding: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Who holds what: {', '.join(SHARDINGS)}.", show_default=False),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Where state lives: {', '.join(OFFLOADS)}.", show_default=False),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"How bytes travel: {', '.join(TRANSPORTS)}.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=check_from_one,
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
    checkpoint_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where checkpoints go instead: a folder, or an address such as s3://bucket/folder.",
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
            metavar="N", callback=check_from_one, help="How many checkpoints stay (default: 3).", show_default=False
        ),
    ] = 3,
    keep_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=check_from_one,
            help="Keep the checkpoints of every N-th step for good.",
            show_default=False,
        ),
    ] = None,
    snapshot_every: Annotated[
        str,
        typer.Option(
            metavar="N",
            callback=check_snapshot_every,
            help="Steps between snapshots in memory, with which workers that failed begin again: a number, auto (so "
            "often that they cost 2 % of the time), or never. With --hosts none are taken.",
        ),
    ] = "auto",
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="How often to start the workers again after one failed, without a step more saved; with --hosts: in "
            "all (default: 3).",
            show_default=False,
        ),
    ] = 3,
    hosts: Annotated[
        Bounds | None,
        typer.Option(
            metavar="N",
            parser=bounds,
            help="How many hosts train together, this one included: 2, or 1:4, so that others come and go "
            "(`manyhands join`).",
            show_default=False,
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --hosts: where the others reach this one (default: its name, port 29400).",
            show_default=False,
        ),
    ] = None,
    digest_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=check_from_one,
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
    """Train a recipe. The same recipe gives the same bits with any number of workers and any sharding.

    Ctrl-C stops after the step at hand, with a checkpoint; the same command with the same `--run-dir` goes on.

    On several hosts: with --hosts on the first and `manyhands join` on the others; or torchrun starts it, as its
    workers. See docs/hosts.md.

    Example: `manyhands train recipe.toml --workers 4 --sharding zero2 --set seed=1`
    """
    from manyhands.config import every
    from manyhands.documents.recipe_file import check_recipe

    if checkpoint_every is not None:
        every(checkpoint_every)
    overrides = list(set_ or [])
    strategy = {"sharding": sharding, "offload": offload, "transport": transport}
    overrides += [f"strategy.{key}={value}" for key, value in strategy.items() if value is not None]
    checked = check_recipe(recipe, overrides)
    batch = checked.batch.build()
    launched = _launched_workers(workers, run_dir)
    allowed = workers_for(workers, checked.threads_per_worker, batch.micro_batches)
    batch.check_workers(launched or allowed.most)
    if steps is None and checked.steps is None:
        raise ConfigError(
            "nobody says how many steps to train", where=str(recipe), hint="use --steps N, or steps = N in the recipe"
        )
    directory = run_dir or Path("runs") / f"{checked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    from manyhands.checkpoint.format import checkpoints_of
    from manyhands.launching.failures import run_with_restarts
    from manyhands.listeners.run_directory import RunDirectory
    from manyhands.storage.run_lock import run_lock

    RunDirectory(directory)  # a wrong place is refused before workers start
    checkpoints = checkpoints_of(directory, checkpoint_dir)
    request = {
        "recipe": str(recipe),
        "overrides": overrides,
        "steps": steps or checked.steps,
        "run_dir": str(directory),
        "checkpoint_dir": checkpoint_dir,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "keep_every": keep_every,
        "digest_every": digest_every,
        "accept_new_numerics": accept_new_numerics,
        "json": as_json,
    }
    if launched:
        from manyhands.cli.worker import work

        with run_lock(directory) if os.environ.get("RANK") == "0" else nullcontext():
            raise typer.Exit(work(request))
    command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
    note = partial(record_run_failure, RunDirectory(directory))
    with ExitStack() as stack:
        stack.enter_context(run_lock(directory))
        stack.enter_context(ending_reported(note, directory, checkpoints, given=run_dir is not None))
        if hosts is not None:
            batch.check_workers(allowed.most * hosts.most)
            run_rendezvous = first_host(
                hosts, rendezvous, request, allowed.most, max_restarts, partial(note, restart=0)
            )
            train_together(run_rendezvous, allowed.most)
            return
        with snapshot_memory(snapshot_every if max_restarts else "never", allowed.most) as snapshots:
            run_with_restarts(
                lambda failures: start_workers(
                    command, allowed.after(failures), directory / "logs", snapshots.variables, holds_signals=True
                ),
                saved_step=lambda: max(snapshots.newest_step(), (0, _last_checkpoint(checkpoints))),
                limit=max_restarts,
                on_restart=lambda restart: record_restart(
                    RunDirectory(directory), restart, allowed.after(restart.number)
                ),
                samples_of=batch.samples_of,
            )


def _launched_workers(workers: Bounds | None, run_dir: Path | None) -> int:
    """How many workers another launcher (torchrun, say) has started, of which this process is one; 0: none has."""
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if launched and (workers is not None or run_dir is None):
        raise ConfigError(
            "manyhands train was started by another launcher",
            expected="--run-dir DIR, the same for all workers, and no --workers: that launcher says how many",
            got=shlex.join(sys.argv[1:]),
            hint="with several hosts, DIR must be on a file system that all of them share; without a launcher, unset "
            "RANK and WORLD_SIZE",
        )
    return launched


def _last_checkpoint(checkpoints: Location) -> int:
    """How many steps it has made; 0 if there is none, or its store is out of reach just now."""
    from manyhands.checkpoint.format import list_checkpoints

    try:
        return max((step for step, _ in list_checkpoints(checkpoints)), default=0)
    except CheckpointError:
        return 0
