"""Processes that a test starts and that end with it, even if the test fails."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command with pipes for its input and output; kill it at the end.

    Popen's own context manager waits for the process instead, forever if it is stopped.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def suspend(process: subprocess.Popen[str]) -> None:
    """Send SIGSTOP and wait until all threads have stopped: until then the process may still answer."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    while any(path.read_text().rpartition(")")[2].split()[0] != "T" for path in tasks.glob("*/stat")):
        time.sleep(0.005)
