"""Memory alignment, on which the bits of CPU kernels depend.

Kernels read data at addresses that are multiples of 64 in complete vectors. At other addresses they may choose another
algorithm, for example for convolutions, or treat the first elements separately. torch allocates aligned memory. But a
tensor that views a mapped file, a numpy array or received bytes may start at any address, which differs between
processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
"""The alignment, in bytes, of memory that torch allocates on a CPU. It is the length of the longest vectors."""


def is_aligned(tensor: Tensor) -> bool:
    """Return True if the address of the tensor's first element is a multiple of ALIGNMENT."""
    return tensor.data_ptr() % ALIGNMENT == 0


def with_aligned_storage(tensor: Tensor, copies: dict[int, torch.UntypedStorage] | None = None) -> Tensor:
    """Return `tensor`, or a copy of it in aligned memory if its storage starts at an unaligned address.

    The copy has the same offset and strides in its storage as the original. copies: the storages that were copied
    before, by their addresses. Tensors that share a storage also share the copy if `copies` is the same.
    """
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu" or not tensor.is_leaf:
        return tensor
    storage = tensor.untyped_storage()
    if storage.data_ptr() % ALIGNMENT == 0:
        return tensor
    copies = {} if copies is None else copies
    if storage.data_ptr() not in copies:
        copies[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
    copied = torch.empty(0, dtype=tensor.dtype)
    copied.set_(copies[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())
    return copied.requires_grad_(tensor.requires_grad)
