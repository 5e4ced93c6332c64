"""A folder for what a launcher and its workers tell each other, which nobody finds later, however both end."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_YOUNG_SECONDS = 60.0  # so long ago one was made that is locked by now


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Gone at the end of the block, also if this process was killed: a shell waits for the end of a pipe that only this
    process holds. If that was killed, too (a job's processes may all be), the next one on this host clears it away."""
    prefix = f"manyhands-run-{socket.gethostname()}-"
    _clear(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # where the file system knows no locks, nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            command = ["/bin/sh", "-c", 'cat; rm -rf "$1"', "sh", name]
            nowhere = subprocess.DEVNULL
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, cwd="/", start_new_session=True
            ):
                yield Path(name)
        finally:
            os.close(lock)


def _clear(prefix: str) -> None:
    """Remove folders that no living process has."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if "-" in path.name.removeprefix(prefix):
            continue  # of a host whose name begins like this one's
        with suppress(OSError):  # another user's
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > _YOUNG_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
