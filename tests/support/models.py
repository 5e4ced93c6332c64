"""Small models, data and recipes, each with something that could make the bits depend on the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from manyhands import Batch, Recipe

VOCABULARY, LENGTH, WIDTH = 61, 12, 32
NamedParams = list[tuple[str, nn.Parameter]]
OptimizerFactory = Callable[[NamedParams], torch.optim.Optimizer | list[torch.optim.Optimizer]]
LossResult = tuple[Tensor, Tensor | float | int]

BATCH = Batch(global_size=20, micro_size=2, virtual_workers=5)
"""10 micro-batches, 2 for each of 5 virtual workers. They can't be divided evenly among 3 and 4 workers."""

GPT_UNITS = ("blocks.0", "blocks.1")
"""Such a small model would be a single unit. With these names there are several."""


class Tokens(Dataset[Tensor]):
    """Sequences of tokens, each a function of its index. 50 of them: epochs end in the middle of a step."""

    def __init__(self, size: int = 50) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        positions = torch.arange(LENGTH + 1)
        return (positions * (index % 7 + 1) + index * index + positions * positions // 3) % VOCABULARY


class Sentences(Dataset[Tensor]):
    """Token sequences of 3 to 12 tokens."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Tensor:
        return Tokens()[index][: 3 + index * 5 % 10]


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images of 3 x 8 x 8 with one of 5 labels, each a function of its index."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 8, 8, generator=generator), index % 5


class Block(nn.Module):
    """A transformer block with dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.out(heads), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """A small GPT with dropout, whose input and output embeddings are one parameter."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).float()


class ConvNet(nn.Module):
    """Two convolutions with batch norm, whose running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv_2, self.norm_2 = nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv_1.weight.dtype)
        x = F.relu(self.norm_1(self.conv_1(x)))
        x = F.relu(self.norm_2(self.conv_2(x)))
        return self.head(x.mean((2, 3))).float()


class PartlyUsed(nn.Module):
    """`sometimes` gets a gradient only in micro-batches whose data require it; `never` gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.always, self.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.never = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.always(self.tokens(tokens)))
        if int(tokens[0, 0]) % 3 == 0:
            x = x + self.sometimes(x).view(*x.shape, 2).mean(-1)
        return self.head(x).float()


class Wide(nn.Module):
    """One parameter of more than 2^18 elements, an odd number, which the update processes in several runs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 8513), nn.Linear(8513, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.tokens(tokens)))).float()


def next_token_loss(model: nn.Module, tokens: Tensor) -> LossResult:
    """Return the sum over tokens, and their number."""
    targets = tokens[:, 1:]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean over tokens, without a weight."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def picture_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossResult:
    """Return the sum over images, and their number."""
    pictures, labels = batch
    return F.cross_entropy(model(pictures), labels, reduction="sum"), len(labels)


def padded(sentences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return sentences as one padded batch, and a mask of their tokens."""
    tokens = nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def padded_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossResult:
    """Return the sum over tokens without padding, and their number as a tensor, which differs per micro-batch."""
    tokens, real = batch
    each = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    return (each * real[:, 1:]).sum(), real[:, 1:].sum()


def grouped(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> OptimizerFactory:
    """Return a factory of that optimizer with weight decay on matrices only: two param groups."""

    def make(named_params: NamedParams) -> torch.optim.Optimizer:
        matrices = [param for _, param in named_params if param.ndim >= 2]
        others = [param for _, param in named_params if param.ndim < 2]
        return kind([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], **options)

    return make


def muon_and_adamw(**options: Any) -> OptimizerFactory:
    """Return a factory of Muon for the matrices inside the model and AdamW for its embeddings, norms and biases."""

    def make(named_params: NamedParams) -> list[torch.optim.Optimizer]:
        matrices = [(name, param) for name, param in named_params if param.ndim == 2 and "blocks" in name]
        rest = [(name, param) for name, param in named_params if param.ndim != 2 or "blocks" not in name]
        return [torch.optim.Muon(matrices, **({"lr": 2e-2} | options)), torch.optim.AdamW(rest, lr=3e-3, fused=True)]

    return make


OWNED: dict[str, OptimizerFactory] = {
    "Muon and AdamW": muon_and_adamw(),
    "Adafactor": grouped(torch.optim.Adafactor, lr=1e-2),
}
"""Factories, by name, of optimizers that must see unsplit parameters."""


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Return torch's schedule that rises over 3 steps, then falls."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / 3, 3 / (step + 1)))


def gpt_recipe(precision: str = "fp32", **changes: Any) -> Recipe:
    """The GPT with weight-decay groups, clipping, accumulation and a schedule."""
    fields: dict[str, Any] = {
        "model": GPT,
        "loss": next_token_loss,
        "optimizer": grouped(torch.optim.AdamW, lr=3e-3, fused=True),
        "schedule": warm_up,
        "data": Tokens(),
        "batch": BATCH,
        "clip_norm": 0.5,
        "seed": 11,
    }
    return Recipe(precision=precision, **(fields | changes))


def conv_recipe(precision: str = "fp32", **changes: Any) -> Recipe:
    """The convolutional net with SGD and momentum; not clipped."""
    fields: dict[str, Any] = {
        "model": ConvNet,
        "loss": picture_loss,
        "data": Pictures(),
        "optimizer": grouped(torch.optim.SGD, lr=0.1, momentum=0.9),
        "clip_norm": None,
    }
    return gpt_recipe(precision, **(fields | changes))


def partly_used_recipe(precision: str = "fp32", **changes: Any) -> Recipe:
    """The net with unused parameters. Weight decay on all of them would reveal an update."""
    fields: dict[str, Any] = {
        "model": PartlyUsed,
        "optimizer": lambda named_params: torch.optim.AdamW(
            [param for _, param in named_params], lr=1e-2, weight_decay=0.1
        ),
    }
    return gpt_recipe(precision, **(fields | changes))


def padded_recipe(precision: str = "fp32", **changes: Any) -> Recipe:
    """The GPT on sentences of unequal length."""
    return gpt_recipe(precision, **({"data": Sentences(), "collate": padded, "loss": padded_loss} | changes))
