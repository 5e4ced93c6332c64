"""Norms and hashes of blocks; digests and fingerprints of parameters.

Norms and hashes are computed per block and combined in block order. They are never computed per shard, because shards
depend on the number of workers. The functions take a flat tensor of complete blocks, [num_blocks * BLOCK], and return
one value per block. A block's value depends only on that block's elements, not on how many blocks are processed
together.

The *digest* is SHA-256 over the hashes of all blocks of the master weights and of the persistent buffers, tensor by
tensor, in the order of the model's state_dict. A *fingerprint* identifies the bits of one parameter. It is used for
frozen parameters, which the digest doesn't cover, and before there is a digest.
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

from manyhands.shard_layout import BLOCK, ParamSlot, blocks_of

_LANES = 2

_HASH_SEED = 0x6D616E79  # "many"

# These blocks and the intermediate results fit into a core's second-level cache, so hashing is several times faster.
_BLOCKS_IN_CACHE = 64


def block_norms(values: Tensor) -> Tensor:
    """Return the 2-norm of each block: [num_blocks * BLOCK] fp32 -> [num_blocks] fp32."""
    norms: Tensor = torch.linalg.vector_norm(values.view(-1, BLOCK), dim=1)
    return norms


def total_norm(norms_in_block_order: Tensor) -> float:
    """Return the 2-norm of all elements from the norms of all blocks, [num_blocks] fp32, in block order.

    The squares are added in fp64. The order of the blocks and their number are the same for any number of workers.
    """
    return float(norms_in_block_order.double().square().sum().sqrt())


@functools.cache
def _keys(device: str) -> tuple[Tensor, ...]:
    """Return the odd keys of each lane, [BLOCK] int32. They are part of the digest's definition."""
    generator = torch.Generator().manual_seed(_HASH_SEED)
    keys = [torch.randint(-(2**31), 2**31, (BLOCK,), generator=generator, dtype=torch.int64) | 1 for _ in range(_LANES)]
    return tuple(key.to(torch.int32).to(device) for key in keys)


def block_hashes(values: Tensor) -> Tensor:
    """Return a 64-bit hash of each block's bits: [num_blocks * BLOCK] fp32 -> [num_blocks] int64.

    In each of two lanes the elements' bits are multiplied by odd keys, mixed and summed. This is integer arithmetic
    modulo 2^32, so the result is the same on every device and in any order of addition.
    It detects accidental changes, not deliberate ones.
    """
    bits = values.view(torch.int32).view(-1, BLOCK)
    blocks_at_a_time = _BLOCKS_IN_CACHE if values.device.type == "cpu" else max(len(bits), 1)
    keys = _keys(str(values.device))
    return torch.cat([_hashes(part, *keys) for part in torch.split(bits, blocks_at_a_time)])


def _hashes(bits: Tensor, *keys: Tensor) -> Tensor:
    """Return the hashes of blocks: [num_blocks, BLOCK] int32 -> [num_blocks] int64."""
    lanes = []
    for key in keys:
        mixed = bits * key
        mixed ^= mixed >> 15
        lanes.append(mixed.sum(dim=1, dtype=torch.int64))
    return (lanes[0] << 32) ^ (lanes[1] & 0xFFFFFFFF)


HASH_CHUNK = 256 * BLOCK
"""The number of elements that are hashed at a time.

Hashing may copy them, and a copy of a full parameter may not fit into memory.
"""


def digest_of(names_and_words: Sequence[tuple[str, int]], hashes: npt.NDArray[np.int64]) -> str:
    """Return the digest as 64 hex digits.

    names_and_words: the name and the number of words (see `words_of`) of each tensor. hashes: [num_blocks] int64,
    tensor by tensor.
    """
    sha, first = hashlib.sha256(), 0
    for name, words in names_and_words:
        last = first + blocks_of(words)
        sha.update(f"{name} {words}\n".encode())
        sha.update(hashes[first:last].astype("<i8").tobytes())
        first = last
    return sha.hexdigest()


def slots_in_order(slots: Sequence[ParamSlot]) -> list[tuple[str, int]]:
    """Return (name, numel) of the slots in construction order, as `digest_of` requires."""
    return [(slot.name, slot.numel) for slot in sorted(slots, key=lambda slot: slot.first_block)]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(value: Tensor) -> Tensor:
    """Return a view of floating-point values as integers of the same size. Return other values unchanged.

    Compared as integers, a NaN equals itself, and 0 does not equal -0. Complex values become pairs of integers.
    """
    value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
    return value.view(_INTEGERS[value.itemsize]) if value.is_floating_point() else value


def words_of(tensor: Tensor) -> int:
    """Return the number of 32-bit words of a tensor that are hashed: one per element, unless its bytes are hashed."""
    return tensor.numel() if _is_hashed_as_fp32(tensor.dtype) else -(-tensor.numel() * tensor.itemsize // 4)


def _is_hashed_as_fp32(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize <= 4


def tensor_hashes(tensor: Tensor) -> npt.NDArray[np.int64]:
    """Return the hashes of a tensor's blocks, [blocks_of(words_of(tensor))] int64.

    Floating-point types of up to 32 bits are hashed as fp32, which holds their values exactly. Other types are hashed
    by their bytes, padded with zeros.
    """
    flat = tensor.detach().reshape(-1)
    if not _is_hashed_as_fp32(tensor.dtype):
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        raw = flat.cpu().contiguous().reshape(-1).view(torch.uint8)
        flat = pad(raw, (0, -raw.numel() % 4)).view(torch.float32)  # only the bits are used
    parts = [part.float().cpu() for part in torch.split(flat, HASH_CHUNK)] if flat.numel() else []
    hashes = [block_hashes(pad(part, (0, -part.numel() % BLOCK))).numpy() for part in parts]
    return np.concatenate(hashes) if hashes else np.empty(0, np.int64)


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest of a model's tensors: `digest_of_tensors(model.state_dict().items())`.

    It equals the digest of a run that ends with these weights and persistent buffers. Other programs can use it to
    check a digest. tensors: names and tensors, in the order of the state_dict. A tied tensor is hashed under its first
    name only. Leave out frozen parameters, because the digest doesn't cover them. Values of type `nn.Parameter` with
    `requires_grad=False`, as in `state_dict(keep_vars=True)`, are skipped.
    """
    names, hashes, seen = [], [np.empty(0, np.int64)], set()
    for name, tensor in tensors:
        is_frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if is_frozen or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        names.append((name, words_of(tensor)))
        hashes.append(tensor_hashes(tensor))
    return digest_of(names, np.concatenate(hashes))


def fingerprint(name: str, param: Tensor) -> str:
    """Return 16 hex digits that identify a parameter's bits."""
    parts = torch.split(param.detach().cpu().contiguous().reshape(-1), HASH_CHUNK)
    return fingerprint_of_parts(name, param.dtype, parts)


def fingerprint_of_parts(name: str, dtype: torch.dtype, parts: Iterable[Tensor]) -> str:
    """Return the fingerprint of a parameter from consecutive parts.

    All parts but the last must consist of complete blocks.
    """
    if dtype == torch.float32:
        numel, hashes = 0, []
        for part in parts:
            numel += part.numel()
            hashes.append(block_hashes(pad(part, (0, -part.numel() % BLOCK))).numpy())
        return digest_of([(name, numel)], np.concatenate(hashes))[:16]
    sha = hashlib.sha256()
    for part in parts:  # only frozen parameters may have a dtype other than fp32
        sha.update(part.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
