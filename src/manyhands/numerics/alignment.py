"""Memory alignment, on which the bits of CPU kernels depend.

Kernels read data at addresses that are multiples of 64 in complete vectors. At other addresses they may choose another
algorithm, for example for convolutions, or treat the first elements separately. torch allocates aligned memory, but
tensors that view a mapped file, a numpy array or received bytes start anywhere, and at another address in each process.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes. The alignment of memory that torch allocates on a CPU, and the length of the longest vectors."""


def is_aligned(tensor: Tensor) -> bool:
    """Return True if the tensor's first element is at a multiple of ALIGNMENT."""
    return tensor.data_ptr() % ALIGNMENT == 0


def with_aligned_storage(tensor: Tensor, copies: dict[int, torch.UntypedStorage] | None = None) -> Tensor:
    """Return `tensor`, or a copy of it in aligned memory if its storage starts at an unaligned address.

    The copy has the same offset and strides, so its address depends only on how it was created. copies: the storages
    that were copied before, by their addresses. Tensors that share a storage still share one if `copies` is the same.
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
