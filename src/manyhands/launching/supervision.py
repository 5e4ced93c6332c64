"""Stop signals, hung or stopped workers, and the end of leftover processes.

How a run on this machine is stopped: signals to the parent, noted and passed on; and the end of what is left.

The parent's own look at its workers: what peers can't notice, because there are none, or they haven't met.
A worker whose process is stopped, or that has no peers and hangs in a step, is killed, and what is left of it says why.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

from manyhands.errors import NO_POSITION, Interrupted, WorkerError
from manyhands.launching.failures import explain_failure
from manyhands.members.processes import ask_for_stack, process_start, process_state
from manyhands.members.reports import Failure, WorkerEnd, read_status, write_failure

_SAME_PRESS_SECONDS = 0.3

_START_SECONDS = 10.0


class Stop:
    """Whether this process was asked to stop, and by what signal."""

    def __init__(self, folder: Path, workers: int, grace_seconds: float) -> None:
        self.signal: signal.Signals | None = None
        self.grace_seconds = grace_seconds
        self._folder, self._workers = folder, workers
        self._asked = self._passed_on = 0.0  # monotonic seconds
        self._killed = False
        self._began = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, a signal to stop is noted here. One that is ignored (nohup, say) stays ignored."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    previous[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked > _SAME_PRESS_SECONDS:
            # Wrappers (uv, npm) pass on a Ctrl-C that the terminal has delivered already: that's not a second one.
            self._killed = True
            _kill_sessions(self._folder)

    def raise_if_asked(self, *, all_started: bool = False) -> None:
        """Raises SignalException, on which the launcher passes the signal on and awaits the workers' end.

        all_started: all workers that there are, if any, have begun."""
        if self.signal is None:
            return
        started = len(started_workers(self._folder)) == self._workers or time.monotonic() - self._began > _START_SECONDS
        if all_started or started:  # before that, a second Ctrl-C wouldn't find them all
            self._passed_on = time.monotonic()
            sent = signal.SIGINT if self.signal is signal.SIGINT else signal.SIGTERM
            raise SignalException(f"asked to stop by {self.signal.name}", sent)

    def kill_later(self, seconds: float) -> None:
        """Kill those of the present workers that live by then: they wait, deaf to signals, for what doesn't come."""
        meant = started_workers(self._folder)

        def kill() -> None:
            _kill_sessions(self._folder, set(meant.values()))

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    def kill_rest(self) -> None:
        """Kill what workers that have ended have left running in their sessions."""
        _kill_sessions(self._folder)

    def interrupted(self, ends: Sequence[WorkerEnd]) -> Interrupted:
        """The error that tells how the stop went."""
        name = self.signal.name if self.signal is not None else "a signal"
        late = self._passed_on > 0 and time.monotonic() - self._passed_on >= self.grace_seconds
        if self._killed:
            how = "and its workers were killed at the second Ctrl-C"
        elif late:
            how = f"and workers that had not ended after {self.grace_seconds:g} s were killed"
        else:
            how = "and its workers ended"
        failures = [end.failure for end in ends if end.failure is not None]
        word = next((failure for failure in failures if failure.kind == "Interrupted"), None)  # all give the same
        if word is not None and word.what is not None:
            return Interrupted(f"{word.what} ({name})", where=word.where, hint=word.hint)
        told = None
        if any(end.exit_code for end in ends):  # one had failed before the signal could be passed on
            told = str(explain_failure(ends))
        else:
            own = [failure for failure in failures if not failure.notice]
            told = "\n".join(f"worker {failure.rank} reported {failure.kind}: {failure.message}" for failure in own)
        return Interrupted(f"the run was asked to stop ({name}), {how}", detail=told or None)


def started_workers(folder: Path) -> dict[int, int]:
    """The pids, by rank, of the workers that have begun; each leads a session (and so a process group) of that number.
    One that has ended is among them as long as no other process has its number.

    The files' names are made by launching/child.py.
    """
    workers = {}
    for path in folder.glob("started-*"):
        _, rank, pid, start = path.name.split("-")
        if process_start(int(pid)) in ("", start):
            workers[int(rank)] = int(pid)
    return workers


def _kill_sessions(folder: Path, meant: Set[int] | None = None) -> None:
    """Of all workers, or of those that are meant."""
    for pid in started_workers(folder).values():
        with suppress(ProcessLookupError, PermissionError):
            if meant is None or pid in meant:
                os.killpg(pid, signal.SIGKILL)


def kill_all(folder: Path) -> None:
    """Nothing that the workers have started outlives them; and no worker is left where the launcher itself failed."""
    _kill_sessions(folder)
    deadline = time.monotonic() + 5.0
    for pid in started_workers(folder).values():
        # Usually the launcher has reaped them all: no such child.
        with suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.02)


STOPPED_SECONDS = 5.0

_STEP = "step "  # how the words of a worker in a step begin; between two steps it may take as long as it likes

_ASLEEP_SECONDS = 1.0  # between two looks: then this process was stopped, too


class WorkerMonitor:
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
        if status is None or not status.position.words.startswith(_STEP):
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
        position = NO_POSITION if status is None else status.position
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                shown = None if stack is None else ask_for_stack(stack, pidfd)
                error = WorkerError(
                    what,
                    rank=rank,
                    where=", ".join(filter(None, [f"worker {rank} (pid {pid})", position.words])),
                    position=position,
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
