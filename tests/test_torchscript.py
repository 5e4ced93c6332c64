"""Scripted and traced code has the bits of the Python code that it was made from, with any number of workers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from support.threads import run_threads
from support.training import train_with_engine

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * torch.sigmoid(x)
        return torch.softmax(self.linear(x) * x, -1) + F.dropout(x, 0.2, self.training)


class Net(nn.Module):
    """kind: "python", "scripted" or "traced"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make = {"python": Block, "scripted": lambda: torch.jit.script(Block()), "traced": self.traced}[kind]
        self.blocks = nn.ModuleList(make() for _ in range(2))  # type: ignore[operator]
        self.gelu = torch.jit.script(gelu) if kind == "scripted" else gelu

    @staticmethod
    def traced() -> nn.Module:
        block: nn.Module = torch.jit.trace(Block(), torch.ones(2, 64), check_trace=False)
        return block

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.gelu(block(x))
        return x


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(batch[0].to(dtype)).float() - batch[0]).square().mean()


def recipe_of(kind: str, precision: str) -> mh.Recipe:
    return mh.Recipe(
        model=lambda: Net(kind),
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        data=torch.utils.data.TensorDataset(torch.randn(24, 64, generator=torch.Generator().manual_seed(0))),
        batch=mh.Batch(global_size=12, micro_size=2),
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scripted_code_has_the_bits_of_python_with_any_workers(precision: str) -> None:
    expected = train_with_engine(recipe_of("python", precision), mh.Strategy(), steps=2).digest
    for workers, sharding in ((1, "ddp"), (2, "zero2"), (3, "zero3")):
        recipe, strategy = recipe_of("scripted", precision), mh.Strategy(sharding=sharding)
        for outcome in run_threads(
            workers, lambda group, recipe=recipe, by=strategy: train_with_engine(recipe, by, steps=2, group=group)
        ):
            assert outcome.digest == expected
    alone = mh.Strategy(sharding="zero3", transport="distributed", units=("blocks.0", "blocks.1"))
    checkpointed = mh.Strategy(activation_checkpointing=("blocks.*",))
    for strategy in (alone, checkpointed):
        assert train_with_engine(recipe_of("scripted", precision), strategy, steps=2).digest == expected


def test_traced_code_has_the_same_bits_with_any_workers() -> None:
    expected = train_with_engine(recipe_of("traced", "fp32"), mh.Strategy(), steps=2).digest
    recipe = recipe_of("traced", "fp32")
    for outcome in run_threads(3, lambda group: train_with_engine(recipe, mh.Strategy(), steps=2, group=group)):
        assert outcome.digest == expected
