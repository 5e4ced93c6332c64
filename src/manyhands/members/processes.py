"""Makes calls with a time limit, and reads the state of other processes.

`call_with_limit` is for calls that may never return, such as a request to a store whose process is stopped or whose
host is cut off. The other functions find out whether a process of this host is stopped, when it started, and which
Python code it is executing.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

_POLL_SECONDS = 0.05

Answer = TypeVar("Answer")


def call_with_limit(call: Callable[[], Answer], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """Run `call` in a thread and return its result, or raise its exception.

    meanwhile: called repeatedly while the call runs. It may raise. Raises TimeoutError if the call takes longer than
    `seconds`. After a timeout or an exception in `meanwhile` the thread continues, and its result is ignored.
    """
    answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    try:
        threading.Thread(target=run, name="manyhands-call", daemon=True).start()
    except RuntimeError:  # no thread can be started, because there are too many or the interpreter is shutting down
        return call()
    # Count the polls instead of comparing clocks. If this process is stopped (Ctrl-Z) for longer than the limit, the
    # call must still have its time after that.
    for _ in range(round(seconds / _POLL_SECONDS)):
        if concurrent.futures.wait([answer], _POLL_SECONDS).done:
            return answer.result()
        meanwhile()
    raise TimeoutError(f"no answer within {seconds:g} s")


def oom_kills() -> int | None:
    """Return how many processes the kernel of this host has killed since boot because memory ran out.

    Return None if the kernel doesn't count them.
    """
    with suppress(OSError, ValueError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


STACK_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGTERM) + 10
"""The signal on which a worker dumps its Python stacks. It is a real-time signal that neither Python nor torch uses."""


def process_state(pid: int) -> str:
    """Return the kernel's state letter of a process (proc(5)), such as "T" for stopped, or "" if there is no such
    process.
    """
    return _stat(pid)[0]


def has_ended(pid: int) -> bool:
    """Return True if the process has ended, whether or not its parent has noticed."""
    return process_state(pid) in ("", "Z")


def has_exited_with_0(pid: int) -> bool:
    """Return True if the child process has exited with code 0, or if this process has reaped it, whatever its exit
    code.

    While the threads of a killed process end one after the other, it may look like a zombie, but has no exit code yet.
    """
    if not hasattr(os, "waitid"):  # macOS
        return has_ended(pid)
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return has_ended(pid)
    return found is not None and found.si_code == os.CLD_EXITED and found.si_status == 0


STOPPED_SECONDS = 5.0
"""The time after which a stopped process (SIGSTOP) of a run is killed."""

_ASLEEP_SECONDS = 2.5  # after a longer gap between two checks, this process is assumed to have been stopped, too


class StoppedProcesses:
    """Finds processes that have been stopped for so long that nobody is likely to continue them.

    Call `find` every second.
    """

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # pid -> the monotonic time when it was first found stopped
        self._last_check = time.monotonic()

    def find(self, pids: Iterable[int]) -> list[int]:
        """Return those of the processes that have been stopped for STOPPED_SECONDS."""
        now = time.monotonic()
        if now - self._last_check > _ASLEEP_SECONDS:  # Ctrl-Z has stopped this process together with the others
            self._since.clear()
        self._last_check = now
        self._since = {pid: self._since.get(pid, now) for pid in pids if process_state(pid) == "T"}
        return [pid for pid, since in self._since.items() if now - since > STOPPED_SECONDS]


def kill_with_parent(parent: int) -> bool:
    """Make the kernel kill this process when the thread that started it ends, even while it holds Python's lock.

    parent: the pid of the parent. If it has already ended, this process exits at once. Return False on systems other
    than Linux, where this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    return True


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def process_start(pid: int) -> str:
    """Return the time when a process started, in clock ticks since boot, or "" if there is no such process."""
    return _stat(pid)[19]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the process's name, which may itself contain spaces."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
    return [""] * 20


def stack_address() -> str:
    """Return the address, "pid:fd", of the memfd to which this process dumps its Python stacks on STACK_SIGNAL.

    The dump is written by faulthandler's signal handler, so it also works while the process is inside a kernel.
    """
    return f"{os.getpid()}:{_stack_file()}"


@functools.cache
def _stack_file() -> int:
    fd = os.memfd_create("manyhands-stack", os.MFD_CLOEXEC)
    faulthandler.register(STACK_SIGNAL, file=fd, all_threads=True)
    return fd


_STACK_SECONDS = 5.0
"""The time to wait for a stack. It usually takes milliseconds, but takes seconds on an overloaded machine."""


def ask_for_stack(address: str, pidfd: int) -> str | None:
    """Request the Python stack of a process's main thread. Return None if it is stopped or does not answer in time.

    address: the `stack_address` of that process.
    """
    with suppress(OSError):
        pid, fd = address.split(":")
        file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
        try:
            signal.pidfd_send_signal(pidfd, STACK_SIGNAL)
            before = b""
            deadline = time.monotonic() + _STACK_SECONDS
            while time.monotonic() < deadline and process_state(int(pid)) not in ("T", "t", ""):
                time.sleep(0.05)
                dump = os.pread(file, 1 << 18, 0)
                if dump and dump == before:  # the dump is complete, because it has not changed since the last poll
                    return _current_thread(dump.decode(errors="replace"))
                before = dump
        finally:
            os.close(file)
    return None


def _current_thread(dump: str) -> str:
    """Return the main thread's part of the last of several concatenated faulthandler dumps.

    faulthandler writes "Current thread" above the thread that received the signal, which is the main thread.
    """
    part = dump.rpartition("Current thread ")[2]
    return part.partition("\n\n")[0].partition("\n")[2].partition("\nThread ")[0]
