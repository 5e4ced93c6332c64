"""Tells a parameter's bits: of those that the digest doesn't cover, or before there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from manyhands.layout import BLOCK
from manyhands.numerics.blocks import block_hashes
from manyhands.numerics.digest import HASHED_TOGETHER, digest_of


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
