"""Models with unusual features have the same bits with any number of workers and any sharding (workers as threads)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.errors import ConfigError
from oracle import oracle_run
from support.models import (
    GPT_UNITS,
    ConvNet,
    Tokens,
    conv_recipe,
    gpt_recipe,
    next_token_loss,
    padded_recipe,
    partly_used_recipe,
)
from support.threads import run_threads
from support.training import Outcome, train_with_engine

STEPS = 3
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")
RECIPES: dict[str, Callable[[str], mh.Recipe]] = {
    "conv": conv_recipe,
    "partly used": partly_used_recipe,
    "padded": padded_recipe,
    "gpt": gpt_recipe,
}


def outcomes(recipe: mh.Recipe, strategy: mh.Strategy, workers: int) -> list[Outcome]:
    """Return the outcome of every worker."""
    return run_threads(workers, lambda group: train_with_engine(recipe, strategy, steps=STEPS, group=group))


@cache
def expected_of(model: str, precision: str) -> tuple[mh.Recipe, Outcome]:
    """Return the recipe and the outcome of one worker, which has the oracle's digest."""
    recipe = RECIPES[model](precision)
    expected = train_with_engine(recipe, mh.Strategy(), steps=STEPS)
    assert expected.digest == oracle_run(recipe, STEPS).digests[-1]
    return recipe, expected


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Compare digest, loss and norm of every step, and buffers."""
    assert found.digest == expected.digest
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in found.buffers.items():
        assert torch.equal(buffer, expected.buffers[name]), name


QUICK = {("zero3", 1), ("zero1", 2), ("zero3", 2), ("ddp", 3), ("zero2", 3)}
"""Each sharding, and each number of workers; other pairs are slow."""


@pytest.mark.parametrize(
    ("sharding", "workers"),
    [pytest.param(*way, marks=() if way in QUICK else pytest.mark.slow) for way in product(SHARDINGS, (1, 2, 3))],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["conv", "partly used", "padded"])
def test_the_same_bits_with_one_two_and_three_workers(model: str, precision: str, sharding: str, workers: int) -> None:
    recipe, expected = expected_of(model, precision)
    for found in outcomes(recipe, mh.Strategy(sharding=sharding), workers):
        assert_same(found, expected)


QUICK_GPT = {("fp32", "zero2", 8), ("bf16", "zero3", 8), ("bf16", "zero2", 3)}
SLOW_GPT = {*product(["fp32", "bf16"], SHARDINGS, [8]), *product(["fp32", "bf16"], ["zero2"], [2, 3, 5])} - QUICK_GPT


@pytest.mark.parametrize(
    ("precision", "sharding", "workers"),
    [*sorted(QUICK_GPT), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW_GPT))],
)
def test_eight_workers_train_the_gpt_to_the_bits_of_one(precision: str, sharding: str, workers: int) -> None:
    recipe, expected = expected_of("gpt", precision)
    for found in outcomes(recipe, mh.Strategy(sharding=sharding, units=GPT_UNITS), workers):
        assert_same(found, expected)


def test_as_many_workers_as_micro_batches_and_no_more() -> None:
    recipe = gpt_recipe(batch=mh.Batch(global_size=6, micro_size=2))
    expected = train_with_engine(recipe, mh.Strategy(), steps=STEPS)
    for found in outcomes(recipe, mh.Strategy(), 3):
        assert_same(found, expected)
    with pytest.raises(ConfigError, match="4 workers are too many for a step of 3 micro-batches"):
        outcomes(recipe, mh.Strategy(), 4)


class ConvNetWithFrozenStem(ConvNet):
    """A model whose first convolution isn't trained, though its batch norm's statistics change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1.weight.requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_are_used_and_do_not_change(precision: str) -> None:
    recipe = conv_recipe(precision, model=ConvNetWithFrozenStem)
    expected = train_with_engine(recipe, mh.Strategy(), steps=STEPS)
    assert expected.digest == oracle_run(recipe, STEPS).digests[-1]
    for found in outcomes(recipe, mh.Strategy(), 3):
        assert_same(found, expected)


class Counting(nn.Module):
    """A model that replaces its buffers several times in a forward; one of them has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("limits", torch.tensor([-1.0, 1.0]))
        self.other = nn.Module()
        self.other.register_buffer("limits", self.limits)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for part in x.detach().float().chunk(2):
            self.mean = 0.9 * self.mean + 0.1 * part.mean((0, 1))
        self.calls = self.calls + 1
        return self.head((x - self.mean.to(x.dtype)).clamp(*self.other.limits.tolist())).float()


def test_buffers_that_a_model_replaces_have_the_same_bits() -> None:
    recipe = gpt_recipe(model=Counting, loss=next_token_loss, data=Tokens(), buffers={"mean": "mean"})
    expected = train_with_engine(recipe, mh.Strategy(), steps=STEPS)
    assert expected.buffers["calls"] == STEPS
    assert bool(expected.buffers["mean"].abs().sum() > 0)
    for workers in (2, 3):
        for found in outcomes(recipe, mh.Strategy(), workers):
            assert_same(found, expected)


def test_two_dtypes_in_one_block_are_two_units_and_both_are_trained() -> None:
    """bf16 with batch norm inside a repeated child: convolutions in bf16, batch norm in fp32."""

    def model() -> torch.nn.Module:
        def block(channels: int) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())

        return torch.nn.Sequential(block(3), block(8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    recipe = mh.Recipe(
        model=model,
        loss=lambda model, batch: model(batch.bfloat16()).float().square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        data=[torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(index)) for index in range(24)],
        batch=mh.Batch(global_size=24, micro_size=4),
        precision="bf16",
    )

    def work(group: Group, sharding: str) -> tuple[str, tuple[str, ...]]:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
            before = engine.full_state_dict()
            for batch in engine.batches(2):
                engine.step(batch)
            after = engine.full_state_dict()
            return engine.digest(), tuple(name for name in before if torch.equal(before[name], after[name]))

    found = {
        outcome
        for workers in (1, 2, 3)
        for sharding in SHARDINGS
        for outcome in run_threads(workers, lambda group, sharding=sharding: work(group, sharding))  # type: ignore[misc]
    }
    assert len(found) == 1
    ((_, unchanged),) = found
    assert unchanged == ()
