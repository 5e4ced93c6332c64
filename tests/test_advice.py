"""What is refused comes with advice that works: the advised model has plain PyTorch's bits with every strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import manyhands as mh
from oracle import oracle_run
from support.models import GPT, GPT_UNITS, WIDTH, gpt_recipe
from support.odd_models import Turns
from support.threads import run_threads
from support.training import train_with_engine

SHARDED = mh.Strategy(sharding="zero3", transport="distributed", units=GPT_UNITS)
"""One worker with a process group: it unshards its parameters on demand."""


class Changed(GPT):
    """The GPT, with a change to the first linear layer of each block's feed-forward network."""

    def __init__(self, change: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        for block in self.blocks:
            change(block)


class WeightDrop(nn.Module):
    """Drops elements of another module's weight, as AWD-LSTM does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, raw = module, module.weight
        del module.weight
        module.register_parameter("weight_raw", nn.Parameter(raw.data))
        module.weight = raw.data

    def forward(self, x: Tensor) -> Tensor:
        self.module.weight = F.dropout(self.module.weight_raw, 0.3, self.training)
        return self.module(x)


def old_spectral_norm(block: nn.Module) -> None:
    nn.utils.spectral_norm(block.up)


def weight_drop(block: nn.Module) -> None:
    block.up = WeightDrop(block.up)


def complex_turns(block: nn.Module) -> None:
    block.up = Turns(block.up, as_real=False)


def double(block: nn.Module) -> None:
    block.double()


def real_turns(block: nn.Module) -> None:
    block.up = Turns(block.up, as_real=True)


def back_to_float(block: nn.Module) -> None:
    block.double().float()


CASES: dict[str, tuple[Callable[[nn.Module], Any], str, Callable[[nn.Module], Any]]] = {
    "spectral norm": (
        old_spectral_norm,
        "use torch.nn.utils.parametrizations.spectral_norm",
        lambda block: parametrizations.spectral_norm(block.up),
    ),
    "weight drop": (
        weight_drop,
        "can be a parametrization",
        lambda block: parametrize.register_parametrization(block.up, "weight", nn.Dropout(0.3)),
    ),
    "complex": (complex_turns, r"torch.view_as_real\(value\)", real_turns),
    "fp64": (double, r"call model.float\(\)", back_to_float),
}
"""What is refused, a part of the advice, and what is advised."""


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_model_that_an_error_advises_has_plain_pytorchs_bits(case: str) -> None:
    refused, advice, advised = CASES[case]
    with pytest.raises(mh.ConfigError, match=advice):
        mh.Engine(gpt_recipe(model=lambda: Changed(refused)))
    recipe = gpt_recipe(model=lambda: Changed(advised))
    expected = oracle_run(recipe, 2).digests[-1]
    assert train_with_engine(recipe, SHARDED, steps=2).digest == expected
    for workers, sharding in ((2, "zero2"), (3, "zero3")):
        strategy = mh.Strategy(sharding=sharding, units=GPT_UNITS)
        found = run_threads(workers, lambda group, s=strategy: train_with_engine(recipe, s, steps=2, group=group))
        assert {outcome.digest for outcome in found} == {expected}


class Averaging(GPT):
    """The GPT, with an average of its first block that `forward` updates but the loss does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, width)
        parts = nn.ModuleList([self.wide, self.blocks[0]])
        self.average = copy.deepcopy(parts).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            current = [*self.wide.parameters(), *self.blocks[0].parameters()]
            for mean, param in zip(self.average.parameters(), current, strict=True):
                mean.lerp_(param, 0.1)
        logits = super().forward(tokens)
        return logits + self.wide(self.tokens(tokens)).mean()


@pytest.mark.parametrize(
    ("width", "strategy", "message"),
    [
        (8, SHARDED, r"frozen parameter 'average.1.norm_1.weight' became NaN in forward"),
        (4096, mh.Strategy(), r"parameter 'average.0.weight' was changed in place by[\s\S]*make it a buffer"),
    ],
)
def test_an_average_that_would_be_wrong_is_refused(width: int, strategy: mh.Strategy, message: str) -> None:
    recipe = gpt_recipe(model=lambda: Averaging(width))
    with pytest.raises(mh.ConfigError, match=message):
        train_with_engine(recipe, strategy, steps=1)
    if width == 8:  # parameters that are not sharded can be read anywhere
        train_with_engine(recipe, mh.Strategy(), steps=1)
