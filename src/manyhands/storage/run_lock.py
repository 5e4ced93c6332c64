"""Locks on files, and the exclusive lock of a run directory.

The kernel provides the locks (flock), on a file that is never deleted. A lock ends with the process that holds it,
however that process ends. Without locks, two runs in one directory would publish checkpoints that neither run has
computed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manyhands.errors import ConfigError
from manyhands.storage.atomic import remove_temporary_files

LOCK = ".lock"

# A process that checks whether the directory is locked holds the lock for a moment. Children of a killed worker hold it
# until they end.
_PATIENCE_SECONDS = 1.0

_POLL_SECONDS = 0.05


class FileLock:
    """A lock on a file. The constructor creates the file if it is missing. Raises OSError if that fails.

    If the file system has no locks, `take` always succeeds, and sets `is_supported` to False.
    """

    is_supported = True

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def take(self, *, shared: bool = False, patience_seconds: float = 0.0) -> bool:
        """Take the lock, or convert a held lock to shared or exclusive.

        Return False if another process still holds it after `patience_seconds`.
        """
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_SECONDS)
            except OSError:  # the file system has no locks
                self.is_supported = False
                return True

    def write(self, text: str) -> None:
        """Replace the file's content, which is a message from the holder to waiting processes. Raises OSError."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def read(self) -> str:
        """Return the file's content."""
        return os.pread(self._fd, 1000, 0).decode(errors="replace")

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock of the run directory `path` until the block ends. Raises ConfigError if another process holds it.

    Deletes temporary files that killed runs left there.
    Continues without a lock if the file system has no locks, or if the lock file can't be created.
    """
    try:
        lock = FileLock(path / LOCK)
    except OSError:  # a later write to the directory reports the error
        yield
        return
    try:
        if not lock.take(patience_seconds=_PATIENCE_SECONDS):
            raise ConfigError(
                "the run is already in progress",
                where=str(path.absolute()),
                got=_owner(lock.read()),
                hint="wait for it to end, or stop it first; or start another run, in another run directory",
            )
        with suppress(OSError):  # the disk is full; the message says only who holds the lock
            lock.write(json.dumps([socket.gethostname(), os.getpid()]))
        for folder in (path, path / "digests"):
            remove_temporary_files(folder)
        yield
    finally:
        lock.close()


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the run directory's lock now, or None if this is unknown.

    It is unknown if the directory was never locked, or if its last owner was on another host, because the locks of that
    host may not be visible here.
    """
    try:
        fd = os.open(path / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        owner = _owner(os.pread(fd, 1000, 0).decode(errors="replace"))
        return False if owner.endswith(f" on {socket.gethostname()}") else None
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


def _owner(text: str) -> str:
    try:
        host, pid = json.loads(text)
    except (ValueError, TypeError):  # the owner has not written its host and pid yet
        return "another process"
    return f"process {pid} on {host}"
