"""Starts contenders, and ends them with all their processes, however the benchmark ends.

torch's launcher starts each worker in a session of its own, so killing the launcher's process group would leave the
workers running. On SIGTERM, the launcher ends them itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECONDS_TO_END = 40.0
"""The time that a contender has to end its workers. torch's launcher kills them after 30 s."""

_PR_SET_PDEATHSIG = 1


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that contenders are ended."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a contender. The kernel sends it SIGTERM when this process is killed (Linux)."""
    return subprocess.Popen(command, text=True, preexec_fn=_end_with_parent, **options)


def _end_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end(process: subprocess.Popen[str]) -> None:
    """End a contender and all processes that it has started."""
    family = _descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            family |= _descendants(process.pid)
            process.kill()
            process.wait()
    for pid, started in family.items():
        with suppress(ProcessLookupError):
            if _stat(pid)[19:20] == [started]:  # no other process has this pid by now
                os.kill(pid, signal.SIGKILL)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a contender, and end it with the block if it still runs."""
    process = start(command, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)


def run(command: Sequence[str], environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a contender. Return its output. Raises subprocess.TimeoutExpired, and ends it, if it takes too long."""
    pipe = subprocess.PIPE
    with running(command, env=environment, stdout=pipe, stderr=pipe) as process:
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the process's name, or an empty list."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _descendants(pid: int) -> dict[int, str]:
    """Return the pids of all descendants of a process, with their start times."""
    stats = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        children = {each: fields[19] for each, fields in stats.items() if fields and int(fields[1]) in parents}
        parents = children.keys() - found.keys()
        found |= children
    return found
