"""The folder that a launcher and its workers share: environment, errors, logs.

A folder for what a launcher and its workers tell each other, which nobody finds later, however both end.

What workers get from the launcher, their environment, and what it reads of them: errors, and the ends of logs.
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
from manyhands.launching.failures import explain_failure
from manyhands.launching.supervision import status_file
from manyhands.members.reports import (
    ERROR_FILE_VARIABLE,
    PARENT_TELLS_VARIABLE,
    STATUS_FILE_VARIABLE,
    WorkerEnd,
    read_failure,
    read_status,
)

_YOUNG_SECONDS = 60.0  # so long ago one was made that is locked by now


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Gone at the end of the block, also if this process was killed: a shell waits for the end of a pipe that only this
    process holds. If that was killed, too (a job's processes may all be), the next one on this host clears it away."""
    prefix = f"manyhands-run-{socket.gethostname()}-"
    _clear(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # where the file system knows no locks, nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            command = ["/bin/sh", "-c", 'cat; rm -rf "$1"', "sh", name]
            nowhere = subprocess.DEVNULL
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, cwd="/", start_new_session=True
            ):
                yield Path(name)
        finally:
            os.close(lock)


def _clear(prefix: str) -> None:
    """Remove folders that no living process has."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if "-" in path.name.removeprefix(prefix):
            continue  # of a host whose name begins like this one's
        with suppress(OSError):  # another user's
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > _YOUNG_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


_LOG_TAIL_LINES = 20


class Logs(LogsSpecs):
    """Gives the launcher the workers' environment and error files, and reads what they left."""

    def __init__(
        self,
        folder: Path,
        log_dir: Path | None,
        environment: Mapping[str, str],
        tell: Callable[[WorkerError | Interrupted | None], None] | None,
    ) -> None:
        super().__init__()
        self._folder, self._log_dir, self._environment, self._tell = folder, log_dir, environment, tell
        self._ranks: list[int] = []  # of the workers on this host
        # A log may go on from an earlier run, whose last lines are not this one's.
        self._earlier_bytes = {path: path.stat().st_size for path in log_dir.glob("worker-*.log")} if log_dir else {}

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        if self._ranks:
            self._begin_again()
        self._ranks = [int(variables["RANK"]) for variables in envs.values()]
        for variables in envs.values():
            rank = int(variables["RANK"])
            for name, value in self._environment.items():
                variables.setdefault(name, value)
            variables.setdefault("OMP_NUM_THREADS", "1")
            variables.setdefault(SNAPSHOT_MEMORY_VARIABLE, "")  # not that of a launcher whose worker starts these
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

    def _begin_again(self) -> None:
        """Tell why, as far as the workers here have said, and forget those."""
        ends = self.ends({})
        said = [replace(end, exit_code=1) if end.failure is not None else end for end in ends]
        if self._tell is not None:
            self._tell(explain_failure(said) if any(end.exit_code for end in said) else None)
        for path in [path for kind in ("error", "started", "status") for path in self._folder.glob(f"{kind}-*")]:
            path.unlink()

    def ends(self, exit_codes: Mapping[int, tuple[int, float]]) -> list[WorkerEnd]:
        """How the workers here ended: exit code and time of those that failed, and what they left."""
        return [self.end_of(rank, *exit_codes.get(rank, (0, time.time()))) for rank in self._ranks]

    def end_of(self, rank: int, exit_code: int, seconds: float) -> WorkerEnd:
        """How worker `rank` ended, with what it left."""
        failure = read_failure(self._folder / f"error-{rank}.json", rank)
        tail = self._tail(rank) if exit_code != 0 else ""
        status = read_status(status_file(self._folder, rank))
        position = NO_POSITION if status is None else status.position
        return WorkerEnd(
            rank=rank, exit_code=exit_code, seconds=seconds, failure=failure, log_tail=tail, position=position
        )

    def _tail(self, rank: int) -> str:
        if self._log_dir is None or rank == 0:
            return ""
        path = self._log_dir / f"worker-{rank}.log"
        with suppress(OSError):
            data = path.read_bytes()[self._earlier_bytes.get(path, 0) :]
            return "\n".join(data.decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""
