"""Watches the workers of one host: passes stop signals on to them, and kills workers that hang. Restarts nothing.

After a failure on one host, `run_with_restarts` (restarts.py) restarts the workers. On several hosts, torch's elastic
agents restart them through the rendezvous (rendezvous.py).

`StopRequest` records stop signals to the launcher, passes them on to the workers, and kills processes that the workers
leave running. `WorkerMonitor` works without reports from peers: it detects stopped processes, even before the workers
have joined their group, and a worker without peers that hangs in a step. It kills these workers and writes the reason
to their error files.
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
from manyhands.launching.root_cause import explain_failure
from manyhands.members.processes import STOPPED_SECONDS, ask_for_stack, has_exited_with_0, process_start, process_state
from manyhands.members.reports import Failure, WorkerEnd, read_status, write_failure
from manyhands.surroundings import to_handle

_REPEATED_SECONDS = 0.3
"""A second SIGINT within this time belongs to the same Ctrl-C, because wrappers (uv, npm) repeat the terminal's
signal.
"""

_START_SECONDS = 10.0
"""A stop signal is passed on after this time at the latest, even if some workers have not started."""

_CLOCKS_DIFFER_SECONDS = 3.0  # half of the time without a heartbeat after which a host seems lost


class StopRequest:
    """A request to stop the launcher. Records the signal, and stops the workers.

    signal: the first stop signal, or None if there was none. stopped_by_first_host: True if the first host of several
    was requested to stop the run. regroups: True while the launcher stops its workers to restart them with other hosts.
    clock_difference: the seconds by which the clocks of the hosts were seen to differ in the last minute.
    grace_seconds: the time that workers have to exit. folder: the folder shared with the workers. workers: the number
    of workers that will start.
    """

    def __init__(self, folder: Path, workers: int, grace_seconds: float) -> None:
        self.signal: signal.Signals | None = None
        self.stopped_by_first_host = self.regroups = False
        self.clock_difference = 0.0
        self.grace_seconds = grace_seconds
        self._folder, self._workers = folder, workers
        self._requested = self._passed_on = 0.0  # the monotonic times of these events
        self._killed = False
        self._started = time.monotonic()

    @property
    def clocks_differ(self) -> bool:
        """Return True if the clocks of the hosts differ by so much that this may be why a host seems lost."""
        return self.clock_difference > _CLOCKS_DIFFER_SECONDS

    @property
    def how_clocks_differ(self) -> str:
        """Return a sentence that tells people how much the clocks differ."""
        return (
            f"the clocks of the hosts differ by {self.clock_difference:.0f} s or more, and a host whose clock differs "
            "by more than 6 s seems lost"
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle stop signals inside the block. A signal that is ignored (by nohup, for example) stays ignored."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in to_handle():
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    previous[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._requested = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._requested > _REPEATED_SECONDS:
            self._killed = True
            _kill_sessions(self._folder)

    def raise_if_requested(self, *, all_started: bool = False) -> None:
        """Raise SignalException if there is a request to stop.

        torch's launcher then passes the signal on to the workers and waits for them to exit. all_started: True if no
        worker is about to start. Otherwise the request waits until all workers have started, or for _START_SECONDS.
        """
        if self.signal is None:
            return
        started = (
            len(started_workers(self._folder)) == self._workers or time.monotonic() - self._started > _START_SECONDS
        )
        if all_started or started:  # if the signal were passed on earlier, a second Ctrl-C would not reach all workers
            self._passed_on = time.monotonic()
            sent = signal.SIGINT if self.signal is signal.SIGINT else signal.SIGTERM
            raise SignalException(f"asked to stop by {self.signal.name}", sent)

    def kill_later(self, seconds: float) -> None:
        """Kill those of the current workers that are still alive after `seconds`.

        They may hang in a call that never returns and does not react to signals. Workers that start later are not
        killed.
        """
        present = started_workers(self._folder)

        def kill() -> None:
            _kill_sessions(self._folder, set(present.values()))

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    def kill_rest(self) -> None:
        """Kill the processes that exited workers have left running in their sessions."""
        _kill_sessions(self._folder)

    def interrupted(self, ends: Sequence[WorkerEnd]) -> Interrupted:
        """Return the error that describes how the run was stopped. ends: how the workers ended."""
        name = self.signal.name if self.signal is not None else "a signal"
        late = self._passed_on > 0 and time.monotonic() - self._passed_on >= self.grace_seconds
        if self._killed:
            how = "its workers were killed at the second Ctrl-C"
        elif late:
            how = f"workers that had not exited after {self.grace_seconds:g} s were killed"
        else:
            how = "its workers exited"
        failures = [end.failure for end in ends if end.failure is not None]
        # All workers report the same Interrupted, which names the last step.
        interrupted = next((failure for failure in failures if failure.kind == "Interrupted"), None)
        if interrupted is not None and interrupted.what is not None:
            return Interrupted(f"{interrupted.what} ({name})", where=interrupted.where, hint=interrupted.hint)
        if any(end.exit_code for end in ends):  # a worker had failed before the signal could be passed on
            cause = explain_failure(ends)
            detail = "" if isinstance(cause, Interrupted) else str(cause)
        else:
            own = [failure for failure in failures if not failure.notice]
            detail = "\n".join(f"worker {failure.rank} reported {failure.kind}: {failure.message}" for failure in own)
        return Interrupted(f"the run was stopped by {name}; {how}", detail=detail or None)


def started_workers(folder: Path) -> dict[int, int]:
    """Return the pids of the workers that have started, by rank.

    Each worker leads a session and a process group, both numbered by its pid. A worker that has exited is included as
    long as no other process has its pid, because processes of its session may be left. The names of the files come from
    launching/child.py.
    """
    workers = {}
    for path in folder.glob("started-*"):
        _, rank, pid, start = path.name.split("-")
        if process_start(int(pid)) in ("", start):
            workers[int(rank)] = int(pid)
    return workers


def _kill_sessions(folder: Path, pids: Set[int] | None = None) -> None:
    """Kill the sessions of all started workers, or only of those in `pids`."""
    for pid in started_workers(folder).values():
        with suppress(ProcessLookupError, PermissionError):
            if pids is None or pid in pids:
                os.killpg(pid, signal.SIGKILL)


def kill_all(folder: Path) -> None:
    """Kill all workers and all processes in their sessions, and reap the workers.

    This is needed when the launcher itself has failed, and for processes that outlive their workers.
    """
    _kill_sessions(folder)
    deadline = time.monotonic() + 5.0
    for pid in started_workers(folder).values():
        # Usually the launcher has already reaped all workers, and there is no child with this pid.
        with suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.02)


_STEP = "step "  # prefix of the activity of a worker in a step; between two steps there is no time limit

_ASLEEP_SECONDS = 1.0  # after a longer gap between two checks, this process is assumed to have been stopped


class WorkerMonitor:
    """A monitor in the launcher that detects stopped processes and single workers that hang.

    folder: the folder shared with the workers. Call `check` repeatedly.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stopped: dict[int, float] = {}  # pid -> the monotonic time when it was first found stopped
        # Rank -> (version of its status file, time when first read).
        self._progress: dict[int, tuple[bytes, float]] = {}
        self._killed: set[int] = set()
        self._asked_to_stop: set[int] = set()  # pids of workers that got SIGTERM because a peer had left
        self._ended: set[int] = set()  # ranks of workers that had ended at the last check, but had not finished
        self._last_check = time.monotonic()

    def check(self) -> None:
        """Kill workers that are stopped or hang."""
        now = time.monotonic()
        # Ctrl-Z stops the launcher together with the workers. After that, restart the timing.
        if now - self._last_check > _ASLEEP_SECONDS:
            self._stopped.clear()
            self._progress.clear()
        self._last_check = now
        for rank, pid in started_workers(self._folder).items():
            if process_state(pid) != "T":
                self._stopped.pop(pid, None)
            elif now - self._stopped.setdefault(pid, now) > STOPPED_SECONDS:
                self._kill(rank, pid, f"worker {rank}'s process has been stopped for {STOPPED_SECONDS:g} s (SIGSTOP?)")
            self._check_progress(rank, pid, now)
        self._check_unfinished()

    def _check_unfinished(self) -> None:
        """Stop all workers if one has ended with exit code 0 before it had finished. Otherwise, peers that have not
        connected to it yet would wait for it.

        torch's launcher reaps workers between two calls, and reports other exit codes. So a worker that was already
        reaped at the last call, and that torch's launcher did not report, has exit code 0.
        """
        workers = started_workers(self._folder)
        ended = {rank for rank in unfinished_ranks(self._folder) & workers.keys() if has_exited_with_0(workers[rank])}
        if certain := ended & self._ended:
            report_unfinished(self._folder, certain)
            for rank, pid in workers.items():
                if rank not in ended and pid not in self._asked_to_stop:
                    self._asked_to_stop.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
        self._ended = ended

    def _check_progress(self, rank: int, pid: int, now: float) -> None:
        """Kill the worker if it is in a step and has not written its status file for `stall_seconds`."""
        path = status_file(self._folder, rank)
        status = read_status(path)
        if status is None or not status.position.activity.startswith(_STEP):
            self._progress.pop(rank, None)
            return
        # Compare the time of the last write, because the same text may be written again.
        version = path.stat().st_mtime_ns.to_bytes(8, "little")
        if self._progress.get(rank, (b"", 0.0))[0] != version:
            self._progress[rank] = version, now
        elif now - self._progress[rank][1] > status.stall_seconds:
            what = f"worker {rank} has made no progress for more than {status.stall_seconds:g} s"
            what += " (its process is stopped: SIGSTOP?)" if pid in self._stopped else ""
            self._kill(rank, pid, what, status.stack)

    def _kill(self, rank: int, pid: int, what: str, stack: str | None = None) -> None:
        """Write `what` to the worker's error file and kill the worker.

        stack: the worker's `stack_address`, or None to leave out its stack.
        """
        # A killed process may still exist at the next check, and a second report would lack its stack.
        if pid in self._killed:
            return
        self._killed.add(pid)
        status = read_status(status_file(self._folder, rank))
        position = NO_POSITION if status is None else status.position
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                frames = None if stack is None else ask_for_stack(stack, pidfd)
                error = WorkerError(
                    what,
                    rank=rank,
                    where=", ".join(filter(None, [f"worker {rank} (pid {pid})", position.activity])),
                    position=position,
                    detail=None if frames is None else f"its stack (most recent call first):\n{frames}",
                    hint=None
                    if stack is None
                    else "find out where it hangs; if it is only slow, increase strategy.stall_seconds",
                )
                write_failure(self._folder / f"error-{rank}.json", Failure.from_error(error, rank=rank, pid=pid))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def unfinished_file(folder: Path, rank: int) -> Path:
    """Return the path of the file that exists while a worker is in the middle of its work."""
    return folder / f"unfinished-{rank}"


def unfinished_ranks(folder: Path) -> set[int]:
    """Return the ranks of the workers that are, or were when they ended, in the middle of their work."""
    return {int(path.name.rpartition("-")[2]) for path in folder.glob("unfinished-*")}


def report_unfinished(folder: Path, ranks: Set[int]) -> None:
    """Write a failure report for workers that ended with exit code 0 in the middle of their work.

    A report that the worker or the monitor has already written is kept.
    """
    for rank in ranks:
        path, status = folder / f"error-{rank}.json", read_status(status_file(folder, rank))
        if path.exists():
            continue
        position = NO_POSITION if status is None else status.position
        error = WorkerError(
            f"worker {rank} exited with code 0 before it had finished",
            rank=rank,
            # Only a worker without peers has a status file; otherwise its peers report where it was.
            where=f"worker {rank}, {position.activity}" if position.activity else None,
            position=position,
            hint="its work is not complete. Find the code in your script or in a library that calls os._exit(0)",
        )
        write_failure(path, Failure.from_error(error, rank=rank, pid=-1))


def status_file(folder: Path, rank: int) -> Path:
    """Return the path of a worker's status file. Only a worker without peers writes one."""
    return folder / f"status-{rank}"
