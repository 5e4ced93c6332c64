"""Kill a process at its n-th system call that changes files, in whichever thread that happens.

It uses ptrace as a debugger does: the process stops at the entry of each system call. Linux on x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

_X86_64 = {
    "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "sendfile": 40, "sendto": 44, "sendmsg": 46, "msync": 26,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "mknod": 133, "sync": 162, "openat": 257,
    "mkdirat": 258, "mknodat": 259, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
    "splice": 275, "sync_file_range": 277, "utimensat": 280, "fallocate": 285, "pwritev": 296, "syncfs": 306,
    "sendmmsg": 307, "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "openat2": 437,
}  # fmt: skip
_AARCH64 = {
    "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45,
    "ftruncate": 46, "fallocate": 47, "fchmod": 52, "fchmodat": 53, "openat": 56, "write": 64, "writev": 66,
    "pwrite64": 68, "pwritev": 70, "sendfile": 71, "splice": 76, "sync": 81, "fsync": 82, "fdatasync": 83,
    "sync_file_range": 84, "utimensat": 88, "sendto": 206, "sendmsg": 211, "msync": 227, "syncfs": 267, "sendmmsg": 269,
    "renameat2": 276, "copy_file_range": 285, "pwritev2": 287, "openat2": 437,
}  # fmt: skip
_NUMBERS = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine(), {})
_NAMES = {number: name for name, number in _NUMBERS.items()}
MAY_NOT_TRACE = "this system does not allow a process to trace its child"
IS_SUPPORTED = bool(_NUMBERS) and os.uname().sysname == "Linux"

_TRACEME, _CONT_TO_CALL, _OPTIONS, _CALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _CLONES, _EXITKILL = 0x1, 0x2 | 0x4 | 0x8, 0x100000
_ENTERS = 1
_WALL = 0x40000000
_CHANGES = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR


class _Call(ctypes.Structure):
    """The first fields of Linux's struct ptrace_syscall_info, at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if (
        _libc.ptrace(request, pid, address, data) < 0 and ctypes.get_errno() != 3
    ):  # ESRCH: the process has ended already
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass
class Traced:
    """Result of a traced process.

    calls: names of its system calls that change files. was_killed: False if it ended by itself. output: what `work`
    wrote to its descriptor.
    """

    calls: list[str] = field(default_factory=list)
    was_killed: bool = False
    output: bytes = b""


def traced(work: Callable[[int], None], kill_at: int | None = None) -> Traced:
    """Call `work` in a forked process, and kill the process at the entry of its call number `kill_at` (from 1)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work(writing)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    found = Traced()
    if not os.WIFSTOPPED(os.waitpid(pid, 0)[1]):
        raise PermissionError(MAY_NOT_TRACE)
    _ptrace(_OPTIONS, pid, 0, _SYSGOOD | _CLONES | _EXITKILL)
    _ptrace(_CONT_TO_CALL, pid)
    status = _follow(pid, found, kill_at)
    with os.fdopen(reading, "rb") as pipe:
        found.output = pipe.read()
    if not found.was_killed and status != 0:
        raise RuntimeError(f"the process ended with status {status}")
    return found


def _follow(pid: int, found: Traced, kill_at: int | None) -> int:
    """Trace the process until all its threads have ended; return its wait status."""
    result = -1
    while True:
        try:
            thread, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            return result
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return status
            continue
        delivered = 0
        stopped_by = os.WSTOPSIG(status)
        if stopped_by == signal.SIGTRAP | 0x80:
            name = _changing_call(thread)
            if name is not None and not found.was_killed:
                found.calls.append(name)
                if len(found.calls) == kill_at:
                    found.was_killed = True
                    os.kill(pid, signal.SIGKILL)
                    continue
        elif stopped_by not in (signal.SIGTRAP, signal.SIGSTOP):
            delivered = stopped_by
        _ptrace(_CONT_TO_CALL, thread, 0, delivered)


def _changing_call(thread: int) -> str | None:
    """Return the name of the system call that the thread enters, if that changes files."""
    call = _Call()
    if _libc.ptrace(_CALL_INFO, thread, ctypes.sizeof(call), ctypes.addressof(call)) <= 0 or call.op != _ENTERS:
        return None
    name = _NAMES.get(call.number)
    opens = {"open": 1, "openat": 2}
    return None if name in opens and not call.arguments[opens[name]] & _CHANGES else name
