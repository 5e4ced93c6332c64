"""Reads files of folders from untrusted sources: run directories, checkpoints, token files.

In such a folder, a name may be a link to any file of this machine, a FIFO, on which opening waits forever, or a device
without an end. The functions here open only regular files whose real path is in the folder, and read a limited number
of bytes.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from manyhands.storage.location import Address, Location

MOST_JSON_BYTES = 1 << 28
"""The maximum size of a manifest that is read. A checkpoint's manifest has about 300 bytes per piece of a tensor."""

MOST_LINES_BYTES = 1 << 31
"""The maximum size of a file of metrics, events or log lines that is read."""


def open_inside(folder: Path, name: str) -> io.BufferedReader:
    """Open the regular file `name` of a folder, for reading. The folder itself may be a link.

    Raises OSError, also for anything other than a regular file, and for a path or link that leads out of the folder.
    """
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.EPERM, "it is a link or a path that leads out of its folder", str(path))
    return open_regular(path)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. Raises OSError, also for anything other than a regular file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK, a FIFO would block
    return os.fdopen(_regular(fd, path), "rb")


def open_to_append(path: Path) -> io.FileIO:
    """Open a regular file to read it and to append to it, or create it. Buffers nothing.

    Raises OSError, also for a link and for anything other than a regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    return io.FileIO(_regular(os.open(path, flags, 0o666), path), "a+b")


def open_log(path: Path) -> io.TextIOWrapper:
    """Open a text file to append to it. See `open_to_append`."""
    return io.TextIOWrapper(io.BufferedWriter(open_to_append(path)), encoding="utf-8")


def _regular(fd: int, path: Path) -> int:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_inside(location: Location, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """Return the content of a file of a folder, as `open_inside` opens it, or of an object in a store.

    Raises OSError, also if the file has more than `most_bytes`.
    """
    if isinstance(location, Address):
        with location.open_to_read() as file:
            content = file.read(most_bytes + 1)
    else:
        with open_inside(location.parent, location.name) as file:
            content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(location))
    return content


def last_bytes(path: Path, count: int) -> bytes:
    """Return at most the last `count` bytes of a file, as `open_inside` opens it. Raises OSError."""
    with open_inside(path.parent, path.name) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read(count)
