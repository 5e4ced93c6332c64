"""The --hosts option of the train command, and the join command."""

from __future__ import annotations

import json
import os
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli.parameters import with_parameters
from manyhands.cli.run_arguments import RunArguments, run_fingerprints, with_absolute_paths
from manyhands.cli.workers import Bounds, number_of_workers, start_workers, workers_for
from manyhands.config import Strategy
from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.output import say
from manyhands.surroundings import PROGRESS_VARIABLE

if TYPE_CHECKING:
    from manyhands.launching.rendezvous import Rendezvous

OnRestart = Callable[[WorkerError | None], None]
"""A function that is called before workers restart, with their failure, or with None if the hosts of the run change."""


def first_host(
    hosts: Bounds, endpoint: str | None, fingerprints: dict[str, str], restarts: int, record: OnRestart
) -> Rendezvous:
    """Create the rendezvous of a run that other hosts may join if their fingerprints are equal. Raises ConfigError."""
    from manyhands.launching.rendezvous import PORT, Rendezvous, parse_endpoint

    host, port = parse_endpoint(endpoint or f"{socket.gethostname()}:{PORT}")
    return Rendezvous(
        host=host,
        port=port,
        run_id=uuid.uuid4().hex,
        min_hosts=hosts.least,
        max_hosts=hosts.most,
        max_restarts=restarts,
        is_first=True,
        fingerprints=fingerprints,
        on_restart=_print_and(record),
    )


def train_together(rendezvous: Rendezvous, request: dict[str, Any], workers: int) -> None:
    """Run this host's workers, which execute `request`, until the run ends. Raises WorkerError and Interrupted."""
    from manyhands.launching.rendezvous import interface_of, own_address

    command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(with_absolute_paths(request))]
    interface = interface_of(own_address(rendezvous.host, rendezvous.port))
    variables = {} if interface is None or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": interface}
    variables[PROGRESS_VARIABLE] = "2"
    say(f"starting {number_of_workers(workers)} on this host, when enough hosts are there ...")
    start_workers(
        command, workers, Path(request["run_dir"]) / "logs", variables, cooperates=True, rendezvous=rendezvous
    )


@dataclass(frozen=True)
class _Endpoint:
    """The first parameter of the join command."""

    endpoint: Annotated[
        str,
        typer.Argument(metavar="HOST[:PORT]", help="The address that the run's first host prints.", show_default=False),
    ]


@dataclass(frozen=True)
class JoinArguments(RunArguments, _Endpoint):
    """The parameters of the join command: an address, and the parameters of the train command on the first host."""


@with_parameters(JoinArguments, Strategy, after="workers", as_overrides=True)
def join_command(arguments: JoinArguments, strategy: dict[str, Any]) -> None:
    """Join a run that another host has started. This host takes part from the next step on. SIGTERM or Ctrl-C leaves
    the run.

    The first host prints this command with its arguments. They must describe the same run: nothing that arrives from
    the first host names code, files or options. The exit code is 2 if the two hosts differ.

    Example: `manyhands join first-host:29400 recipe.toml --run-dir /shared/runs/first --workers 4`
    """
    from manyhands.documents.recipe_file import check_recipe_file
    from manyhands.launching.rendezvous import join_hosts

    overrides = arguments.overrides(strategy)
    checked = check_recipe_file(arguments.recipe, overrides)
    batch = checked.batch.build()
    if arguments.run_dir is None:
        raise ConfigError(
            "a host that joins a run needs the run's directory",
            expected="--run-dir DIR, as on the first host",
            hint="the first host prints the complete command",
        )
    request = arguments.request(overrides, arguments.last_step(checked), arguments.run_dir)
    request["training"]["adopt"] = False
    rendezvous = join_hosts(arguments.endpoint, run_fingerprints(checked, request))
    if not arguments.run_dir.is_dir():
        raise ConfigError(
            "the run's directory is not on this host",
            where=str(arguments.run_dir),
            hint="use a run directory on a file system that all hosts share",
        )
    workers = workers_for(arguments.workers, checked.threads_per_worker, batch.micro_batches).most
    train_together(replace(rendezvous, on_restart=_print_and(lambda error: None)), request, workers)


def _print_and(record: OnRestart) -> Callable[[WorkerError | Interrupted | None], None]:
    def on_restart(cause: WorkerError | Interrupted | None) -> None:
        failure = cause if isinstance(cause, WorkerError) else None
        reason = "a host joined, left or seems lost" if failure is None else str(failure)
        say(f"{reason}\nrestarting with the hosts that are now in the run")
        record(failure)

    return on_restart
