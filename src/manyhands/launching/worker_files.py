"""The folder that a launcher and its workers share: environment, errors, logs.

The folder is temporary: it is deleted however launcher and workers exit. `Logs` gives the workers their environment,
and reads the files that they leave: error reports, positions and logs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from manyhands.checkpoint.snapshot import SNAPSHOT_MEMORY_VARIABLE
from manyhands.errors import NO_POSITION, Interrupted, WorkerError
from manyhands.launching.root_cause import explain_failure
from manyhands.launching.supervision import report_unfinished, status_file, unfinished_file, unfinished_ranks
from manyhands.members.reports import (
    ERROR_FILE_VARIABLE,
    PARENT_REPORTS_VARIABLE,
    STATUS_FILE_VARIABLE,
    UNFINISHED_FILE_VARIABLE,
    WorkerEnd,
    read_failure,
    read_status,
)

_YOUNG_SECONDS = 60.0  # the owner of a younger folder may not have locked it yet


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a temporary folder and delete it on exit, even if this process is killed with SIGKILL.

    If this process is killed, a shell deletes the folder. The shell waits for the end of a pipe that only this process
    holds open. If the shell is also killed (a scheduler may kill all processes of a job), the next launcher on this
    host deletes the folder.
    """
    prefix = f"manyhands-run-{socket.gethostname()}-"
    _delete_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # on a file system without locks, other launchers can't lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            command = ["/bin/sh", "-c", 'cat; rm -rf "$1"', "sh", name]
            null = subprocess.DEVNULL
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/", start_new_session=True
            ):
                yield Path(name)
        finally:
            os.close(lock)


def _delete_abandoned(prefix: str) -> None:
    """Delete folders that no running process has locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if "-" in path.name.removeprefix(prefix):
            continue  # it belongs to another host, whose name starts with this host's name
        with suppress(OSError):  # it belongs to another user, or is in use
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > _YOUNG_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


_LOG_TAIL_LINES = 20


class Logs(LogsSpecs):
    """Gives torch's launcher the workers' environment and files, and reads the files that the workers leave.

    folder: the folder shared with the workers. log_dir: the folder of log files, or None. environment: variables for
    the workers. on_restart: called before workers are restarted, with the root cause, or with None if no worker on this
    host failed. cooperates: every worker deletes its unfinished file before it exits. Otherwise only workers in a group
    have such a file.
    """

    def __init__(
        self,
        folder: Path,
        log_dir: Path | None,
        environment: Mapping[str, str],
        on_restart: Callable[[WorkerError | Interrupted | None], None] | None,
        *,
        cooperates: bool,
    ) -> None:
        super().__init__()
        self._cooperates = cooperates
        self._folder, self._log_dir, self._environment = folder, log_dir, environment
        self._on_restart = on_restart
        self._ranks: list[int] = []  # the ranks of the workers on this host
        # Workers append to the logs. Lines of earlier runs must not be reported as the last lines of this run.
        self._earlier_bytes = {path: path.stat().st_size for path in log_dir.glob("worker-*.log")} if log_dir else {}

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        if self._ranks:  # not the first start
            self._report_restart()
        self._ranks = [int(variables["RANK"]) for variables in envs.values()]
        for variables in envs.values():
            rank = int(variables["RANK"])
            for name, value in self._environment.items():
                variables.setdefault(name, value)
            variables.setdefault("OMP_NUM_THREADS", "1")
            # If this launcher runs in a worker of another launcher, don't let this launcher's workers inherit the
            # snapshots of the outer run.
            variables.setdefault(SNAPSHOT_MEMORY_VARIABLE, "")
            if self._log_dir is not None and "PYTHONUNBUFFERED" not in os.environ:
                # With buffering, the output of a killed worker would be lost. Without log files, buffering stays on,
                # because the workers share a terminal, where their lines would mix.
                variables.setdefault("PYTHONUNBUFFERED", "1")
            variables[PARENT_REPORTS_VARIABLE] = "1"
            variables[STATUS_FILE_VARIABLE] = str(status_file(self._folder, rank))
            variables[UNFINISHED_FILE_VARIABLE] = str(unfinished_file(self._folder, rank))
            if self._cooperates:
                with suppress(OSError):  # the disk is full; an early end with exit code 0 will not be noticed
                    unfinished_file(self._folder, rank).touch()
            variables[ERROR_FILE_VARIABLE] = str(self._folder / f"error-{rank}.json")
        no_redirect = dict.fromkeys(envs, "")
        # Hide the error files from torch, which raises an internal error if it cannot parse one.
        unread = dict.fromkeys(envs, os.devnull)
        return LogsDest(stdouts=no_redirect, stderrs=dict(no_redirect), error_files=unread)

    def _report_restart(self) -> None:
        """Report why workers are restarted, if a worker of this host gave a reason, and delete the workers' files."""
        ends = self.ends({})
        reported = [replace(end, exit_code=1) if end.failure is not None else end for end in ends]
        if self._on_restart is not None:
            self._on_restart(explain_failure(reported) if any(end.exit_code for end in reported) else None)
        for kind in ("error", "started", "status", "unfinished"):
            for path in list(self._folder.glob(f"{kind}-*")):
                path.unlink()

    def unfinished(self) -> set[int]:
        """Return the ranks of workers of this host that ended in the middle of their work; write their reports."""
        ranks = unfinished_ranks(self._folder)
        report_unfinished(self._folder, ranks)
        return ranks

    def ends(self, exit_codes: Mapping[int, tuple[int, float]]) -> list[WorkerEnd]:
        """Return how the workers of this host ended. exit_codes: (exit code, time) of the failed workers, by rank."""
        return [self.end_of(rank, *exit_codes.get(rank, (0, time.time()))) for rank in self._ranks]

    def end_of(self, rank: int, exit_code: int, seconds: float) -> WorkerEnd:
        """Return how worker `rank` ended, with its error report, position and last lines."""
        failure = read_failure(self._folder / f"error-{rank}.json", rank)
        tail = self._tail(rank) if exit_code != 0 else ""
        status = read_status(status_file(self._folder, rank))
        position = NO_POSITION if status is None else status.position
        return WorkerEnd(
            rank=rank, exit_code=exit_code, seconds=seconds, failure=failure, log_tail=tail, position=position
        )

    def _tail(self, rank: int) -> str:
        """Return the last lines that a worker has written to its log in this run."""
        if self._log_dir is None or rank == 0:
            return ""
        path = self._log_dir / f"worker-{rank}.log"
        with suppress(OSError):
            data = path.read_bytes()[self._earlier_bytes.get(path, 0) :]
            return "\n".join(data.decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""
