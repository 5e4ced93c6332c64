"""Schedules: a changed setting is noticed on resume wherever it is, and what is no schedule is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lr

import manyhands as mh
from manyhands.errors import CheckpointError, ConfigError
from support.models import gpt_recipe, muon_and_adamw

Schedule = Callable[[Optimizer], Any]


class Decay:
    """A factor as an object."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, step: int) -> float:
        return self.rate**step


def sequential(end: int, milestone: int = 2) -> Schedule:
    return lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.CosineAnnealingLR(o, T_max=end)], milestones=[milestone])


def nested(end: int) -> Schedule:
    return lambda o: lr.ChainedScheduler(
        [lr.ConstantLR(o), lr.SequentialLR(o, [lr.ConstantLR(o), lr.StepLR(o, end)], [1])]
    )


CHANGES: dict[str, tuple[Schedule, Schedule, str]] = {
    "plain": (lambda o: lr.CosineAnnealingLR(o, 10), lambda o: lr.CosineAnnealingLR(o, 20), "schedule 0.T_max"),
    "sequential": (sequential(10), sequential(20), "schedule 0.schedule 1.T_max"),
    "milestone of sequential": (sequential(10), sequential(10, 3), "schedule 0._milestones"),
    "nested twice": (nested(10), nested(20), "schedule 0.schedule 1.schedule 1.step_size"),
    "class in sequential": (
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.StepLR(o, 2)], [2]),
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], [2]),
        "schedule 0.schedule 1",
    ),
    "chained": (
        lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)]),
        lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, 0.8)]),
        "schedule 0.schedule 1.gamma",
    ),
    "object in LambdaLR": (
        lambda o: lr.LambdaLR(o, Decay(0.9)),
        lambda o: lr.LambdaLR(o, Decay(0.8)),
        "schedule 0.lr_lambdas",
    ),
    "object in nested LambdaLR": (
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.LambdaLR(o, Decay(0.9))], [1]),
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.LambdaLR(o, Decay(0.8))], [1]),
        "schedule 0.schedule 1.lr_lambdas",
    ),
    "milestones": (lambda o: lr.MultiStepLR(o, [2, 4]), lambda o: lr.MultiStepLR(o, [2, 5]), "schedule 0.milestones"),
    "rate of OneCycleLR": (
        lambda o: lr.OneCycleLR(o, 0.01, total_steps=9, final_div_factor=10),
        lambda o: lr.OneCycleLR(o, 0.01, total_steps=9, final_div_factor=20),
        "optimizer group 0.min_lr",
    ),
    "phase of OneCycleLR": (
        lambda o: lr.OneCycleLR(o, 0.01, total_steps=9),
        lambda o: lr.OneCycleLR(o, 0.01, total_steps=9, pct_start=0.5),
        "schedule 0._schedule_phases",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_schedule_is_refused_on_resume_and_an_unchanged_one_is_resumed(name: str, tmp_path: Path) -> None:
    before, after, fact = CHANGES[name]
    batch = mh.Batch(global_size=2, micro_size=2)
    mh.train(gpt_recipe(schedule=before, batch=batch), steps=1, run_dir=tmp_path, show=False)
    with pytest.raises(CheckpointError, match="another recipe") as caught:
        mh.train(gpt_recipe(schedule=after, batch=batch), steps=2, run_dir=tmp_path, show=False)
    assert f": {fact} differs" in caught.value.what
    resumed = mh.train(gpt_recipe(schedule=before, batch=batch), steps=3, run_dir=tmp_path, show=False)
    assert resumed.digest == mh.train(gpt_recipe(schedule=before, batch=batch), steps=3, show=False).digest


def other_optimizer() -> Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


class Unsavable(lr.LRScheduler):
    """Holds another schedule, as many warm-up wrappers do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.after = lr.StepLR(optimizer, 3)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("schedule", "what"),
    [
        (lambda optimizer: None, "recipe.schedule did not return a schedule"),
        (lambda optimizer: [lr.StepLR(optimizer, 3)], "recipe.schedule did not return a schedule"),
        (lambda optimizer: 0.1, "recipe.schedule did not return a schedule"),
        (lambda optimizer: lr.StepLR, "recipe.schedule returned a schedule of another optimizer"),
        (lambda optimizer: lr.StepLR(other_optimizer(), 3), "recipe.schedule returned a schedule of another optimizer"),
    ],
)
def test_what_is_not_a_schedule_of_the_optimizer_is_refused(schedule: Schedule, what: str) -> None:
    for optimizer in (gpt_recipe().optimizer, muon_and_adamw()):
        with pytest.raises(ConfigError, match=what):
            mh.Engine(gpt_recipe(schedule=schedule, optimizer=optimizer))


class Counter:
    """A factor that halves with each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.5**self.calls


def test_a_function_that_counts_its_calls_is_refused_and_an_object_is_resumed(tmp_path: Path) -> None:
    def counting(optimizer: Optimizer) -> lr.LRScheduler:
        counter = Counter()
        return lr.SequentialLR(optimizer, [lr.LambdaLR(optimizer, lambda step: counter(step))], [])

    with pytest.raises(ConfigError, match=r"a function of recipe\.schedule returned another value"):
        mh.Engine(gpt_recipe(schedule=counting))
    recipe = gpt_recipe(schedule=lambda optimizer: lr.LambdaLR(optimizer, Counter()))
    mh.train(recipe, steps=2, run_dir=tmp_path, show=False)
    resumed = mh.train(recipe, steps=4, run_dir=tmp_path, show=False)
    assert resumed.digest == mh.train(recipe, steps=4, show=False).digest


def test_a_schedule_whose_state_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the state of the schedule Unsavable can't be saved exactly"):
        mh.train(gpt_recipe(schedule=Unsavable), steps=1, run_dir=tmp_path, show=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_sample_that_is_not_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.sample did not return text"):
        mh.train(gpt_recipe(sample=lambda model: torch.zeros(1)), steps=1, show=False)
