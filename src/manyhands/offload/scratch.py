"""The scratch folder: creates, checks and measures the files in which offload = "disk" keeps weights and state.

The files have no names, so a killed process leaves nothing behind. `DiskAllocator` (allocator.py) divides them into
buffers.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.formatting import GIB, MIB

PROBE_BYTES = 32 * MIB

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})

_PAGE = mmap.PAGESIZE


def map_file(folder: Path, num_bytes: int) -> Tensor:
    """Return a zeroed buffer, uint8 [num_bytes], in a new unnamed file of `folder`. Raises ConfigError."""
    fd = open_unnamed(folder, num_bytes)
    try:
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    except OSError as error:
        raise cannot_use(folder, error) from error
    finally:
        os.close(fd)  # the mapping keeps the file alive


def open_unnamed(folder: Path, num_bytes: int) -> int:
    """Return the descriptor of a new unnamed file.

    This function allocates all its space, so that a full disk raises ConfigError here instead of SIGBUS later.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # the file system does not support O_TMPFILE
            fd, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise cannot_use(folder, error) from error
    return fd


def check_scratch(folder: Path) -> None:
    """Check that the folder is on a disk and that files can be written to it. Raises ConfigError."""
    os.close(open_unnamed(folder, _PAGE))
    kind = file_system_of(folder)
    if kind in MEMORY_FILE_SYSTEMS:
        raise ConfigError(
            "the scratch folder is in memory, not on a disk",
            where=str(folder),
            got=kind,
            hint="name another folder in strategy.scratch, or use offload = 'cpu'",
        )


def check_space(folder: Path, num_bytes: int) -> None:
    """Check that the scratch folder has this much free space. Raises ConfigError."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < num_bytes:
        raise ConfigError(
            "the scratch folder has too little space for the state",
            where=str(folder),
            expected=f"{num_bytes / MIB:,.0f} MiB",
            got=f"{free / MIB:,.0f} MiB free",
            hint="free some space, or name another folder in strategy.scratch",
        )


def measure_speed(folder: Path) -> tuple[float, float]:
    """Return the speed of sequential writes and reads in the folder, in GB/s, without the page cache."""
    fd = open_unnamed(folder, PROBE_BYTES)
    try:
        data = os.urandom(MIB) * (PROBE_BYTES // MIB)
        started = time.perf_counter()
        os.pwrite(fd, data, 0)
        os.fsync(fd)
        written = time.perf_counter()
        os.posix_fadvise(fd, 0, PROBE_BYTES, os.POSIX_FADV_DONTNEED)
        read_started = time.perf_counter()
        os.pread(fd, PROBE_BYTES, 0)
        read = time.perf_counter()
    finally:
        os.close(fd)
    return PROBE_BYTES / 1e9 / (written - started), PROBE_BYTES / 1e9 / (read - read_started)


def file_system_of(folder: Path) -> str:
    """Return the kernel's name for the file system that holds the folder; "?" if it is unknown."""
    found = "?"
    with suppress(OSError):
        longest, real = -1, os.path.realpath(folder)
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, kind, *_ = line.split()
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= longest:
                longest, found = len(point), kind
    return found


def cannot_use(folder: Path, error: BaseException) -> ConfigError:
    """Return the error for a scratch folder whose files can't be created or written."""
    return ConfigError(
        f"the scratch folder can't be used: {getattr(error, 'strerror', None) or error}",
        where=str(folder),
        hint="free some space, or name another folder in strategy.scratch",
    )


def scratch_line(folder: Path) -> str:
    """Return a line of text with the folder, its file system, free space and speed."""
    stat = os.statvfs(folder)
    written, read = measure_speed(folder)
    return (
        f"state is stored in {folder} ({file_system_of(folder)}, {stat.f_bavail * stat.f_frsize / GIB:,.0f} GiB free, "
        f"writes {written:.1f} GB/s, reads {read:.1f} GB/s)"
    )
