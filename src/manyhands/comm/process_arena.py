"""Memory that the workers of one host share, without a name in any file system.

A process creates an anonymous file (a memfd, or an unnamed file of the scratch folder) and passes its address,
`pid:fd:bytes`, to other processes, which open the file through /proc. A killed process leaves nothing behind, because
the file has no name, and the limit of /dev/shm does not apply. The kernel frees the memory when no process maps it any
more.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from manyhands.offload.scratch import open_unnamed


class ProcessArena:
    """An arena of memory that processes of one user on one host share."""

    def __init__(self) -> None:
        self._created: list[int] = []

    def create(self, num_bytes: int, scratch: Path | None = None) -> tuple[Tensor, str]:
        if scratch is not None:
            fd = open_unnamed(scratch, num_bytes)
        else:
            fd = os.memfd_create("manyhands", os.MFD_CLOEXEC)
            os.ftruncate(fd, num_bytes)
        self._created.append(fd)
        return _map(fd, num_bytes), f"{os.getpid()}:{fd}:{num_bytes}"

    def open(self, address: str) -> Tensor:
        pid, number, num_bytes = (int(part) for part in address.split(":"))
        if pid == os.getpid():
            return _map(number, num_bytes)
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        try:
            return _map(fd, num_bytes)
        finally:
            os.close(fd)  # the mapping keeps the memory alive

    def seal(self) -> None:
        while self._created:
            os.close(self._created.pop())


def _map(fd: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
