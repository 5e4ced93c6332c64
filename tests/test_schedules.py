"""Schedules: a changed setting is noticed on resume wherever it is, and what is no schedule is refused."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lr

import manyhands as mh
from manyhands.errors import CheckpointError, ConfigError, Interrupted, WorkerError
from manyhands.listeners.run_directory import RunDirectory
from manyhands.surroundings import StopSignals
from support.models import gpt_recipe, muon_and_adamw
from support.threads import run_threads

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

    with pytest.raises(ConfigError, match=r"a function of recipe\.schedule returned a different value"):
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


# - Schedules that a figure advances


class One(nn.Module):
    """One parameter, whose gradient is -1: its changes are the learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def on_plateau(losses: list[float] | None = None, **changes: Any) -> mh.Recipe:
    """Halve the learning rate after each validation without a better loss. losses: one by one (default: always 1)."""
    left = iter(losses or [])

    def loss(model: One, batch: Tensor) -> Tensor:
        total = model.weight.sum()
        return -total if model.training else total.detach() * 0 + next(left, 1.0)

    given: dict[str, Any] = {
        "model": One,
        "loss": loss,
        "optimizer": lambda params: torch.optim.SGD(params, lr=1.0),
        "data": [torch.zeros(1)] * 6,
        "batch": mh.Batch(global_size=6, micro_size=1),
        "validation": mh.Validation(data=[torch.zeros(1)], every="2 steps"),
        "schedule": lambda optimizer: lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
        "schedule_on": "validation.loss",
    }
    return mh.Recipe(**given | changes)


def rates_of(run: Path) -> list[float]:
    return [each.learning_rates[0] for each in RunDirectory(run).read_metrics()]


def test_a_figure_reduces_the_learning_rate(tmp_path: Path) -> None:
    """Validations after steps 2, 4, 6: the first one is the best, and NaN is no improvement."""
    one_trial = [0.0]  # of the micro-batch that is tried before the first step
    mh.train(on_plateau(), steps=8, run_dir=tmp_path / "equal", show=False)
    assert rates_of(tmp_path / "equal") == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    better = on_plateau([*one_trial, 3.0, math.nan, 2.0])
    mh.train(better, steps=8, run_dir=tmp_path / "better", show=False)
    assert rates_of(tmp_path / "better") == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    at_start = on_plateau(validation=mh.Validation(data=[torch.zeros(1)], every="2 steps", at_start=True))
    mh.train(at_start, steps=4, run_dir=tmp_path / "start", show=False)
    assert rates_of(tmp_path / "start") == [1, 1, 0.5, 0.5]


def test_each_of_several_optimizers_has_its_own_schedule(tmp_path: Path) -> None:
    """One advances with the figure, the other one with the steps; a figure of an average, which skipped steps leave."""

    class Two(One):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.zeros(1))

    made: list[Optimizer] = []

    def schedule(optimizer: Optimizer) -> Any:
        made.append(optimizer)
        first = len(made) % 2 == 1
        return lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0) if first else lr.StepLR(optimizer, 3)

    recipe = on_plateau(
        model=Two,
        loss=lambda model, batch: -(model.weight + model.other).sum() if model.training else model.weight.sum() * 0,
        optimizer=lambda params: [torch.optim.SGD([each], lr=1.0) for each in params],
        schedule=schedule,
        schedule_on="validation.ema.loss",
        validation=mh.Validation(data=[torch.zeros(1)], every="1 steps", weights="ema"),
        ema=0.5,
    )
    mh.train(recipe, steps=4, skip_steps=[2], run_dir=tmp_path, show=False)
    rates = [each.learning_rates for each in RunDirectory(tmp_path).read_metrics()]
    assert rates == [(1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.25, pytest.approx(0.1))]


def test_a_run_that_goes_on_later_has_the_rates_of_a_longer_run(tmp_path: Path) -> None:
    """The validation at the end of 3 steps does not count, nor does the trial before the first step."""
    whole = mh.train(on_plateau(), steps=7, show=False)
    for steps in (3, 4, 7):
        found = mh.train(on_plateau(), steps=steps, run_dir=tmp_path, show=False)
    assert found.digest == whole.digest
    assert rates_of(tmp_path) == [1, 1, 1, 1, 0.5, 0.5, 0.25]


class StopsAfter(StopSignals):
    """A stop that is requested during step `step`, and takes effect before the step's validation."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def test_a_run_that_stops_between_a_step_and_its_validation_goes_on_exactly(tmp_path: Path) -> None:
    whole = mh.train(on_plateau(), steps=7, show=False)
    for step in (2, 4):
        with pytest.raises(Interrupted, match=f"stopped after step {step}"):
            mh.train(on_plateau(), steps=7, run_dir=tmp_path, show=False, stop=StopsAfter(1))
    found = mh.train(on_plateau(), steps=7, run_dir=tmp_path, show=False)
    assert found.digest == whole.digest


def killed_run(run: str, kill_after: int | None) -> str:
    """Train in a worker that kills itself in the validation after step `kill_after`."""
    recipe = on_plateau()
    plain = recipe.loss

    def loss(model: Any, batch: Tensor) -> Any:
        if not model.training and kill_after is not None and model.weight.item() == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, batch)

    object.__setattr__(recipe, "loss", loss)
    return mh.train(recipe, steps=7, run_dir=run, checkpoint_every=1, show=False).digest


def test_a_killed_run_goes_on_with_its_rates(tmp_path: Path) -> None:
    whole = mh.train(on_plateau(), steps=7, show=False)
    with pytest.raises(WorkerError):
        mh.launch(killed_run, str(tmp_path), 4, workers=3, max_restarts=0)
    assert killed_run(str(tmp_path), None) == whole.digest
    assert rates_of(tmp_path) == [1, 1, 1, 1, 0.5, 0.5, 0.25]


def test_an_own_loop_gives_the_figure_itself() -> None:
    def work(group: Any) -> list[float]:
        rates = []
        with mh.Engine(on_plateau(), mh.Strategy(sharding="zero3"), group=group) as engine:
            for batch in engine.batches(3):
                rates += engine.step(batch).learning_rates
                engine.advance_schedules(engine.evaluate([torch.zeros(1)]).loss)
        return rates

    assert run_threads(2, work) == [[1.0, 1.0, 0.5]] * 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schedule_on": None}, "recipe.schedule needs a figure of a validation"),
        ({"schedule": None}, "recipe.schedule_on is set, but no schedule needs a figure"),
        ({"schedule": lambda o: lr.StepLR(o, 3)}, "recipe.schedule_on is set, but no schedule needs a figure"),
        ({"validation": None}, "recipe.schedule_on needs a validation"),
        ({"schedule_on": "held-out.loss"}, "recipe.schedule_on needs a validation"),
        (
            {"schedule_on": "validation.los"},
            r"there is no figure validation\.los(.|\n)*did you mean 'validation\.loss'",
        ),
        (
            {"schedule": lambda o: Holds(o)},
            "a schedule that needs a figure of a validation is inside another schedule",
        ),
    ],
)
def test_a_figure_without_a_schedule_or_a_schedule_without_a_figure_is_refused(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=what):
        mh.train(on_plateau(**changes), steps=2, run_dir=tmp_path, show=False)
    assert not (tmp_path / "metrics.jsonl").exists()


class Holds(lr.ReduceLROnPlateau):
    """Holds another schedule that needs a figure, which torch's own do not allow."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._schedulers = [lr.ReduceLROnPlateau(optimizer)]


def test_a_validation_that_decides_rates_is_a_part_of_the_recipe(tmp_path: Path) -> None:
    mh.train(on_plateau(), steps=2, run_dir=tmp_path, show=False)
    validation = on_plateau().validations["validation"]
    for other, fact in (
        (replace(validation, every="3 steps"), "validation.every"),
        (replace(validation, at_start=True), "validation.at_start"),
        (replace(validation, data=[torch.zeros(1)] * 2), r"len\(validation.data\)"),
    ):
        with pytest.raises(CheckpointError, match=f"another recipe: {fact} differs"):
            mh.train(on_plateau(validation=other), steps=4, run_dir=tmp_path, show=False)
