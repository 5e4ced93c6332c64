"""Random models of awkward parts have the bits of plain PyTorch, with any workers, sharding and transport.

The parts are those by which models have been trained wrongly: dropout, statistics, counters and other buffers, scripted
code, recomputed, shared, skipped and unused blocks, weights that are computed in forward, hooks, frozen parameters at
any address, copies that follow a weight, and draws from every generator. Between the steps of some runs the model is
evaluated, which must change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manyhands as mh
from manyhands.comm.group import Group
from oracle import oracle_run
from support.threads import run_threads

WIDTH, STEPS = 8, 2
SAMPLES = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:forward changes the buffer", "ignore:.*buffer.*:UserWarning"
)


class Dropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))


class Counts(nn.Module):
    """A counter that forward uses, a running mean, and a buffer that isn't saved."""

    calls: Tensor
    mean: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.last.copy_(x.detach().amax(0))
        return self.linear(x - self.mean) / (1 + self.calls) + self.last


class Draws(nn.Module):
    """Skips its layer at random, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.4:
            return x
        return self.linear(x) * float(np.random.rand()) + torch.rand(WIDTH)


class Recomputed(nn.Module):
    """Two blocks of one shared module, recomputed as the model's author chose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Dropout()

    def twice(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.twice, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return result


class Branches(nn.Module):
    """Uses one of two layers, as the data decide; a third one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.either = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.either[int(x.detach().sum() > 0)](x)
        return result


class Frozen(nn.Module):
    """A frozen layer whose weight starts at an odd address."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        memory = np.zeros(WIDTH * WIDTH + 3, dtype=np.float32)[3:]
        self.layer.weight.data = torch.from_numpy(memory).view(WIDTH, WIDTH).copy_(self.layer.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Hooked(nn.Module):
    """A hook adds noise to its layer's result, and another one scales its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.register_forward_hook(lambda module, args, result: result + torch.rand(WIDTH) / 10)
        self.layer.weight.register_hook(lambda grad: grad * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)))
    return module


def normalized(method: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return method(nn.Linear(WIDTH, WIDTH))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": partial(nn.Linear, WIDTH, WIDTH),
    "dropout": Dropout,
    "batch norm": Normed,
    "buffers": Counts,
    "draws": Draws,
    "recomputed": Recomputed,
    "branches": Branches,
    "frozen": Frozen,
    "hooks": Hooked,
    "scripted": scripted,
    "weight norm": partial(normalized, torch.nn.utils.parametrizations.weight_norm),
    "spectral norm": partial(normalized, torch.nn.utils.parametrizations.spectral_norm),
    "orthogonal": partial(normalized, torch.nn.utils.parametrizations.orthogonal),
}


class Random(nn.Module):
    """Blocks of `parts`. tied: the first block is used again at the end. glue: draw random numbers between blocks."""

    def __init__(self, parts: tuple[str, ...], tied: bool, glue: bool) -> None:
        super().__init__()
        blocks = [PARTS[name]() for name in parts]
        self.blocks = nn.ModuleList([*blocks, blocks[0]] if tied else blocks)
        self.head, self.glue = nn.Linear(WIDTH, WIDTH), glue

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
            if self.glue:
                x = F.dropout(x, 0.1, self.training)
        return self.head(x)  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[0]).square().mean()


def recipe_of(parts: tuple[str, ...], tied: bool, glue: bool, adam: bool) -> mh.Recipe:
    return mh.Recipe(
        model=partial(Random, parts, tied, glue),
        loss=loss,
        optimizer=partial(torch.optim.AdamW, lr=0.01) if adam else partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        data=torch.utils.data.TensorDataset(SAMPLES),
        batch=mh.Batch(global_size=20, micro_size=4),
        seed=len(parts),
    )


def evaluate(engine: mh.Engine, model: nn.Module) -> None:
    """Differently on each worker, also in training mode."""
    for _ in range(engine.group.rank):
        model(SAMPLES[:4])
    model.train(engine.group.rank == 1)
    model(SAMPLES[:4])


def run(recipe: mh.Recipe, strategy: mh.Strategy, evaluates: bool, group: Group | None = None) -> dict[str, object]:
    with mh.Engine(recipe, strategy, group) as engine:
        for batch in engine.batches(STEPS):
            if evaluates:
                with engine.evaluating() as model:
                    evaluate(engine, model)
            engine.step(batch)
        return {"digest": engine.digest()} | {
            name: (buffer.dtype, buffer.flatten().tolist()) for name, buffer in engine.model.named_buffers()
        }


@cache
def many() -> tuple[tuple[int, mh.Strategy], ...]:
    alone = partial(mh.Strategy, transport="distributed")
    return (
        (1, mh.Strategy()),
        (2, mh.Strategy(sharding="zero2")),
        (3, mh.Strategy(sharding="zero3")),
        (1, alone(sharding="zero3", units=("blocks.0", "head"))),
        (1, alone(sharding="zero3", activation_checkpointing=("blocks.*",))),
    )


def check(parts: tuple[str, ...], tied: bool, glue: bool, adam: bool, evaluates: bool) -> None:
    recipe = recipe_of(parts, tied, glue, adam)
    oracle = oracle_run(recipe, STEPS)
    expected = {"digest": oracle.digests[-1]} | {
        name: (buffer.dtype, buffer.flatten().tolist()) for name, buffer in oracle.buffers.items()
    }
    for workers, strategy in many():
        if workers == 1:
            found = [run(recipe, strategy, evaluates)]
        else:
            found = run_threads(workers, partial(run, recipe, strategy, evaluates))  # type: ignore[arg-type]
        for result in found:
            assert result == expected, (workers, strategy)


models = {
    "parts": st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4).map(tuple),
    "tied": st.booleans(),
    "glue": st.booleans(),
    "adam": st.booleans(),
    "evaluates": st.booleans(),
}
checks = partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_the_bits_of_plain_pytorch(part: str) -> None:
    check((part, "linear"), tied=False, glue=False, adam=True, evaluates=True)


@checks(max_examples=6)
@given(**models)
def test_random_models_have_the_bits_of_plain_pytorch(**drawn: object) -> None:
    check(**drawn)  # type: ignore[arg-type]


@pytest.mark.slow
@checks(max_examples=150)
@given(**models)
def test_many_random_models_have_the_bits_of_plain_pytorch(**drawn: object) -> None:
    check(**drawn)  # type: ignore[arg-type]
