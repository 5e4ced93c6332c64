"""The parent's own look at its workers: what peers can't notice, because there are none, or they haven't met.

A worker whose process is stopped, or that has no peers and hangs in a step, is killed, and what is left of it says why.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from manyhands.errors import NOWHERE, WorkerError
from manyhands.launching.stop import started_workers
from manyhands.members.failure import Failure, write_failure
from manyhands.members.processes import ask_for_stack, process_state
from manyhands.members.status_file import read_status

STOPPED_SECONDS = 5.0
_STEP = "step "  # how the words of a worker in a step begin; between two steps it may take as long as it likes
_ASLEEP_SECONDS = 1.0  # between two looks: then this process was stopped, too


class Watch:
    """Of the workers that `folder` (the launcher's) knows of; `look` is to be called again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stopped: dict[int, float] = {}  # pid: since when (monotonic)
        self._said: dict[int, tuple[bytes, float]] = {}  # rank: its status, and since when
        self._last_look = time.monotonic()

    def look(self) -> None:
        """End who is stopped or hangs."""
        now = time.monotonic()
        if now - self._last_look > _ASLEEP_SECONDS:
            self._stopped.clear()
            self._said.clear()
        self._last_look = now
        for rank, pid in started_workers(self._folder).items():
            if process_state(pid) != "T":
                self._stopped.pop(pid, None)
            elif now - self._stopped.setdefault(pid, now) > STOPPED_SECONDS:
                self._end(rank, pid, f"worker {rank}'s process has been stopped for {STOPPED_SECONDS:g} s (SIGSTOP?)")
            self._look_for_progress(rank, pid, now)

    def _look_for_progress(self, rank: int, pid: int, now: float) -> None:
        path = status_file(self._folder, rank)
        status = read_status(path)
        if status is None or not status.place.words.startswith(_STEP):
            self._said.pop(rank, None)
            return
        said = path.stat().st_mtime_ns.to_bytes(8, "little")  # the same words may be said again
        if self._said.get(rank, (b"", 0.0))[0] != said:
            self._said[rank] = said, now
        elif now - self._said[rank][1] > status.stall_seconds:
            what = f"worker {rank} has been at one thing for more than {status.stall_seconds:g} s"
            what += " (its process is stopped: SIGSTOP?)" if pid in self._stopped else ""
            self._end(rank, pid, what, status.stack)

    def _end(self, rank: int, pid: int, what: str, stack: str | None = None) -> None:
        status = read_status(status_file(self._folder, rank))
        place = NOWHERE if status is None else status.place
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                shown = None if stack is None else ask_for_stack(stack, pidfd)
                error = WorkerError(
                    what,
                    rank=rank,
                    where=", ".join(filter(None, [f"worker {rank} (pid {pid})", place.words])),
                    place=place,
                    detail=None if shown is None else f"its stack (most recent call first):\n{shown}",
                    hint=None
                    if stack is None
                    else "see where it hangs; if it only takes long, raise strategy.stall_seconds",
                )
                write_failure(self._folder / f"error-{rank}.json", Failure.of(error, rank=rank, pid=pid))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def status_file(folder: Path, rank: int) -> Path:
    """Where that worker says what it does, if it has nobody else to tell."""
    return folder / f"status-{rank}"
