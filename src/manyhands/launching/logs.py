"""What workers get from the launcher, their environment, and what it reads of them: errors, and the ends of logs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from manyhands.checkpoint.snapshot import SNAPSHOT_MEMORY_VARIABLE
from manyhands.errors import NOWHERE, Interrupted, WorkerError
from manyhands.launching.culprit import explain
from manyhands.launching.watch import status_file
from manyhands.members.failure import ERROR_FILE_VARIABLE, PARENT_TELLS_VARIABLE, WorkerEnd, read_failure
from manyhands.members.status_file import STATUS_FILE_VARIABLE, read_status

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
            self._tell(explain(said) if any(end.exit_code for end in said) else None)
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
        place = NOWHERE if status is None else status.place
        return WorkerEnd(rank=rank, exit_code=exit_code, seconds=seconds, failure=failure, log_tail=tail, place=place)

    def _tail(self, rank: int) -> str:
        if self._log_dir is None or rank == 0:
            return ""
        path = self._log_dir / f"worker-{rank}.log"
        with suppress(OSError):
            data = path.read_bytes()[self._earlier_bytes.get(path, 0) :]
            return "\n".join(data.decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""
