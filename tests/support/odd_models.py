"""Models whose forwards don't use each block once, in the order in which they were built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from support.models import GPT, VOCABULARY, WIDTH, Block, gpt_recipe, next_token_loss

UNITS = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
SMALL_BATCH = mh.Batch(global_size=12, micro_size=2, virtual_workers=3)


class Odd(GPT):
    """Four blocks; a subclass defines the order in which a micro-batch uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def order(self, tokens: Tensor) -> list[int]:
        return [0, 1, 2, 3]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for index in self.order(tokens):
            x = self.blocks[index](x)
        return self.head(self.norm(x)).float()


class Twice(Odd):
    """Uses all blocks twice."""

    def order(self, tokens: Tensor) -> list[int]:
        return [0, 1, 2, 3, 0, 1, 2, 3]


class Shared(Odd):
    """Uses one block six times in a row, and the others never."""

    def order(self, tokens: Tensor) -> list[int]:
        return [1] * 6


class Backwards(Odd):
    """Uses the blocks in reverse order."""

    def order(self, tokens: Tensor) -> list[int]:
        return [3, 2, 1, 0]


class Skips(Odd):
    """Skips blocks that depend on the data."""

    def order(self, tokens: Tensor) -> list[int]:
        return [index for index in range(4) if (int(tokens[0, 1]) + index) % 3]


class Chooses(Odd):
    """Uses a different order in each micro-batch, and some blocks more than once."""

    def order(self, tokens: Tensor) -> list[int]:
        return [int(token) % 4 for token in tokens[0, :7]]


class EvaluatesOtherwise(Odd):
    """Trains in the order of construction; evaluates in reverse order and uses one block twice."""

    def order(self, tokens: Tensor) -> list[int]:
        return [0, 1, 2, 3] if self.training else [3, 2, 1, 0, 3]


class Stops(Odd):
    """Stops after a number of blocks that depends on the data."""

    def order(self, tokens: Tensor) -> list[int]:
        return list(range(1 + int(tokens[0, 1]) % 4))


class Inner(Odd):
    """Calls the modules inside of blocks, never the blocks themselves."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = x + block.down(F.gelu(block.up(block.norm_1(x))))
        return self.head(self.norm(x)).float()


class Across(Odd):
    """A later block uses a parameter of an earlier block, and the head one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.head = nn.Linear(4 * WIDTH, VOCABULARY, bias=False)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.wide.weight = self.blocks[1].up.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.wide(self.norm(x))).float()


class FrozenBase(Odd):
    """Only every other block is trained, and a frozen one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        for index in (0, 2):
            self.blocks[index].requires_grad_(False)
        self.tokens.requires_grad_(False)

    def order(self, tokens: Tensor) -> list[int]:
        return [0, 1, 2, 3, 0]


class ReturnsParameter(Odd):
    """A block that returns its own parameter."""

    class Giver(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), self.norm_1.weight

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = self.Giver()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.tokens(tokens))
        x, scale = self.blocks[1](x)
        x = self.blocks[3](self.blocks[2](x)) * scale
        return self.head(self.norm(x)).float()


class UsesFromOutside(Odd):
    """The model itself uses a block's parameter."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.blocks[0].norm_1.weight.sum()


class ChangesInPlace(Odd):
    """Changes in place a tensor that backward needs."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = x.exp()
        y += 1
        return self.head(self.norm(self.blocks[0](y))).float()


def penalised_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """With a penalty on all parameters, outside of any module's forward."""
    loss, weight = next_token_loss(model, tokens)
    return loss / weight + sum(param.float().square().sum() for param in model.parameters())


class Turns(nn.Module):
    """Multiplies pairs of activations by complex numbers, with views that torch computes on reading."""

    def __init__(self, linear: nn.Module, *, as_real: bool) -> None:
        super().__init__()
        value = torch.polar(torch.ones(2 * WIDTH), torch.linspace(0, 1, 2 * WIDTH))
        self.linear, self.turns = linear, nn.Parameter(torch.view_as_real(value) if as_real else value)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(self.linear(x).unflatten(-1, (-1, 2)))
        turns = self.turns if self.turns.is_complex() else torch.view_as_complex(self.turns)
        back = turns.conj()
        return torch.view_as_real(y * turns + y * back * back.imag).flatten(-2)


class ComplexViews(Odd):
    """Uses parameters as complex numbers: views of another dtype, some of them conjugated or negated."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up = Turns(block.up, as_real=True)


def recipe_of(model: Callable[[], nn.Module], precision: str = "fp32", **options: Any) -> mh.Recipe:
    """The GPT's recipe with another model, and 6 micro-batches a step."""
    return gpt_recipe(precision, **({"model": model, "batch": SMALL_BATCH} | options))


ODD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (Odd, Twice, Shared, Backwards, Skips, Chooses, Stops, Inner, Across, FrozenBase, ComplexViews)
}
