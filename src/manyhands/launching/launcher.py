"""Start N workers on this machine through torch's elastic launcher, in this process, quietly, and end them well.

The elastic launcher starts the processes, sets RANK, WORLD_SIZE, MASTER_ADDR and the rest, watches them, and ends all
when one fails. Three things of it are replaced, each through an interface that torch offers for that:

- the rendezvous (`_LocalRendezvous`): one host needs no agreement; the store listens on 127.0.0.1 alone, on a port
  that the system picks and that is never given back before it is used;
- the signal handlers (`Stop`): torch's raise from wherever the parent happens to be, also between two starts of
  workers, which are then lost; ours note the signal, and the launcher's next look at the workers acts on it;
- the log folders (`_Logs`): plain files, written by the workers themselves (see launching/child.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from manyhands.errors import ConfigError
from manyhands.launching.culprit import explain
from manyhands.launching.stop import Stop, end_all
from manyhands.launching.watch import Watch, status_file
from manyhands.members.failure import (
    ERROR_FILE_VARIABLE,
    PARENT_TELLS_VARIABLE,
    WorkerEnd,
    read_failure,
    record_failure,
)
from manyhands.members.status_file import STATUS_FILE_VARIABLE, read_status

__all__ = ["record_failure", "run_workers"]

_BACKEND = "manyhands-local"
_CHILD = Path(__file__).resolve().parents[1] / "launching" / "child.py"
_PLAN_FILE = "plan.json"  # as in launching/child.py, which runs without this package
_LOG_TAIL_LINES = 20
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
) -> None:
    """Run `command` in `workers` processes on this host; returns when all have ended well (exit code 0).

    Worker 0 writes to this terminal; the others to `log_dir/worker-R.log` (appended), or to the terminal without one.
    `environment` is added to what the workers inherit. `quiet=False` lets the elastic launcher's own log through.
    `holds_signals`: a worker begins with SIGINT and SIGTERM blocked, and unblocks them once it listens (StopSignals).

    SIGINT, SIGTERM and SIGHUP are passed on once to the workers, which have `grace_seconds` to finish their step and
    save; a second Ctrl-C kills them at once. (Workers are sessions of their own: a Ctrl-C reaches only the parent.)
    If the parent is killed, the kernel kills the workers (Linux). Signals are only handled in the main thread.

    Raises WorkerError naming the culprit; Interrupted when asked to stop; ConfigError for a command that isn't there.
    Either way no worker is left, nor anything that it started in its session, nor a temporary file.
    """
    if workers < 1:
        raise ConfigError("the number of workers is out of range", expected="at least 1", got=workers)
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError("the workers' command isn't there", got=command[0], expected="a program on the PATH")
    if log_dir is not None:
        log_dir = log_dir.absolute()
        log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="manyhands-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        plan = {
            "command": [program, *command[1:]],
            "log_dir": None if log_dir is None else str(log_dir),
            "parent": os.getpid(),
            "holds_signals": holds_signals,
        }
        (folder / _PLAN_FILE).write_text(json.dumps(plan), encoding="utf-8")
        logs = _Logs(folder, log_dir, dict(environment or {}))
        stop = Stop(folder, workers, grace_seconds)
        exit_codes = _launch(folder, workers, logs, stop, quiet)
        ends = [logs.end_of(rank, *exit_codes.get(rank, (0, time.time()))) for rank in range(workers)]
    if stop.signal is not None:
        raise stop.interrupted(ends)
    if exit_codes:
        raise explain(ends)


def _launch(folder: Path, workers: int, logs: _Logs, stop: Stop, quiet: bool) -> dict[int, tuple[int, float]]:
    """Start and await the workers. Gives (exit code, seconds since the epoch) of those that failed."""
    rendezvous_handler_registry.register(_BACKEND, _LocalRendezvous)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=folder.name,
        rdzv_backend=_BACKEND,
        rdzv_configs={"stop": stop, "watch": Watch(folder)},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
        signals_to_handle="",  # ours stay
        shutdown_timeout=math.ceil(stop.grace_seconds),
    )
    ended_well = False
    with ExitStack() as stack:
        stack.enter_context(_environment_kept("TORCHELASTIC_SIGNALS_TO_HANDLE"))
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
        finally:
            if not ended_well:
                end_all(folder)
    return {}


class _LocalRendezvous(RendezvousHandler):
    """Where the launcher learns its ranks: one host, one round, and a store that listens on 127.0.0.1 alone."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._stop: Stop = parameters.get("stop")
        self._watch: Watch = parameters.get("watch")
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


class _Logs(LogsSpecs):
    """Gives the launcher the workers' environment and error files, and reads what they left."""

    def __init__(self, folder: Path, log_dir: Path | None, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._folder, self._log_dir, self._environment = folder, log_dir, environment
        # A log may go on from an earlier run, whose last lines are not this one's.
        self._earlier_bytes = {path: path.stat().st_size for path in log_dir.glob("worker-*.log")} if log_dir else {}

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for rank, variables in envs.items():
            for name, value in self._environment.items():
                variables.setdefault(name, value)
            variables.setdefault("OMP_NUM_THREADS", "1")
            if self._log_dir is not None and "PYTHONUNBUFFERED" not in os.environ:
                # What a killed worker has printed isn't lost. (On a shared terminal it would cut lines into pieces.)
                variables.setdefault("PYTHONUNBUFFERED", "1")
            variables[PARENT_TELLS_VARIABLE] = "1"
            variables[STATUS_FILE_VARIABLE] = str(status_file(self._folder, rank))
            variables[ERROR_FILE_VARIABLE] = str(self._folder / f"error-{rank}.json")
        nowhere = dict.fromkeys(envs, "")
        # Other error files than those in the environment: torch raises from within at one that it can't parse.
        unread = dict.fromkeys(envs, os.devnull)
        return LogsDest(stdouts=nowhere, stderrs=dict(nowhere), error_files=unread)

    def end_of(self, rank: int, exit_code: int, seconds: float) -> WorkerEnd:
        """How worker `rank` ended, with what it left."""
        failure = read_failure(self._folder / f"error-{rank}.json", rank)
        tail = self._tail(rank) if exit_code != 0 else ""
        status = read_status(status_file(self._folder, rank))
        doing = "" if status is None else status.doing
        return WorkerEnd(rank=rank, exit_code=exit_code, seconds=seconds, failure=failure, log_tail=tail, doing=doing)

    def _tail(self, rank: int) -> str:
        if self._log_dir is None or rank == 0:
            return ""
        path = self._log_dir / f"worker-{rank}.log"
        with suppress(OSError):
            data = path.read_bytes()[self._earlier_bytes.get(path, 0) :]
            return "\n".join(data.decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""


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
