"""Starts N workers on this host.

The elastic launcher starts the processes, sets RANK, WORLD_SIZE, MASTER_ADDR and the rest, watches them, and ends all
when one fails. Three things of it are replaced, each through an interface that torch offers for that:

- the rendezvous (`_LocalRendezvous`): one host needs no agreement; the store listens on 127.0.0.1 alone, on a port
  that the system picks and that is never given back before it is used;
- the signal handlers (`Stop`): torch's raise from wherever the parent happens to be, also between two starts of
  workers, which are then lost; ours note the signal, and the launcher's next look at the workers acts on it;
- the log folders (`Logs`): plain files, written by the workers themselves (see launching/child.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.launching.failures import explain_failure
from manyhands.launching.rendezvous import Rendezvous
from manyhands.launching.supervision import Stop, WorkerMonitor, kill_all
from manyhands.launching.worker_files import Logs, shared_folder
from manyhands.members.reports import WorkerEnd

_BACKEND = "manyhands-local"

_CHILD = Path(__file__).resolve().parents[1] / "launching" / "child.py"

_PLAN_FILE = "plan.json"  # as in launching/child.py, which runs without this package

_TALKERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torchelastic-events-null")


def run_workers(
    command: Sequence[str],
    *,
    workers: int,
    environment: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    grace_seconds: float = 30.0,
    quiet: bool = True,
    holds_signals: bool = False,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Run `command` in `workers` processes on this host; returns when all have ended well (exit code 0).

    meeting: together with those of other hosts, which may come and go; then workers are started again as it says.

    Worker 0 writes to this terminal; the others to `log_dir/worker-R.log` (appended), or to the terminal without one.
    `environment` is added to what the workers inherit. `quiet=False` lets the elastic launcher's own log through.
    `holds_signals`: a worker begins with SIGINT and SIGTERM blocked, and unblocks them once it listens (StopSignals).

    SIGINT, SIGTERM and SIGHUP are passed on once to the workers, which have `grace_seconds` to finish their step and
    save; a second Ctrl-C kills them at once. (Workers are sessions of their own: a Ctrl-C reaches only the parent.)
    If the parent is killed, the kernel kills the workers (Linux). Signals are only handled in the main thread.

    Raises WorkerError naming the root cause; Interrupted when asked to stop; ConfigError for a command that isn't
    there.
    Either way, and before workers are started again, no worker is left, nor anything that it started in its session,
    nor a temporary file. (What workers that ended well have left running in theirs goes on.)
    """
    if workers < 1:
        raise ConfigError("the number of workers is out of range", expected="at least 1", got=workers)
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError("the workers' command isn't there", got=command[0], expected="a program on the PATH")
    if log_dir is not None:
        log_dir = log_dir.absolute()
        log_dir.mkdir(parents=True, exist_ok=True)
    with shared_folder() as folder:
        plan = {
            "command": [program, *command[1:]],
            "log_dir": None if log_dir is None else str(log_dir),
            "parent": os.getpid(),
            "holds_signals": holds_signals,
        }
        (folder / _PLAN_FILE).write_text(json.dumps(plan), encoding="utf-8")
        logs = Logs(folder, log_dir, dict(environment or {}), None if rendezvous is None else rendezvous.tell)
        stop = Stop(folder, workers, grace_seconds)
        config = _config(folder, workers, logs, stop, rendezvous)
        try:
            exit_codes = _launch(folder, config, stop, quiet)
        except WorkerError as error:  # the hosts don't meet again: the workers here may know what was before that
            raise behind(error, logs.ends({})) from None
        ends = logs.ends(exit_codes)
    if stop.signal is not None:
        raise stop.interrupted(ends)
    if exit_codes:
        raise explain_failure(ends)


def behind(error: WorkerError, ends: Sequence[WorkerEnd]) -> WorkerError | Interrupted:
    """What the workers that ended so on this host say of why the hosts don't find together any more: that a worker
    failed too often on some host, or that the run was stopped; else `error`. Their exit codes aren't known."""
    told = [replace(end, exit_code=1) for end in ends if end.failure is not None and not end.failure.is_secondhand]
    said = explain_failure(told) if told else error
    if isinstance(said, Interrupted):
        words = [end.failure.error() for end in told if end.failure is not None]
        return next((word for word in words if isinstance(word, Interrupted)), said)
    if said is not error:
        said.detail = "\n".join(filter(None, [said.detail, f"then {error}"]))
    return said


def _config(folder: Path, workers: int, logs: Logs, stop: Stop, rendezvous: Rendezvous | None) -> LaunchConfig:
    """torch's configuration of a launch."""
    rendezvous_handler_registry.register(_BACKEND, _LocalRendezvous)
    one_host = {"min_nodes": 1, "max_nodes": 1, "run_id": folder.name, "rdzv_backend": _BACKEND, "max_restarts": 0}
    config = LaunchConfig(
        **(one_host if rendezvous is None else rendezvous.launch_options()),
        nproc_per_node=workers,
        monitor_interval=0.1,
        logs_specs=logs,
        signals_to_handle="",  # ours stay
        shutdown_timeout=math.ceil(stop.grace_seconds),
    )
    config.rdzv_configs |= {"stop": stop, "watch": WorkerMonitor(folder)}
    return config


def _launch(folder: Path, config: LaunchConfig, stop: Stop, quiet: bool) -> dict[int, tuple[int, float]]:
    """Start and await the workers. Gives (exit code, seconds since the epoch) of those that failed."""
    ended_well = False
    with ExitStack() as stack:
        stack.enter_context(_environment_kept("TORCHELASTIC_SIGNALS_TO_HANDLE"))
        stack.enter_context(_environment_kept("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"))
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else who joins isn't told where the others meet
        stack.enter_context(stop.listening())
        if quiet:
            stack.enter_context(_silenced(*_TALKERS))
        try:
            # Not the command itself: torch substitutes "$" in arguments. The child reads it from the folder.
            elastic_launch(config, sys.executable)("-I", "-S", str(_CHILD), str(folder))
            ended_well = True
        except ChildFailedError as error:
            return {rank: (failure.exitcode, float(failure.timestamp)) for rank, failure in error.failures.items()}
        except SignalException:  # raised by `Stop`: torch has passed the signal on, and awaited or killed the workers
            return {}
        except (RendezvousError, DistError) as error:  # the latter: of the store, after the hosts had found together
            raise WorkerError(
                "the hosts don't find together (any more)",
                where=config.rdzv_endpoint,
                hint="if the first host is gone, start the run on another one, with the same run directory",
                detail="\n".join(str(reason) for reason in (error, error.__cause__) if reason is not None),
            ) from error
        finally:
            if not ended_well:
                kill_all(folder)
    return {}


class _LocalRendezvous(RendezvousHandler):
    """Where the launcher learns its ranks: one host, one round, and a store that listens on 127.0.0.1 alone."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._stop: Stop = parameters.get("stop")
        self._watch: WorkerMonitor = parameters.get("watch")
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return _BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # the workers are clients of this store: MASTER_PORT is taken already when they start

    def next_rendezvous(self) -> RendezvousInfo:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo("127.0.0.1", port))

    def num_nodes_waiting(self) -> int:
        # The launcher asks this after each look at its healthy workers: a place where it can be stopped safely.
        self._stop.raise_if_asked()
        self._watch.look()
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._store = None
        return True


@contextmanager
def _environment_kept(name: str) -> Iterator[None]:
    """The launcher sets this variable in its own process: it goes back to what it was."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """These loggers and all below them say nothing: what matters becomes an error of ours."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.propagate for logger in loggers]
    nowhere = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(nowhere)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(nowhere)
            logger.propagate = propagate
