"""Evaluation between steps changes nothing: modes, buffers, generators, and the bits of later steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from support.threads import run_threads, thread_groups

SAMPLES = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
STEPS = 4


class Net(nn.Module):
    """Dropout, batch norm, and a buffer that every forward changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layers(x)
        return out


def recipe_of(model: Callable[[], nn.Module] = Net, **changes: Any) -> mh.Recipe:
    return mh.Recipe(
        model=model,
        loss=lambda model, batch: (model(batch) - batch).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=torch.utils.data.TensorDataset(SAMPLES),
        collate=lambda samples: torch.stack([sample[0] for sample in samples]),
        batch=mh.Batch(global_size=12, micro_size=4),
        **changes,
    )


def buffers_of(engine: mh.Engine) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


def run(group: Group | None, sharding: str, evaluate: Callable[[mh.Engine, nn.Module], object] | None) -> Any:
    with mh.Engine(recipe_of(), mh.Strategy(sharding=sharding), group) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
            if evaluate is not None:
                with engine.evaluating() as model:
                    evaluate(engine, model)
        return engine.digest(), buffers_of(engine)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_worker_0(engine: mh.Engine, model: nn.Module) -> None:
    if engine.group.rank == 0:
        model(SAMPLES)


def in_training_mode(engine: mh.Engine, model: nn.Module) -> None:
    """Monte Carlo dropout, say."""
    model.train()
    for _ in range(engine.group.rank + 1):
        model(SAMPLES)
        torch.rand(3), random.random(), np.random.rand()


def replaces_a_buffer(engine: mh.Engine, model: nn.Module) -> None:
    model.calls = torch.full((1,), 7.0)


@pytest.mark.parametrize("evaluate", [on_worker_0, in_training_mode, replaces_a_buffer])
@pytest.mark.parametrize(("workers", "sharding"), [(1, "ddp"), (2, "zero2"), (3, "zero3")])
def test_evaluating_changes_neither_buffers_nor_later_steps(
    evaluate: Callable[[mh.Engine, nn.Module], object], workers: int, sharding: str
) -> None:
    digest, buffers = run(None, "zero2", None)
    for found in run_threads(workers, lambda group: run(group, sharding, evaluate), makers=thread_groups(workers)):
        assert found[0] == digest
        assert equal(found[1], buffers)


class Caching(Net):
    """Changes attributes of all kinds in evaluation mode, and reads them in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.log = torch.zeros(8), list[int]()
        self.mixed = [torch.ones(1).expand(8), {"count": 0}, (np.zeros(2), self.layers)]
        self.config = SimpleNamespace(scale=1.0)
        self.removed = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.cache += 1
            self.mask = torch.ones(8)
            self.mixed[1]["count"] += 1  # type: ignore[index]
            self.mixed[2][0][1] = 3.0  # type: ignore[index]
            self.config.scale = 2.0
            self.log.append(len(x))
            vars(self).pop("removed", None)
        used = [*self.mixed[1].values(), *self.mixed[2][0]]  # type: ignore[index, union-attr]
        factor = self.config.scale + sum(used) + hasattr(self, "mask") + getattr(self, "removed", 0.0)
        return super().forward(x) * factor + self.cache


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_later_steps_do_not_depend_on_attributes_that_an_evaluation_changed(sharding: str) -> None:
    def train(evaluate: bool) -> tuple[str, list[int]]:
        recipe = recipe_of(Caching, attributes={"log": "keep"})
        with mh.Engine(recipe, mh.Strategy(sharding=sharding)) as engine:
            for batch in engine.batches(3):
                with engine.evaluating() as model:
                    if evaluate:
                        model(SAMPLES)
                engine.step(batch)
            return engine.digest(), engine.model.log  # type: ignore[return-value]

    digest, log = train(False)
    assert train(True) == (digest, [len(SAMPLES)] * 3)
    assert log == []


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_evaluating_evaluates(sharding: str) -> None:
    with mh.Engine(recipe_of(), mh.Strategy(sharding=sharding)) as engine:
        for batch in engine.batches(2):
            engine.step(batch)
        state = engine.full_state_dict()
        with engine.evaluating() as model:
            assert not any(module.training for module in model.modules())
            first, again = model(SAMPLES), model(SAMPLES)
    plain = Net().eval()
    plain.load_state_dict(state)
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert torch.equal(first, plain(SAMPLES))


@pytest.mark.parametrize("before", [True, False])
def test_every_module_has_its_own_mode_after_evaluating(before: bool) -> None:
    with mh.Engine(recipe_of(), mh.Strategy()) as engine:
        engine.model.train(before)
        engine.model.layers[2].train(not before)  # type: ignore[index, union-attr]
        modes = [module.training for module in engine.model.modules()]
        for _ in range(2):
            with engine.evaluating() as model:
                model.layers.train()  # type: ignore[union-attr, operator]
            assert [module.training for module in engine.model.modules()] == modes
        with pytest.raises(ZeroDivisionError), engine.evaluating():
            raise ZeroDivisionError
        assert [module.training for module in engine.model.modules()] == modes


def test_evaluating_leaves_generators_as_they_were() -> None:
    with mh.Engine(recipe_of(), mh.Strategy()) as engine:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = torch.rand(1), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        with engine.evaluating():
            torch.rand(5), random.random(), np.random.rand()
        assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_a_step_trains_whatever_mode_the_caller_left() -> None:
    with mh.Engine(recipe_of(lambda: Net().eval()), mh.Strategy()) as engine:
        for batch in engine.batches(2):
            engine.model.eval()
            engine.step(batch)
        assert int(buffers_of(engine)["layers.1.num_batches_tracked"]) == 2


def test_only_forwards_are_allowed_inside_of_evaluating(tmp_path: Any) -> None:
    with mh.Engine(recipe_of(), mh.Strategy()) as engine:
        batches = engine.batches(2)
        engine.step(next(batches))
        checkpoint, digest = engine.save(tmp_path), engine.digest()
        uses: list[Callable[[], object]] = [
            lambda: engine.step(next(batches)),
            lambda: engine.load(checkpoint),
            lambda: engine.save(tmp_path / "inside"),
            engine.digest,
            engine.full_state_dict,
            lambda: engine.evaluating().__enter__(),
        ]
        with engine.evaluating() as model:
            model.train()
            model(SAMPLES)
            for use in uses:
                with pytest.raises(mh.ConfigError, match="can't be used inside evaluating"):
                    use()
        assert engine.digest() == digest
