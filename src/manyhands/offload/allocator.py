"""Allocators of buffers on the device, in host memory or in mapped files; buffer pools.

Where state lives between its uses: on the device, in the host's memory, or in files that are mapped into memory.
Offload is where a buffer lives, not another way to train: whoever uses a buffer says what it will want `soon` and what
it is `done` with, and the bits are the same everywhere.

Buffers that are used again and again: a fresh one costs page faults.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from bisect import bisect_right, insort
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.formatting import MIB
from manyhands.offload.scratch import cannot_use, check_scratch, map_file

SLAB_BYTES = 64 * MIB
"""A file holds many buffers: each costs a descriptor."""

BEHIND_BYTES = 128 * MIB
"""What may wait to be written; whoever is done with more than that waits."""

_PAGE = mmap.PAGESIZE

_MS_SYNC = 4


class Allocator:
    """Buffers in the memory of `device`; pinned, if they are the host's and used by a GPU."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.device = device
        self._pinned = pinned
        self.scratch: Path | None = None  # the folder of files that buffers are in

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A zeroed buffer [numel]."""
        return torch.zeros(numel, dtype=dtype, device=self.device, pin_memory=self._pinned)

    def prefetch(self, buffer: Tensor) -> None:
        """The buffer, or this part of one, will be wanted soon."""

    def evict(self, buffer: Tensor) -> None:
        """It isn't wanted for a while."""

    def owns(self, buffer: Tensor) -> bool:
        """Whether the buffer is one that can be `done` with."""
        return False

    def adopt(self, mapped: Tensor) -> None:
        """Look after a buffer of whole pages in a file that the group mapped."""

    def close(self) -> None:
        """Free what belongs to no buffer."""

    @property
    def on_disk(self) -> bool:
        """Whether what is done with leaves the memory."""
        return self.scratch is not None


class DiskAllocator(Allocator):
    """Buffers in files of `folder` that have no name, so that nothing is left of them however the process ends.

    The kernel reads pages when they're touched and may drop those that are written; `soon` has it read ahead, and
    `done` writes behind, in a thread of its own, and takes the pages out of this process. Raises ConfigError.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(torch.device("cpu"))
        self.scratch = folder
        check_scratch(folder)
        self._maps: list[tuple[int, int]] = []  # addresses [start, end), rising
        self._held: list[Tensor] = []  # as long as the home lives nobody else gets these addresses
        self._free = 0  # bytes left in the last slab
        self._slab: Tensor | None = None
        self._behind: deque[tuple[int, int]] = deque()
        self._behind_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._writer = threading.Thread(target=self._write_behind, name="manyhands-write", daemon=True)
        self._writer.start()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        num_bytes = numel * dtype.itemsize
        whole_pages = -(-num_bytes // _PAGE) * _PAGE
        if self._slab is None or whole_pages > self._free:
            self._slab = map_file(self.scratch or Path(), max(SLAB_BYTES, whole_pages))
            self._free = self._slab.numel()
            self.adopt(self._slab)
        start = self._slab.numel() - self._free
        self._free -= whole_pages
        return self._slab[start : start + num_bytes].view(dtype)

    def adopt(self, mapped: Tensor) -> None:
        insort(self._maps, (mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes))
        self._held.append(mapped)

    def prefetch(self, buffer: Tensor) -> None:
        if not buffer.nbytes:
            return
        address, num_bytes = self._pages_of(buffer)
        _advise(address, num_bytes, mmap.MADV_WILLNEED)

    def evict(self, buffer: Tensor) -> None:
        if not buffer.nbytes:
            return
        address, num_bytes = self._pages_of(buffer)
        with self._changed:
            while self._behind_bytes > BEHIND_BYTES and not self._closed:
                self._changed.wait()
            if self._error is not None:  # its pages may be lost: nobody goes on with them
                raise cannot_use(self.scratch or Path(), self._error) from self._error
            if self._closed:
                return
            self._behind.append((address, num_bytes))
            self._behind_bytes += num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join()

    def owns(self, buffer: Tensor) -> bool:
        first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        index = bisect_right(self._maps, (first, sys.maxsize)) - 1
        return index >= 0 and end <= self._maps[index][1]

    def _pages_of(self, buffer: Tensor) -> tuple[int, int]:
        """Address and length of the pages that hold the buffer; only of files: dropping others would empty them."""
        first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        if not self.owns(buffer):
            raise InvariantError("a buffer is not of this home", got=f"{buffer.nbytes} bytes at {first:#x}")
        start = first // _PAGE * _PAGE
        return start, end - start

    def _write_behind(self) -> None:
        while True:
            with self._changed:
                while not self._behind and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                address, num_bytes = self._behind[0]
            try:
                _call("msync", address, num_bytes, _MS_SYNC)
                _advise(address, num_bytes, mmap.MADV_DONTNEED)
            except BaseException as error:  # told to who is `done` next
                self._error = error
            with self._changed:
                self._behind.popleft()
                self._behind_bytes -= num_bytes
                self._changed.notify_all()


def allocator_for(kind: str, device: torch.device, scratch: Path) -> Allocator:
    """The home of that kind for what `device` computes with. Raises ConfigError."""
    if kind == "disk":
        return DiskAllocator(scratch)
    if kind == "cpu":
        return Allocator(torch.device("cpu"), pinned=device.type == "cuda")
    return Allocator(device)


def _advise(address: int, num_bytes: int, advice: int) -> None:
    with suppress(OSError):  # advice may be refused, and nothing depends on it
        _call("madvise", address, num_bytes, advice)


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, address: int, num_bytes: int, what: int) -> None:
    """A call that Python's mmap has too, but for whole mappings, and holding the interpreter's lock."""
    if getattr(_libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), what) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


ALONE = 2
"""Users of a storage that only its buffer and the asking one have."""


class BufferPool:
    """Flat buffers of a device, by dtype. Sizes that differ by less than a factor of two share theirs: one that is too
    small gives way to a larger one, so there are about as many as were in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[torch.dtype, list[Tensor]] = {}  # from the smallest to the largest
        self.num_bytes = 0  # of all that there are

    @torch.inference_mode(False)  # who takes one in it hands it on to who isn't
    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer [numel]."""
        free = self._free.setdefault(dtype, [])
        similar = [
            index for index, buffer in enumerate(free) if numel < 2 * buffer.numel() and buffer.numel() < 2 * numel
        ]
        for index in similar:
            if free[index].numel() >= numel:
                buffer = free.pop(index)
                return buffer.set_(buffer.untyped_storage(), 0, (numel,), (1,))  # a view would be one more user
        if similar:
            self.num_bytes -= free.pop(similar[0]).nbytes
        self.num_bytes += numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device=self.device)

    def give_back(self, buffer: Tensor) -> None:
        """Its next user overwrites it, in the order of the device's stream; unless somebody still looks into it (a node
        of autograd, activation checkpointing, a model that kept a view): then it's theirs, and goes with them."""
        storage = buffer.untyped_storage()
        users = torch._C._storage_Use_Count(storage._cdata)
        if users > ALONE:
            self.num_bytes -= storage.nbytes()
        else:
            self.put_back(buffer)

    @torch.inference_mode(False)
    def put_back(self, buffer: Tensor) -> None:
        """As `give_back`, of a buffer that nobody looks into any more, whoever may still hold it."""
        free = self._free[buffer.dtype]
        free.append(buffer.new_empty(0).set_(buffer.untyped_storage()))
        free.sort(key=Tensor.numel)

    def trim(self) -> None:
        """Free what nobody uses."""
        for free in self._free.values():
            self.num_bytes -= sum(buffer.nbytes for buffer in free)
            free.clear()
