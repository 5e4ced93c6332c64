"""Buffers that are used again and again: a fresh one costs page faults."""

from __future__ import annotations

import torch
from torch import Tensor

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
