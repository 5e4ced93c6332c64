"""What one process can learn about another; calls with a time limit.

A call that may never return, such as one to a store whose process is stopped, or whose host is cut off.

What one process can learn of another on its host: whether it's stopped, and where its Python is.
"""

from __future__ import annotations

import concurrent.futures
import faulthandler
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_LOOK_SECONDS = 0.05

Answer = TypeVar("Answer")


def call_with_limit(call: Callable[[], Answer], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """What the call gives or raises. While it's awaited, `meanwhile` is called again and again, and may raise. Raises
    TimeoutError if the call takes longer; then, too, it is left to itself, in a thread of its own."""
    answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    try:
        threading.Thread(target=ask, name="manyhands-asks", daemon=True).start()
    except RuntimeError:  # no thread is to be had: there are too many, or this process is ending
        return call()
    for _ in range(round(seconds / _LOOK_SECONDS)):  # counted: this process may have been stopped itself
        if concurrent.futures.wait([answer], _LOOK_SECONDS).done:
            return answer.result()
        meanwhile()
    raise TimeoutError(f"no answer within {seconds:g} s")


STACK_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGTERM) + 10


def process_state(pid: int) -> str:
    """The kernel's letter for it (proc(5)): "T" is stopped; "" if there's no such process."""
    return _stat(pid)[0]


def process_start(pid: int) -> str:
    """When it began, in clock ticks since the host's start; "" if there's no such process."""
    return _stat(pid)[19]


def _stat(pid: int) -> list[str]:
    """The kernel's words about it, after its name."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
    return [""] * 20


def stack_address() -> str:
    """Where this process's Python stacks go when it's asked for them, also while it is inside a kernel: "pid:fd"."""
    return f"{os.getpid()}:{_stack_file()}"


@functools.cache
def _stack_file() -> int:
    fd = os.memfd_create("manyhands-stack", os.MFD_CLOEXEC)
    faulthandler.register(STACK_SIGNAL, file=fd, all_threads=True)
    return fd


def ask_for_stack(address: str, pidfd: int) -> str | None:
    """The Python stack of a process's main thread, if it answers within a second. address: its own `stack_address`."""
    with suppress(OSError):
        pid, fd = address.split(":")
        file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
        try:
            signal.pidfd_send_signal(pidfd, STACK_SIGNAL)
            before = b""
            for _ in range(20):
                time.sleep(0.05)
                dump = os.pread(file, 1 << 18, 0)
                if dump and dump == before:  # it's whole
                    return _current_thread(dump.decode(errors="replace"))
                before = dump
        finally:
            os.close(file)
    return None


def _current_thread(dump: str) -> str:
    """Of faulthandler's dumps, one after another, the last part about the thread that took the signal: the main one."""
    part = dump.rpartition("Current thread ")[2]
    return part.partition("\n\n")[0].partition("\n")[2].partition("\nThread ")[0]
