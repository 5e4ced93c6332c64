"""Norms and hashes of blocks; digests and fingerprints of parameters.

What is reduced over a buffer is reduced per block, and blocks' results are added in block order: never per shard.
Functions take a flat tensor of whole blocks, [num_blocks * BLOCK], and give one value a block. A block's value depends
on that block's elements alone, not on how many blocks are looked at together (a test holds this).

The digest: SHA-256 over the hashes of all blocks of the master weights, by parameter, in construction order.

Tells a parameter's bits: of those that the digest doesn't cover, or before there is one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from manyhands.layout import BLOCK, ParamSlot, blocks_of

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


HASHED_TOGETHER = 256 * BLOCK
"""Elements: they may be copied for it, and a parameter may be as large as there's room for."""


def digest_of(names_and_numels: Sequence[tuple[str, int]], hashes: npt.NDArray[np.int64]) -> str:
    """64 hex digits. hashes: [num_blocks] int64, in the order of the parameters."""
    sha, first = hashlib.sha256(), 0
    for name, numel in names_and_numels:
        last = first + blocks_of(numel)
        sha.update(f"{name} {numel}\n".encode())
        sha.update(hashes[first:last].astype("<i8").tobytes())
        first = last
    return sha.hexdigest()


def slots_in_order(slots: Sequence[ParamSlot]) -> list[tuple[str, int]]:
    """(name, numel) in construction order, as `digest_of` wants them."""
    return [(slot.name, slot.numel) for slot in sorted(slots, key=lambda slot: slot.first_block)]


def digest_of_tensors(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """The digest of plain named fp32 tensors, in the order given: what any other program can check ours against."""
    hashes = []
    for _, tensor in tensors:
        for part in torch.split(tensor.detach().flatten(), HASHED_TOGETHER):
            hashes.append(block_hashes(pad(part.float().cpu(), (0, -part.numel() % BLOCK))).numpy())
    return digest_of([(name, tensor.numel()) for name, tensor in tensors], np.concatenate(hashes))


def fingerprint(name: str, param: Tensor) -> str:
    """16 hex digits that tell a parameter's bits."""
    parts = torch.split(param.detach().cpu().contiguous().reshape(-1), HASHED_TOGETHER)
    return fingerprint_of_parts(name, param.dtype, parts)


def fingerprint_of_parts(name: str, dtype: torch.dtype, parts: Iterable[Tensor]) -> str:
    """The same of a parameter whose elements come in parts, in order; each but the last one is whole blocks."""
    if dtype == torch.float32:
        numel, hashes = 0, []
        for part in parts:
            numel += part.numel()
            hashes.append(block_hashes(pad(part, (0, -part.numel() % BLOCK))).numpy())
        return digest_of([(name, numel)], np.concatenate(hashes))[:16]
    sha = hashlib.sha256()
    for part in parts:  # frozen: of whatever dtype
        sha.update(part.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
