"""Exclusive lock of a run directory.

Two would publish checkpoints that neither has computed. The lock is the kernel's, on a file that stays: it ends with
the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhands.errors import ConfigError

LOCK = ".lock"

_PATIENCE_SECONDS = 1.0  # for who only looks whether it's locked; and for what a killed worker had started to end


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Have the run directory for oneself, until the end of the block. Raises ConfigError if another process has it.

    Where the file system knows no locks, or the file can't be made, it goes on without.
    """
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # what can't be written here is told by those who must
        yield
        return
    try:
        if _is_ours(fd):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps([socket.gethostname(), os.getpid()]).encode(), 0)
            yield
            return
        raise ConfigError(
            "the run is going on already",
            where=str(path.absolute()),
            got=_owner(fd),
            hint="wait for it to end, or stop it first; or begin another run, in another run directory",
        )
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool | None:
    """Whether somebody has the run directory just now. None: that can't be said, as nobody has locked it ever, or the
    last one was another host, whose locks may not be seen here."""
    try:
        fd = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False if _owner(fd).endswith(f" on {socket.gethostname()}") else None
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


def _is_ours(fd: int) -> bool:
    """Take it. True also where the file system knows no locks."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
            continue
        except OSError:
            pass
        return True


def _owner(fd: int) -> str:
    try:
        host, pid = json.loads(os.pread(fd, 1000, 0))
    except (OSError, ValueError, TypeError):  # it has just begun
        return "another process"
    return f"process {pid} on {host}"
