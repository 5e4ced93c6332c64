"""Starts N workers on this host and waits until they end (`run_workers`). For restarts, see restarts.py.

On one host, `run_workers` raises an error after the first failure. Then `run_with_restarts` (restarts.py) calls it
again. On several hosts, `run_workers` runs torch's elastic agent. The agent restarts the workers itself, together with
the agents of the other hosts, which it meets at the rendezvous (rendezvous.py).

torch's elastic launcher starts the processes, sets their variables (RANK, WORLD_SIZE, MASTER_ADDR and others), watches
them, and ends all of them when one fails. This module replaces three parts of the launcher, each through an interface
of torch:

- the rendezvous (`_LocalRendezvous`): one host needs no agreement. The store listens only on 127.0.0.1, on a port that
  the system chooses and that stays open, so that no other process can take it;
- the signal handlers (`StopRequest`): torch's handlers may raise while only some workers have started, and leave these
  orphaned. The handlers here only record the signal, and the launcher reacts when it next checks the workers;
- the log folders (`Logs`): plain files that the workers write themselves (see launching/child.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sys
import time
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
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.launching.rendezvous import Rendezvous
from manyhands.launching.root_cause import explain_failure
from manyhands.launching.supervision import StopRequest, WorkerMonitor, kill_all
from manyhands.launching.worker_files import Logs, shared_folder
from manyhands.members.reports import WorkerEnd
from manyhands.options import whole_number

_BACKEND = "manyhands-local"

_CHILD = Path(__file__).resolve().parents[1] / "launching" / "child.py"

_PLAN_FILE = "plan.json"  # the same as in launching/child.py, which cannot import this package

_NOISY_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torchelastic-events-null")


def run_workers(
    command: Sequence[str],
    *,
    workers: int,
    environment: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    grace_seconds: float = 30.0,
    quiet: bool = True,
    cooperates: bool = False,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Run `command` in `workers` processes on this host. Return when all of them have exited with code 0.

    environment: variables added to those that the workers inherit. log_dir: the output of worker R > 0 is appended to
    log_dir/worker-R.log. Worker 0, and without a log_dir all workers, write to this process's terminal.
    grace_seconds: the time that workers have to stop after a signal. quiet: suppress the log of torch's elastic
    launcher.
    cooperates: workers start with stop signals blocked, unblock them once their handlers are installed (StopSignals),
    and call `end_work` before they exit. rendezvous: if given, run together with workers on other hosts, which may join
    and leave. It also specifies how often workers are restarted.

    A stop signal (see `surroundings`) is passed on once to the workers, as SIGINT if it is SIGINT and as SIGTERM
    otherwise. The workers then have `grace_seconds` to finish their step and save. A second Ctrl-C kills them
    immediately. Every worker leads its own session, so that a Ctrl-C on the terminal reaches only the parent. Signals
    are handled only if this is the main thread. If the parent is killed, the kernel kills the workers (Linux).

    Raises WorkerError, which names the root cause; Interrupted after a stop signal; ConfigError if the command does not
    exist. A worker that exits with code 0 in the middle of its work has failed, too. After a failure, and before a
    restart, no worker and no process in its session is left. Temporary files are always deleted at the end. After
    success, processes that the workers left running in their sessions continue.
    """
    requested, workers = workers, whole_number(workers) or 0
    if workers < 1:
        raise ConfigError("the number of workers is out of range", expected="an integer of at least 1", got=requested)
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError("the workers' command was not found", got=command[0], expected="a program on the PATH")
    if log_dir is not None:
        log_dir = log_dir.absolute()
        log_dir.mkdir(parents=True, exist_ok=True)
    with shared_folder() as folder:
        plan = {
            "command": [program, *command[1:]],
            "log_dir": None if log_dir is None else str(log_dir),
            "parent": os.getpid(),
            "holds_signals": cooperates,
        }
        (folder / _PLAN_FILE).write_text(json.dumps(plan), encoding="utf-8")
        on_restart = None if rendezvous is None else rendezvous.on_restart
        logs = Logs(folder, log_dir, dict(environment or {}), on_restart, cooperates=cooperates)
        stop = StopRequest(folder, workers, grace_seconds)
        config = _config(folder, workers, logs, stop, rendezvous)
        try:
            exit_codes = _launch(folder, config, stop, quiet)
        except WorkerError as error:  # the rendezvous failed, and a worker of this host may have reported the reason
            raise explain_rendezvous_failure(error, logs.ends({}), stop) from None
        if not exit_codes and stop.signal is None:
            exit_codes = dict.fromkeys(logs.unfinished(), (0, time.time()))
        ends = logs.ends(exit_codes)
    if stop.signal is not None:
        raise stop.interrupted(ends)
    if exit_codes:
        raise explain_failure(ends)


def explain_rendezvous_failure(
    error: WorkerError, ends: Sequence[WorkerEnd], stop: StopRequest
) -> WorkerError | Interrupted:
    """Return the error that explains why the rendezvous failed with `error`.

    ends: how the workers of this host ended; their exit codes are not known. The result is the root cause if a worker
    failed (perhaps too often), Interrupted if the first host was requested to stop the run, and otherwise `error`, or
    an error which says that this host has left the run.

    When a host joins or seems lost, a launcher stops its workers, and then all workers of the run stop after the same
    step. Each worker reports that it was requested to stop. Such a report doesn't explain why the rendezvous failed.
    """
    failed = [end for end in ends if end.failure is not None]
    stopped = [end for end in failed if end.failure and end.failure.kind in ("Interrupted", "KeyboardInterrupt")]
    reported = [end for end in failed if end not in stopped and end.failure and not end.failure.is_secondhand]
    if reported:
        cause = explain_failure([replace(end, exit_code=1) for end in reported])
        cause.detail = "\n".join(filter(None, [cause.detail, f"then {error}"]))
        return cause
    if stop.stopped_by_first_host:
        errors = [end.failure.error() for end in stopped if end.failure is not None]
        unknown = Interrupted("the first host was requested to stop the run", where=error.where)
        return next((each for each in errors if isinstance(each, Interrupted)), unknown)
    if not stopped and not stop.regroups:
        return error
    return WorkerError(
        "this host has left the run: the hosts did not meet again after one had joined or seemed lost",
        where=error.where,
        hint="set the clocks, and use manyhands join to take part again"
        if stop.clocks_differ
        else "check whether the first host was stopped and whether the hosts can reach each other. Check their "
        "clocks, too: a host whose clock jumps by several seconds seems lost. To take part again, use "
        "manyhands join",
        detail="\n".join(filter(None, [stop.how_clocks_differ if stop.clocks_differ else None, error.detail])) or None,
    )


def _config(folder: Path, workers: int, logs: Logs, stop: StopRequest, rendezvous: Rendezvous | None) -> LaunchConfig:
    """Return torch's configuration of the launch."""
    rendezvous_handler_registry.register(_BACKEND, _LocalRendezvous)
    one_host = {"min_nodes": 1, "max_nodes": 1, "run_id": folder.name, "rdzv_backend": _BACKEND, "max_restarts": 0}
    config = LaunchConfig(
        **(one_host if rendezvous is None else rendezvous.launch_options()),
        nproc_per_node=workers,
        monitor_interval=0.1,
        logs_specs=logs,
        signals_to_handle="",  # keep the handlers of StopRequest
        shutdown_timeout=math.ceil(stop.grace_seconds),
    )
    config.rdzv_configs |= {"stop": stop, "monitor": WorkerMonitor(folder)}
    return config


def _launch(folder: Path, config: LaunchConfig, stop: StopRequest, quiet: bool) -> dict[int, tuple[int, float]]:
    """Start the workers and wait for them. Return (exit code, seconds since the epoch) of failed workers by rank."""
    succeeded = False
    with ExitStack() as stack:
        stack.enter_context(_restored_variable("TORCHELASTIC_SIGNALS_TO_HANDLE"))
        stack.enter_context(_restored_variable("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"))
        # With a shared store, a joining host would not learn the address at which the workers meet.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        stack.enter_context(stop.listening())
        if quiet:
            stack.enter_context(_silenced(*_NOISY_LOGGERS))
        try:
            # The command is not passed as an argument, because torch substitutes "$" in arguments. The child reads the
            # command from the folder.
            elastic_launch(config, sys.executable)("-I", "-S", str(_CHILD), str(folder))
            succeeded = True
        except ChildFailedError as error:
            return {rank: (failure.exitcode, float(failure.timestamp)) for rank, failure in error.failures.items()}
        except SignalException:
            # StopRequest raised this. torch has passed the signal on, and has waited for the workers or killed them.
            return {}
        except (RendezvousStateError, ValueError, LookupError, TypeError) as error:
            if config.rdzv_backend == _BACKEND:
                raise  # on a single host, no value comes from another launcher
            raise WorkerError(
                "rendezvous failed: its store holds a value that no launcher of this run wrote",
                where=config.rdzv_endpoint,
                hint="another version of Manyhands or another program uses this address: start the run again at "
                "another port, in a network to which only its hosts have access",
                detail=f"{type(error).__name__}: {str(error)[:300]!a}",
            ) from error
        except (RendezvousError, DistError) as error:  # DistError: the store failed after the rendezvous
            raise WorkerError(
                "rendezvous failed: the hosts can no longer reach each other",
                where=config.rdzv_endpoint,
                hint="if the first host is lost, start the run on another host, with the same run directory",
                detail="\n".join(str(reason) for reason in (error, error.__cause__) if reason is not None),
            ) from error
        finally:
            if not succeeded:
                kill_all(folder)
    return {}


class _LocalRendezvous(RendezvousHandler):
    """The rendezvous of a single host: one round, with a store that listens only on 127.0.0.1."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._stop: StopRequest = parameters.get("stop")
        self._monitor: WorkerMonitor = parameters.get("monitor")
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return _BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # the workers are clients of this store, so that MASTER_PORT is in use before they start

    def next_rendezvous(self) -> RendezvousInfo:
        # Pass the open socket to the store. If the socket were closed first, another process could take its port.
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo("127.0.0.1", port))

    def num_nodes_waiting(self) -> int:
        # torch's launcher calls this after each check of its healthy workers, so it can be stopped safely here.
        self._stop.raise_if_requested()
        self._monitor.check()
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
def _restored_variable(name: str) -> Iterator[None]:
    """Restore an environment variable on exit, because the launcher changes it in this process."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Discard the messages of these loggers and their children, because failures are reported as errors of
    Manyhands.
    """
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
