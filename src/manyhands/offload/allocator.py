"""Keeps weights and optimizer state on the device, in RAM (offload = "cpu") or on disk ("disk"); buffer pools.

- `Allocator` keeps buffers in the memory of a device. With offload = "cpu", this is host memory.
- `DiskAllocator` keeps buffers in mapped files of the scratch folder, for offload = "disk".

Offload decides only where a buffer is stored. Code that uses a buffer calls `prefetch` before and `evict` after its
use, and the bits are the same with every allocator. `BufferPool` reuses buffers, because new memory costs page faults.
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
"""The size of a file. A file holds many buffers, because each mapping takes kernel resources."""

BEHIND_BYTES = 128 * MIB
"""The amount of data that may wait to be written. `evict` blocks while more is waiting."""

_PAGE = mmap.PAGESIZE

_MS_SYNC = 4


class Allocator:
    """Creates buffers in the memory of `device`. Buffers in host memory that a GPU uses are pinned."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.device = device
        self._pinned = pinned
        self.scratch: Path | None = None  # the folder of the files that hold the buffers; None if they are in memory

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed buffer [numel]."""
        return torch.zeros(numel, dtype=dtype, device=self.device, pin_memory=self._pinned)

    def prefetch(self, buffer: Tensor) -> None:
        """Announce that the buffer, or this part of a buffer, will be used soon."""

    def evict(self, buffer: Tensor) -> None:
        """Announce that the buffer, or this part of a buffer, will not be used for a while."""

    def owns(self, buffer: Tensor) -> bool:
        """Return True if the buffer can be evicted."""
        return False

    def adopt(self, mapped: Tensor) -> None:
        """Manage a buffer of complete pages that the group mapped from a file."""

    def close(self) -> None:
        """Free all resources except the buffers."""

    @property
    def on_disk(self) -> bool:
        """Return True if evicted buffers take no memory."""
        return self.scratch is not None


class DiskAllocator(Allocator):
    """Creates buffers in unnamed files of `folder`. The files disappear however the process ends.

    The kernel reads pages when they are accessed, and may drop pages that have been written. `prefetch` makes the
    kernel read ahead. `evict` makes a thread write the pages to the file and unmap them from this process. Raises
    ConfigError.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(torch.device("cpu"))
        self.scratch = folder
        check_scratch(folder)
        self._maps: list[tuple[int, int]] = []  # addresses [start, end), in ascending order
        # Keep references to the mappings, so that their addresses are not reused while the allocator exists.
        self._held: list[Tensor] = []
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
        page_bytes = -(-num_bytes // _PAGE) * _PAGE
        if self._slab is None or page_bytes > self._free:
            self._slab = map_file(self.scratch or Path(), max(SLAB_BYTES, page_bytes))
            self._free = self._slab.numel()
            self.adopt(self._slab)
        start = self._slab.numel() - self._free
        self._free -= page_bytes
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
            if self._error is not None:  # pages may be lost, so training must not continue
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
        """Return the address and length of the pages that hold the buffer.

        Raises InvariantError for memory without a file, because dropping its pages would zero it.
        """
        first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        if not self.owns(buffer):
            raise InvariantError(
                "a buffer does not belong to this allocator", got=f"{buffer.nbytes} bytes at {first:#x}"
            )
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
            except BaseException as error:  # the next call of evict raises it
                self._error = error
            with self._changed:
                self._behind.popleft()
                self._behind_bytes -= num_bytes
                self._changed.notify_all()


def allocator_for(kind: str, device: torch.device, scratch: Path) -> Allocator:
    """Return the allocator for `Strategy.offload` = `kind`, for state that `device` computes with.

    Raises ConfigError.
    """
    if kind == "disk":
        return DiskAllocator(scratch)
    if kind == "cpu":
        return Allocator(torch.device("cpu"), pinned=device.type == "cuda")
    return Allocator(device)


def _advise(address: int, num_bytes: int, advice: int) -> None:
    with suppress(OSError):  # the kernel may refuse advice, and nothing depends on it
        _call("madvise", address, num_bytes, advice)


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, address: int, num_bytes: int, what: int) -> None:
    """Call msync or madvise.

    Python's mmap supports these calls only for complete mappings, and holds the GIL during them.
    """
    if getattr(_libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), what) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


UNSHARED_USE_COUNT = 2
"""The use count of a storage that only its buffer and the caller refer to."""


class BufferPool:
    """A pool of flat buffers on a device, by dtype.

    Requests whose sizes differ by less than a factor of two share buffers. A buffer that is too small is replaced by a
    larger one. So the pool has about as many buffers as were in use at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[torch.dtype, list[Tensor]] = {}  # unused buffers by dtype, the smallest first
        self.num_bytes = 0  # the size of all buffers, in use or free

    @torch.inference_mode(False)  # a buffer that is taken in inference mode may later be used outside of it
    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer [numel]."""
        free = self._free.setdefault(dtype, [])
        similar = [
            index for index, buffer in enumerate(free) if numel < 2 * buffer.numel() and buffer.numel() < 2 * numel
        ]
        for index in similar:
            if free[index].numel() >= numel:
                buffer = free.pop(index)
                # Don't return a view, because a view would raise the use count.
                return buffer.set_(buffer.untyped_storage(), 0, (numel,), (1,))
        if similar:
            self.num_bytes -= free.pop(similar[0]).nbytes
        self.num_bytes += numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device=self.device)

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer to the pool. Its next user overwrites it, in the order of the device's stream.

        If another object still refers to its storage (an autograd node, activation checkpointing, a view in the model),
        the buffer is removed from the pool instead, and is freed when the last reference to it is dropped.
        """
        storage = buffer.untyped_storage()
        users = torch._C._storage_Use_Count(storage._cdata)
        if users > UNSHARED_USE_COUNT:
            self.num_bytes -= storage.nbytes()
        else:
            self.put_back(buffer)

    @torch.inference_mode(False)
    def put_back(self, buffer: Tensor) -> None:
        """Return a buffer to the pool even if other objects still refer to it. Nothing may read it any more."""
        free = self._free[buffer.dtype]
        free.append(buffer.new_empty(0).set_(buffer.untyped_storage()))
        free.sort(key=Tensor.numel)

    def trim(self) -> None:
        """Free all unused buffers."""
        for free in self._free.values():
            self.num_bytes -= sum(buffer.nbytes for buffer in free)
            free.clear()
