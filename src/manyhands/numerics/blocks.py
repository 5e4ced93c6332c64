"""What is reduced over a buffer is reduced per block, and blocks' results are added in block order: never per shard.

Functions take a flat tensor of whole blocks, [num_blocks * BLOCK], and give one value a block. A block's value depends
on that block's elements alone, not on how many blocks are looked at together (a test holds this).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from manyhands.layout import BLOCK

_LANES = 2
_HASH_SEED = 0x6D616E79  # "many"
_BLOCKS_IN_CACHE = 64  # with what is made of them, in a core's second-level cache: several times as fast


def block_norms(values: Tensor) -> Tensor:
    """The 2-norm of each block: [num_blocks * BLOCK] fp32 -> [num_blocks] fp32."""
    norms: Tensor = torch.linalg.vector_norm(values.view(-1, BLOCK), dim=1)
    return norms


def total_norm(norms_in_block_order: Tensor) -> float:
    """The 2-norm of everything from the norms of all blocks, [num_blocks] fp32, in block order. Added in fp64."""
    return float(norms_in_block_order.double().square().sum().sqrt())


@functools.cache
def _keys(device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(_HASH_SEED)
    keys = [torch.randint(-(2**31), 2**31, (BLOCK,), generator=generator, dtype=torch.int64) | 1 for _ in range(_LANES)]
    return tuple(key.to(torch.int32).to(device) for key in keys)


def block_hashes(values: Tensor) -> Tensor:
    """A 64-bit hash of each block's bits: [num_blocks * BLOCK] fp32 -> [num_blocks] int64.

    Integer arithmetic modulo 2^32, so the same on every device and in any order of additions: in each of two lanes the
    elements' bits are multiplied by odd keys, mixed and summed. It finds accidents, not forgeries.
    """
    bits = values.view(torch.int32).view(-1, BLOCK)
    together = _BLOCKS_IN_CACHE if values.device.type == "cpu" else max(len(bits), 1)
    return torch.cat([_hashes(some, *_keys(str(values.device))) for some in torch.split(bits, together)])


def _hashes(bits: Tensor, *keys: Tensor) -> Tensor:
    lanes = []
    for key in keys:
        mixed = bits * key
        mixed ^= mixed >> 15
        lanes.append(mixed.sum(dim=1, dtype=torch.int64))
    return (lanes[0] << 32) ^ (lanes[1] & 0xFFFFFFFF)
