"""A small model to compile, with what could make the code depend on what a worker has seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from manyhands import Batch, Recipe
from support.models import VOCABULARY, gpt_recipe, padded, padded_loss

WIDTH = 24
UNITS = ("blocks.0", "blocks.1")


class Mix(nn.Module):
    """A block with what compilers fuse: norms over width and over length, an activation, dropout, a number.

    Code that is compiled for this length computes the variance over the length differently than code for any length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        mixed = self.mix(self.norm(x))
        over_length = F.layer_norm(mixed.mT, (x.shape[1],)).mT
        return x + scale * F.dropout(F.gelu(over_length), 0.2, self.training)


class Stack(nn.Module):
    """Blocks of one code, the first of which is used again at the end; the embedding is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Mix() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, 1 / tokens.shape[1])
        return self.head(x).float()


class TwoLengths(Dataset[Tensor]):
    """Sentences of 22 or 30 tokens, so that batches have two shapes."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(30 if index % 5 == 0 else 22) * (index + 1)) % VOCABULARY


def compiled_recipe(precision: str = "fp32", **changes: Any) -> Recipe:
    """Three micro-batches a step, of either length."""
    fields: dict[str, Any] = {
        "model": Stack,
        "data": TwoLengths(),
        "collate": padded,
        "loss": padded_loss,
        "batch": Batch(global_size=6, micro_size=2),
        "compile": True,
    }
    return gpt_recipe(precision, **(fields | changes))
