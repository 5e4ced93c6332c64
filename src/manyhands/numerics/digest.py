"""The digest: SHA-256 over the hashes of all blocks of the master weights, by parameter, in construction order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from manyhands.layout import BLOCK, Slot, blocks_of
from manyhands.numerics.blocks import block_hashes

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


def slots_in_order(slots: Sequence[Slot]) -> list[tuple[str, int]]:
    """(name, numel) in construction order, as `digest_of` wants them."""
    return [(slot.name, slot.numel) for slot in sorted(slots, key=lambda slot: slot.first_block)]


def digest_of_tensors(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """The digest of plain named fp32 tensors, in the order given: what any other program can check ours against."""
    hashes = []
    for _, tensor in tensors:
        for part in torch.split(tensor.detach().flatten(), HASHED_TOGETHER):
            hashes.append(block_hashes(pad(part.float().cpu(), (0, -part.numel() % BLOCK))).numpy())
    return digest_of([(name, tensor.numel()) for name, tensor in tensors], np.concatenate(hashes))
