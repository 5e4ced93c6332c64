"""Processes that a test starts: they end with it, also where it fails before it has ended them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def started(command: Sequence[str], **options: bool) -> Iterator[subprocess.Popen[str]]:
    """A command whose input and output are pipes. It's killed at the end: Popen's own `with` waits for it, and for good
    where it's stopped."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hold(process: subprocess.Popen[str]) -> None:
    """Stop it as SIGSTOP does, and return when all its threads have stopped: until then it may still answer."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    while any(path.read_text().rpartition(")")[2].split()[0] != "T" for path in tasks.glob("*/stat")):
        time.sleep(0.005)
