"""Buffers that are used again and again: a fresh one costs page faults."""

from __future__ import annotations

import torch
from torch import Tensor

ALONE = 2
"""Users of a storage that only its buffer and the asking one have."""


class BufferPool:
    """Flat buffers of a device, by size and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self.num_bytes = 0  # of all that were ever made

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer [numel]."""
        free = self._free.setdefault((numel, dtype), [])
        if not free:
            self.num_bytes += numel * dtype.itemsize
            free.append(torch.empty(numel, dtype=dtype, device=self.device))
        return free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """Its next user overwrites it, in the order of the device's stream; unless somebody still looks into it (a node
        of autograd, activation checkpointing, a model that kept a view): then it's theirs, and goes with them."""
        storage = buffer.untyped_storage()
        users = torch._C._storage_Use_Count(storage._cdata)
        if users > ALONE:
            self.num_bytes -= buffer.nbytes
        else:
            self._free[buffer.numel(), buffer.dtype].append(buffer)

    def trim(self) -> None:
        """Free what nobody uses."""
        for free in self._free.values():
            self.num_bytes -= sum(buffer.nbytes for buffer in free)
            free.clear()
