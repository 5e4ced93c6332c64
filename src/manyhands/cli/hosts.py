"""The --hosts option of the train command, and the join command."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli.workers import Bounds, Workers, start_workers
from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.output import say

if TYPE_CHECKING:
    from manyhands.launching.rendezvous import Rendezvous

OnRestart = Callable[[WorkerError | None], None]
"""A function that is called before workers restart, with their failure, or with None if a host joined or left."""


def first_host(
    hosts: Bounds, endpoint: str | None, request: dict[str, Any], workers: int, restarts: int, record: OnRestart
) -> Rendezvous:
    """Create the rendezvous of a run that other hosts may join. Its workers execute `request`. Raises ConfigError."""
    from manyhands.launching.rendezvous import PORT, Rendezvous, parse_endpoint

    host, port = parse_endpoint(endpoint or f"{socket.gethostname()}:{PORT}")
    shared = {
        **request,
        "recipe": str(Path(request["recipe"]).absolute()),
        "run_dir": str(Path(request["run_dir"]).absolute()),
    }
    run_info = {"request": shared, "workers": workers, "recipe_sha256": _sha256(shared["recipe"])}
    return Rendezvous(
        host=host,
        port=port,
        run_id=f"{request['run_dir']}-{uuid.uuid4()}",
        min_hosts=hosts.least,
        max_hosts=hosts.most,
        max_restarts=restarts,
        is_first=True,
        run_info=run_info,
        on_restart=_print_and(record),
    )


def train_together(rendezvous: Rendezvous, workers: int) -> None:
    """Run this host's workers until the run ends. Raises WorkerError and Interrupted."""
    from manyhands.launching.rendezvous import interface_of, own_address

    request = rendezvous.run_info["request"]
    command = [sys.executable, "-m", "manyhands.cli.worker", json.dumps(request)]
    interface = interface_of(own_address(rendezvous.host, rendezvous.port))
    variables = {} if interface is None or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": interface}
    logs = Path(request["run_dir"]) / "logs"
    if rendezvous.is_first and rendezvous.max_hosts > 1:
        say(f"other hosts join this run with: manyhands join {rendezvous.endpoint}")
    start_workers(command, workers, logs, variables, cooperates=True, rendezvous=rendezvous)


def join_command(
    endpoint: Annotated[
        str,
        typer.Argument(metavar="HOST[:PORT]", help="The address that the run's first host prints.", show_default=False),
    ],
    workers: Workers = None,
) -> None:
    """Join a run that another host has started. This host takes part from the next step on. SIGTERM or Ctrl-C leaves
    the run.

    The recipe, its data and the run directory must have the same paths as on the first host.

    Example: `manyhands join first-host:29400 --workers 4`
    """
    from manyhands.launching.rendezvous import join_hosts

    rendezvous = join_hosts(endpoint)
    recipe, run_dir = rendezvous.run_info["request"]["recipe"], Path(rendezvous.run_info["request"]["run_dir"])
    if not Path(recipe).is_file() or _sha256(recipe) != rendezvous.run_info["recipe_sha256"]:
        raise ConfigError(
            "the run's recipe is not the same on this host",
            where=recipe,
            expected="the file of the first host",
            got="another file" if Path(recipe).is_file() else "no such file",
            hint="copy it, and the modules that it imports, to the same path on all hosts, or use a shared file system",
        )
    if not run_dir.is_dir():
        raise ConfigError(
            "the run's directory is not on this host",
            where=str(run_dir),
            hint="use a run directory on a file system that all hosts share",
        )
    mine = workers.most if workers else int(rendezvous.run_info["workers"])
    train_together(replace(rendezvous, on_restart=_print_and(lambda error: None)), mine)


def _print_and(record: OnRestart) -> Callable[[WorkerError | Interrupted | None], None]:
    def on_restart(cause: WorkerError | Interrupted | None) -> None:
        failure = cause if isinstance(cause, WorkerError) else None
        reason = "a host joined or left" if failure is None else str(failure)
        say(f"{reason}\nrestarting with the hosts that are now in the run")
        record(failure)

    return on_restart


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
