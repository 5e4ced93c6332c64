"""Sharded parameters: unsharded for any order in which a model uses its units; unsupported uses are refused."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.engine.units.params import ShardedParams
from manyhands.errors import ConfigError, NumericsError
from manyhands.launching.launcher import run_workers
from oracle import oracle_run
from support.models import gpt_recipe, muon_and_adamw
from support.odd_models import (
    ODD,
    UNITS,
    Backwards,
    ChangesInPlace,
    Chooses,
    EvaluatesOtherwise,
    Odd,
    ReturnsParameter,
    Twice,
    UsesFromOutside,
    penalised_loss,
    recipe_of,
)
from support.shared_runs import folder_of_all_processes, made_once
from support.training import train_with_engine
from support.zero3_worker import OPTIMIZERS, ORDERED, STEPS, jobs

# With `--dist loadgroup`, one process runs all tests of this file. Two would wait for the same results.
pytestmark = pytest.mark.xdist_group("zero3")

WORKER = Path(__file__).parent / "support" / "zero3_worker.py"


def alone(**options: Any) -> mh.Strategy:
    """Return a strategy for one worker with a process group, which unshards all units by collective calls."""
    return mh.Strategy(sharding="zero3", transport="distributed", units=UNITS, **options)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the workers have written their results."""

    def make(folder: Path) -> None:
        paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        run_workers(
            [sys.executable, str(WORKER), str(folder)],
            workers=request.param,
            environment={"PYTHONPATH": os.pathsep.join(paths)},
            log_dir=folder,
        )

    return made_once(folder_of_all_processes(tmp_path_factory, "zero3") / str(request.param), make)


def test_models_with_any_order_of_units_have_the_oracles_bits(found: Path) -> None:
    digests = [json.loads(path.read_text()) for path in sorted(found.glob("worker-*.json"))]
    oracle = cache(lambda name, precision: oracle_run(recipe_of(ODD[name], precision), STEPS).digests[-1])
    expected = {f"{name}, {way}": oracle(name, precision) for name, way, precision in jobs(len(digests))}
    for rank, theirs in enumerate(digests):
        assert theirs == expected, f"worker {rank}"


def test_a_worker_may_evaluate_more_often_than_another_one(found: Path) -> None:
    values = [json.loads(path.read_text()) for path in sorted(found.glob("evaluated-*.json"))]
    with mh.Engine(recipe_of(Backwards), mh.Strategy()) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
        with engine.evaluating() as model, torch.no_grad():
            expected = float(model.eval()(torch.arange(8).view(1, 8)).sum())
    assert values == [0.0, *[expected] * (len(values) - 1)]


def test_step_hooks_and_values_outside_of_the_state_have_the_oracles_bits(found: Path) -> None:
    expected = {name: oracle_run(recipe, STEPS).digests[-1] for name, (recipe, _) in OPTIMIZERS.items()}
    workers = [json.loads(path.read_text()) for path in sorted(found.glob("optimizers-*.json"))]
    assert len(workers) > 1
    assert all(digests == expected for digests in workers)


def test_an_evaluation_in_another_order_does_not_change_later_steps(found: Path) -> None:
    expected = oracle_run(recipe_of(EvaluatesOtherwise), STEPS + 1).digests[-1]
    workers = [json.loads(path.read_text()) for path in sorted(found.glob("evaluations-*.json"))]
    assert len(workers) > 1
    for without, evaluated in workers:
        assert without["digest"] == evaluated["digest"] == expected
        assert without["calls"] == evaluated["calls"]


@pytest.mark.parametrize("sharding", ORDERED)
def test_all_workers_send_units_in_one_order_though_gradients_arrive_in_others(sharding: str, found: Path) -> None:
    workers = [json.loads(path.read_text())[sharding] for path in sorted(found.glob("orders-*.json"))]
    rounds = list(zip(*(worker["arrived"] for worker in workers), strict=False))
    assert any(one != other for one, other, *_ in rounds)  # otherwise the test proves nothing
    expected = oracle_run(recipe_of(Chooses), STEPS).digests[-1]
    assert [worker["digest"] for worker in workers] == [expected] * len(workers)
    sent = [tag.split(" / ")[:2] for tag in workers[0]["sent"]]
    assert all(worker["sent"] == workers[0]["sent"] for worker in workers)
    orders = [[unit for _, unit in several] for _, several in groupby(sent, key=lambda tag: tag[0])]
    if sharding != "ddp":  # sends sums once a step, all sums of a unit together
        assert all(order == orders[0] for order in orders)
        assert len(set(orders[0])) == len(orders[0]) > len(UNITS)


@pytest.mark.parametrize("ahead", [0, 1])
def test_no_more_units_are_unsharded_than_needed(ahead: int) -> None:
    with mh.Engine(recipe_of(Odd), alone(unshard_ahead=ahead)) as engine:
        pool = next(unit.params for unit in engine.units if isinstance(unit.params, ShardedParams))._pool
        always = sum(unit.layout.padded_numel for unit in engine.units if not unit.modules)
        block = engine.units[-2].layout.padded_numel
        assert len([unit for unit in engine.units if unit.modules]) == 4
        for batch in engine.batches(2):
            engine.step(batch)
        assert pool.num_bytes <= 4 * (
            always + block * (1 + ahead) + block
        )  # the previous one is resharded after the next one


class Scaled(nn.Module):
    """A block whose backward needs a parameter of each of its two units in one autograd node."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(nn.functional.linear(x, self.weight * self.scale))


class ScaledStack(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))


def test_units_of_one_block_are_unsharded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(ScaledStack, optimizer=muon_and_adamw())
    with mh.Engine(recipe, alone(unshard_ahead=1)) as engine:
        assert len([unit for unit in engine.units if "blocks.0" in unit.modules]) == 2
        requests = requests_of(engine, monkeypatch, STEPS)
        assert engine.digest() == oracle_run(recipe, STEPS).digests[-1]
    assert requests[-1] == len(engine.my_micro_batches(0))


def test_the_second_step_has_a_plan_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with mh.Engine(recipe_of(Twice), alone()) as engine:
        requests = requests_of(engine, monkeypatch, 3)
        assert requests[0] > requests[1] == requests[2] == len(engine.my_micro_batches(0))


def requests_of(engine: mh.Engine, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[int]:
    """Number of rounds of requests by step: one per micro-batch if the plan had all units that were needed."""
    tags: list[str] = []
    group = engine._unsharder._group
    gather = group.all_gather_small
    monkeypatch.setattr(group, "all_gather_small", lambda small, tag: (tags.append(tag), gather(small, tag))[1])
    for batch in engine.batches(steps):
        engine.step(batch)
    return [sum(tag.startswith(f"step {step},") and "request" in tag for tag in tags) for step in range(1, steps + 1)]


def test_between_steps_parameters_take_no_memory_and_the_model_can_be_unsharded() -> None:
    recipe = gpt_recipe(model=Odd)
    with mh.Engine(recipe, alone()) as engine:
        state = engine.full_state_dict()
        assert all(bool(param.isnan().all()) for param in engine.model.parameters())
        assert all(set(param.stride()) == {0} for param in engine.model.parameters())
        with pytest.raises(ConfigError, match="can be used only during a step") as caught:
            engine.model(torch.zeros(1, 4, dtype=torch.int64))
        assert "evaluating" in str(caught.value.hint)
        with engine.unsharded_model() as model:
            found = model.eval()(torch.zeros(1, 4, dtype=torch.int64))
            assert engine.full_state_dict().keys() == state.keys()  # also in there
        assert next(unit.params for unit in engine.units if isinstance(unit.params, ShardedParams))._pool.num_bytes == 0
        with engine.evaluating() as model:
            again = model(torch.zeros(1, 4, dtype=torch.int64))
    plain = recipe.model()
    plain.load_state_dict(state)
    assert torch.equal(found, plain.eval()(torch.zeros(1, 4, dtype=torch.int64)))
    assert torch.equal(again, found)


def test_a_module_that_returns_its_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unit 'blocks\.1' returns its own parameter"):
        train_with_engine(recipe_of(ReturnsParameter), alone(), steps=1)


@pytest.mark.parametrize("recipe", [recipe_of(UsesFromOutside), gpt_recipe(model=Odd, loss=penalised_loss)])
def test_a_parameter_used_outside_of_its_unit_is_refused(recipe: mh.Recipe) -> None:
    with pytest.raises(NumericsError, match="loss of micro-batch 0 is nan") as caught:
        train_with_engine(recipe, alone(), steps=1)
    assert "outside" in str(caught.value.hint)


def test_a_tensor_changed_in_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="was changed in place"):
        train_with_engine(recipe_of(ChangesInPlace), alone(), steps=1)


def test_activation_checkpointing_requires_existing_modules() -> None:
    with pytest.raises(ConfigError, match="matches no module") as caught:
        train_with_engine(recipe_of(Odd), alone(activation_checkpointing=("block.*",)), steps=1)
    assert "blocks" in str(caught.value.hint)


class DrawsEverywhere(nn.Module):
    """Draws from every generator, and counts in a buffer that its result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import random

        import numpy as np

        self.calls += 1
        x = self.linear(x) * (1 + self.calls.to(x.dtype)) * random.random() * float(np.random.rand())
        return nn.functional.dropout(x, 0.5, self.training)


def test_recomputed_forwards_draw_the_same_numbers_and_update_buffers_once() -> None:
    def model() -> nn.Module:
        made = Odd()
        made.blocks[1] = DrawsEverywhere()
        return made

    recipe = recipe_of(model)
    expected = oracle_run(recipe, STEPS)
    for strategy in (
        mh.Strategy(activation_checkpointing=("blocks.*",)),
        alone(activation_checkpointing=("blocks.*",)),
    ):
        found = train_with_engine(recipe, strategy, steps=STEPS)
        assert found.digest == expected.digests[-1]
        assert torch.equal(found.buffers["blocks.1.calls"], expected.buffers["blocks.1.calls"])


class KeepsAView(torch.autograd.Function):
    """x @ w.T, which stores its weight in a way that autograd doesn't know."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.x, ctx.transposed = x, weight.t()
        return x @ ctx.transposed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad @ ctx.transposed.t(), grad.flatten(0, -2).t() @ ctx.x.flatten(0, -2)


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(KeepsAView.apply(x, self.weight))


class Stack(nn.Module):
    """All blocks in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(61, 32)
        self.encoder = nn.Sequential(*(Keeper() for _ in range(4)))
        self.head = nn.Linear(32, 61)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.tokens(tokens))).float()


@pytest.mark.parametrize("checkpointed", [(), ("encoder",), ("encoder.*",)])
def test_views_of_a_units_buffer_retain_their_values(checkpointed: tuple[str, ...]) -> None:
    recipe = recipe_of(Stack)
    units = tuple(f"encoder.{index}" for index in range(4))
    strategy = mh.Strategy(
        sharding="zero3", transport="distributed", units=units, activation_checkpointing=checkpointed
    )
    assert train_with_engine(recipe, strategy, steps=STEPS).digest == oracle_run(recipe, STEPS).digests[-1]
