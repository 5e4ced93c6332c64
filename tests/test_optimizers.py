"""Optimizers that aren't torch's, and step hooks: plain PyTorch's bits, or an error before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.numerics.seeds import generators_state
from oracle import oracle_run
from support.models import GPT, GPT_UNITS, NamedParams, gpt_recipe
from support.optimizers import KEEPING_VALUES, hooked_recipe, keeping_recipe
from support.refused_optimizers import REFUSED
from support.threads import run_threads
from support.training import Outcome, train_with_engine

STEPS = 4


def adamw(named: NamedParams) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=3e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (index > 1)) for index, name in enumerate(KEEPING_VALUES)]
)
def test_values_outside_of_the_state_advance_once_in_a_step_and_are_resumed(name: str, tmp_path: Path) -> None:
    recipe = keeping_recipe(name)
    expected = oracle_run(recipe, STEPS)

    def trained(workers: int, sharding: str, **options: Any) -> set[str]:
        def work(group: Group) -> Outcome:
            strategy = mh.Strategy(sharding=sharding, units=GPT_UNITS)
            return train_with_engine(recipe, strategy, steps=STEPS, group=group, **options)

        return {outcome.digest for outcome in run_threads(workers, work)}

    assert trained(2, "zero2", save=tmp_path, save_at=2) == {expected.digests[-1]}
    assert trained(1, "ddp") == {expected.digests[-1]}
    assert trained(3, "zero3", load=tmp_path / "step-00000002") == {expected.digests[-1]}


HOOK_STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (1, {"sharding": "ddp"}),
    "zero2": (2, {"sharding": "zero2"}),
    "zero3": (3, {"sharding": "zero3"}),
    "zero3 on a disk": (2, {"sharding": "zero3", "offload": "disk"}),
    "zero3 by collective calls": (1, {"sharding": "zero3", "transport": "distributed"}),
}


@pytest.mark.parametrize("way", HOOK_STRATEGIES)
def test_step_hooks_run_once_in_a_step_on_full_parameters(way: str, tmp_path: Path) -> None:
    recipe, (workers, options) = hooked_recipe(), HOOK_STRATEGIES[way]
    strategy = mh.Strategy(units=("gpt.blocks.0", "gpt.blocks.1"), scratch=str(tmp_path), **options)

    def work(group: Group | None) -> Outcome:
        return train_with_engine(recipe, strategy, steps=3, group=group)

    expected = oracle_run(recipe, 3)
    assert expected.buffers["calls"].tolist() == [6, 12, 0]
    outcomes = [work(None)] if "transport" in options else run_threads(workers, work)
    assert {outcome.digest for outcome in outcomes} == {expected.digests[-1]}


@pytest.mark.parametrize(("factory", "kind", "text"), REFUSED)
def test_what_would_give_other_bits_or_could_not_be_saved_is_refused(factory: Any, kind: str, text: str) -> None:
    recipe = gpt_recipe(optimizer=lambda named: factory([param for _, param in named]), optimizer_kind=kind)
    before = generators_state()
    with pytest.raises(mh.ConfigError) as caught, mh.Engine(recipe):
        pass
    assert text in str(caught.value)
    assert before.equals(generators_state())


class Scaled(torch.optim.Optimizer):
    """Reads a factor from each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"] * getattr(param, "lr_scale", 1.0))


def test_a_step_reads_attributes_of_parameters() -> None:
    def model() -> torch.nn.Module:
        made = GPT()
        made.head.weight.lr_scale = 0.25
        return made

    def by_group(named: Any) -> torch.optim.Optimizer:
        scaled = [param for _, param in named if hasattr(param, "lr_scale")]
        rest = [param for _, param in named if not hasattr(param, "lr_scale")]
        return torch.optim.SGD([{"params": scaled, "lr": 0.125}, {"params": rest}], lr=0.5)

    def digest(workers: int, sharding: str, **options: Any) -> str:
        recipe, strategy = gpt_recipe(model=model, **options), mh.Strategy(sharding=sharding)
        return run_threads(workers, lambda group: train_with_engine(recipe, strategy, steps=2, group=group))[0].digest

    own = {"optimizer": lambda named: Scaled([param for _, param in named]), "optimizer_kind": "elementwise"}
    found = {digest(workers, sharding, **own) for workers, sharding in ((1, "ddp"), (3, "zero3"))}
    assert found == {digest(1, "ddp", optimizer=by_group)}


def reads_gradient(optimizer: torch.optim.Optimizer) -> None:
    for param in optimizer.param_groups[0]["params"]:
        if param.grad is not None:
            param.grad.clamp_(-1.0, 1.0)


def changes_parameter(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][-1].clamp_(-0.1, 0.1)


@pytest.mark.parametrize("moment", ["pre", "post"])
@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (reads_gradient, "uses the gradient of a parameter"),
        (changes_parameter, "was changed in place by code other than the optimizer"),
        (lambda optimizer: optimizer.state_dict(), "the state of the recipe's optimizer can't be used"),
        (lambda optimizer: len(optimizer.state), "the state of the recipe's optimizer can't be used"),
    ],
)
def test_step_hooks_that_would_differ_between_strategies_are_refused(hook: Any, text: str, moment: str) -> None:
    def factory(named: NamedParams) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([param for _, param in named], lr=0.1)
        getattr(optimizer, f"register_step_{moment}_hook")(lambda optimizer, args, kwargs: hook(optimizer) and None)
        return optimizer

    recipe = gpt_recipe(optimizer=factory, schedule=None)
    for strategy in (mh.Strategy(), mh.Strategy(sharding="zero3", transport="distributed", units=GPT_UNITS)):
        with pytest.raises(mh.ConfigError, match=text), mh.Engine(recipe, strategy) as engine:
            engine.step(next(engine.batches(1)))


class Adapted(nn.Module):
    """Two units, each with a frozen matrix that is large enough to be sharded, and a trainable bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300) for _ in range(2))
        for layer in self.layers:
            layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("moment", ["pre", "post"])
def test_step_hooks_read_sharded_frozen_parameters_and_must_not_replace_them(moment: str, tmp_path: Path) -> None:
    norms: list[float] = []
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(Adapted())
        return made[-1]

    def read(frozen: nn.Parameter) -> None:
        norms.append(float(frozen.norm()))

    def replace(frozen: nn.Parameter) -> None:
        frozen.data = frozen.data.clone()

    def train(hook: Callable[[nn.Parameter], None]) -> None:
        def optimizer(named: NamedParams) -> torch.optim.Optimizer:
            found = torch.optim.SGD([param for _, param in named], lr=0.1)
            register = getattr(found, f"register_step_{moment}_hook")
            register(lambda *_: hook(made[-1].get_parameter("layers.0.weight")))
            return found

        recipe = mh.Recipe(
            model=model,
            loss=lambda model, batch: model(batch).square().mean(),
            optimizer=optimizer,
            data=torch.utils.data.TensorDataset(torch.ones(8, 300)),
            collate=lambda samples: torch.stack([sample[0] for sample in samples]),
            batch=mh.Batch(global_size=2, micro_size=2),
        )
        strategy = mh.Strategy(sharding="zero3", offload="disk", units=("layers.0", "layers.1"), scratch=str(tmp_path))
        with mh.Engine(recipe, strategy) as engine:
            for batch in engine.batches(3):
                engine.step(batch)

    train(read)
    assert len(norms) == 3
    assert norms[0] > 0
    assert len(set(norms)) == 1
    with pytest.raises(mh.ConfigError, match=r"the data of parameter 'layers\.0\.weight' was replaced"):
        train(replace)


def test_step_hooks_of_all_optimizers_run_once_in_a_step() -> None:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: calls.append("before")),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: calls.append("after")),
    ]
    try:
        with mh.Engine(gpt_recipe()) as engine:
            for batch in engine.batches(2):
                engine.step(batch)
        assert calls == ["before", "after"] * 2
        torch.optim.AdamW([torch.zeros(1)])  # from now on, AdamW.step calls the hooks
        with pytest.raises(mh.ConfigError, match=r"Lookahead calls step hooks that are registered for all optimizers"):
            mh.Engine(keeping_recipe("Lookahead"))
    finally:
        for handle in handles:
            handle.remove()


class Noting(LambdaLR):
    """A schedule that adds entries to the param groups, and replaces a None and a list."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups if self.last_epoch else ():
            group["noted"] = [*group.get("noted", []), self.last_epoch]
            group["pair"] = (self.last_epoch, {"lr": group["lr"]})
            group["foreach"] = False if self.last_epoch > 1 else None


def test_param_group_entries_that_a_schedule_adds_are_resumed(tmp_path: Path) -> None:
    recipe = gpt_recipe(schedule=lambda optimizer: Noting(optimizer, lambda step: 0.9**step), optimizer=adamw)
    expected = train_with_engine(recipe, mh.Strategy(), steps=3).digest
    train_with_engine(recipe, mh.Strategy(), steps=2, save=tmp_path)
    with mh.Engine(recipe) as engine:
        engine.load(tmp_path / "step-00000002")
        for batch in engine.batches(3):
            engine.step(batch)
        assert engine.digest() == expected
        (group,) = engine.optimizer.hyperparameters()
        assert group["noted"] == [1, 2, 3]
        assert group["pair"] == (3, {"lr": group["lr"]})


class KeepsTensor(LambdaLR):
    """A schedule whose state can't be saved."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.table = torch.ones(3)
        super().__init__(optimizer, lambda step: 1.0)


def test_what_can_not_be_saved_is_reported_before_training(tmp_path: Path) -> None:
    steps: list[int] = []
    recipe = gpt_recipe(schedule=KeepsTensor, loss=lambda model, batch: steps.append(1))
    with pytest.raises(mh.CheckpointError, match="the state of the schedule KeepsTensor can't be saved exactly"):
        mh.train(recipe, steps=2, run_dir=tmp_path, show=False)
    assert not steps
    recipe = gpt_recipe(schedule=lambda optimizer: LambdaLR(optimizer, lambda step: np.float32(1)))
    with pytest.raises(mh.ConfigError, match=r"the optimizer's lr \(param group 0\) is not a plain number or text"):
        mh.Engine(recipe)
