"""Differences between workers are refused before the first step, or at the end of the step after they arose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from support.threads import run_threads
from support.training import train_with_engine
from test_bad_input import on_all
from test_trust_nothing import SAMPLES, WIDTH, Net, recipe

WORKERS = 3


class Buffered(Net):
    """A model with buffers of several kinds, one of which has another value on the last worker."""

    def __init__(self, name: str = "", by: float = 0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("table", torch.zeros(2, 3, dtype=torch.float64), persistent=False)
        if name:
            getattr(self, name).view(-1)[-1] += by


class Changed:
    """The samples, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Tensor:
        return self.change(SAMPLES[index])


class Scaled:
    """A loss that holds an option."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.scale * model(batch).square().mean()


def scaled(model: nn.Module, batch: Tensor, *, scale: float = 1.0, classes: Any = ()) -> Tensor:
    return scale * model(batch).square().mean()


def with_default(scale: float) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: Tensor, scale: float = scale) -> Tensor:
        return scaled(model, batch, scale=scale)

    return loss


def by_closure(scale: Any) -> Callable[..., Tensor]:
    def inner(batch: Tensor) -> Tensor:
        return batch * scale

    return lambda model, batch: scaled(model, inner(batch))


def decaying(rate: float) -> Callable[..., Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate**step)


class Method:
    """Its methods hide their options in an object."""

    def __init__(self, rank: int, *options: Any) -> None:
        self.rank, self.options = rank, options

    def model(self) -> nn.Module:
        return Buffered(*self.options)

    def collate(self, items: list[Tensor]) -> Tensor:
        return torch.stack(items) + self.rank


def last(rank: int) -> int:
    return int(rank == WORKERS - 1)


def unseeded(sample: Tensor) -> Tensor:
    return sample + float(GENERATOR.normal())


GENERATOR = np.random.default_rng()

BEFORE: dict[str, tuple[Callable[[int], mh.Recipe], str]] = {
    "buffer: mean": (lambda rank: recipe(Method(rank, "mean", last(rank)).model), "they differ in buffer mean"),
    "buffer: integer": (lambda rank: recipe(Method(rank, "calls", last(rank)).model), "they differ in buffer calls"),
    "buffer: fp64": (
        lambda rank: recipe(Method(rank, "table", last(rank) * 1e-9).model),
        "they differ in buffer table",
    ),
    "data: by rank": (
        lambda rank: recipe(Net, data=SAMPLES[last(rank) :][: len(SAMPLES) - 1]),
        "the same data: they differ in recipe.data[",
    ),
    "data: scaled": (
        lambda rank: recipe(Net, data=Changed(lambda sample: sample * (1 + last(rank)))),
        "the same data: they differ in recipe.data[",
    ),
    "data: of dicts": (
        lambda rank: recipe(
            Net,
            data=[{"x": sample, "name": f"of {last(rank)}"} for sample in SAMPLES],
            loss=lambda model, batch: model(batch["x"]).square().mean(),
        ),
        "]['name']",
    ),
    "collate": (
        lambda rank: recipe(Net, collate=Method(last(rank)).collate),
        "the same data: they differ in the batch that collate returned",
    ),
    "loss: argument": (
        lambda rank: recipe(Net, loss=functools.partial(scaled, scale=1.0 + last(rank))),
        "the same recipe: they differ in loss, scale",
    ),
    "loss: array": (
        lambda rank: recipe(Net, loss=functools.partial(scaled, classes={"of": [np.arange(3) + last(rank)]})),
        "the same recipe: they differ in loss, classes['of'][0]",
    ),
    "loss: default": (
        lambda rank: recipe(Net, loss=with_default(1.0 + last(rank))),
        "the same recipe: they differ in loss, scale",
    ),
    "loss: variable": (
        lambda rank: recipe(Net, loss=by_closure(torch.tensor([1.0, 2.0 + last(rank)]).mean())),
        "the same recipe: they differ in loss, inner, scale",
    ),
    "loss: attribute": (
        lambda rank: recipe(Net, loss=Scaled(1.0 + last(rank))),
        "the same recipe: they differ in loss, scale",
    ),
    "loss: another function": (
        lambda rank: recipe(Net, loss=[scaled, Scaled(1.0)][last(rank)]),
        "the same recipe: they differ in loss",
    ),
    "schedule": (
        lambda rank: recipe(Net, schedule=decaying(0.9 + 0.05 * last(rank))),
        "the same recipe: they differ in schedule, rate",
    ),
}


def trained(made: mh.Recipe, group: Group, between: Callable[[mh.Engine], None] | None = None) -> str:
    with mh.Engine(made, mh.Strategy(), group) as engine:
        for batch in engine.batches(3):
            if between is not None and engine.step_index == 1:
                between(engine)
            engine.step(batch)
        return engine.digest()


@pytest.mark.parametrize("case", BEFORE)
def test_a_difference_before_the_first_step_is_refused_on_all_workers(case: str) -> None:
    make, text = BEFORE[case]
    errors = on_all(lambda rank, group: trained(make(rank), group), workers=WORKERS)
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, mh.ConfigError), error
        assert "workers 0 and 2 don't have the same" in str(error)
        assert text in str(error)


def test_paths_and_the_rank_in_an_object_of_a_method_may_differ() -> None:
    def make(rank: int) -> mh.Recipe:
        path = f"/logs/{rank}"
        loss = Method(rank).collate
        return recipe(Net, loss=lambda model, batch: scaled(model, batch) if (path, loss) else None)

    digests = on_all(lambda rank, group: trained(make(rank), group), workers=WORKERS)
    assert len(set(digests)) == 1, digests


UNSTEADY: dict[str, Callable[[], mh.Recipe]] = {
    "a generator of the data set": lambda: recipe(Net, data=Changed(unseeded)),
    "a counter": lambda: recipe(Net, data=Changed(lambda sample, calls=[0]: sample + len(calls.append(1) or calls))),
    "collate": lambda: recipe(Net, collate=lambda items: torch.stack(items) * float(GENERATOR.normal())),
}


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("case", UNSTEADY)
def test_data_that_change_when_they_are_loaded_again_are_refused(case: str, loader_workers: int) -> None:
    with mh.Engine(UNSTEADY[case](), mh.Strategy(loader_workers=loader_workers)) as engine:
        with pytest.raises(mh.DataError, match="not the same when it was loaded again") as caught:
            next(engine.batches(1))
        assert ("collate" if case == "collate" else "recipe.data[") in str(caught.value.where)
        assert "step 1, micro-batch 0" in str(caught.value.where)


def lr(engine: mh.Engine) -> None:
    engine.optimizer.fronts[0].param_groups[0]["lr"] *= 0.5


def betas(engine: mh.Engine) -> None:
    engine.optimizer.fronts[0].param_groups[0]["betas"] = (0.9, 0.99)


def frozen(engine: mh.Engine) -> None:
    engine.model.first.bias.requires_grad_(False)


def buffer(engine: mh.Engine) -> None:
    engine.model.mean.fill_(2)


def buffer_then_evaluation(engine: mh.Engine) -> None:
    engine.model.calls += 1


def autocast(engine: mh.Engine) -> None:
    torch.set_autocast_enabled("cpu", True)


BETWEEN: dict[Callable[[mh.Engine], None], tuple[str, str, str]] = {
    lr: ("optimizer group 0.lr", "0.05", "0.025"),
    betas: ("optimizer group 0.betas", "(0.9, 0.999)", "(0.9, 0.99)"),
    frozen: ("first.bias.requires_grad", "True", "False"),
    buffer: ("buffer mean", "nothing", "torch.float32"),
    buffer_then_evaluation: ("buffer calls", "nothing", "torch.int64"),
    autocast: ("torch.is_autocast_enabled('cpu')", "False", "True"),
}


@pytest.mark.parametrize("change", BETWEEN, ids=lambda change: change.__name__)
def test_a_difference_between_steps_is_refused_before_the_update(change: Callable[[mh.Engine], None]) -> None:
    def work(rank: int, group: Group) -> None:
        def between(engine: mh.Engine) -> None:
            if rank == WORKERS - 1:
                change(engine)
            if change is buffer_then_evaluation:
                with engine.evaluating() as model:
                    model(SAMPLES[0])

        trained(recipe(Buffered), group, between)

    name, expected, got = BETWEEN[change]
    for error in on_all(work, workers=WORKERS):
        assert isinstance(error, mh.ConfigError), error
        assert f"workers 0 and 2 don't have the same settings: they differ in {name}" in str(error)
        assert f"{expected} (worker 0)" in str(error)
        assert got in str(error.got)


def test_the_same_changes_on_all_workers_are_made() -> None:
    def work(rank: int, group: Group) -> str:
        def between(engine: mh.Engine) -> None:
            for change in (lr, betas, frozen, buffer):
                change(engine)

        return trained(recipe(Buffered), group, between)

    assert len({*on_all(work, workers=WORKERS), *on_all(work, workers=1)}) == 1


ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "run_dir": lambda own: f"runs-at-{own}",
    "checkpoint_dir": lambda own: f"checkpoints-{own}",
    "steps": lambda own: 2 + int(own),
    "digest_every": lambda own: 1 + int(own),
}


def differing_arguments(folder: str) -> dict[str, str]:
    """Call train on this worker with one argument that depends on the worker; return the errors by argument."""
    import os

    errors, rank = {}, os.environ["RANK"]
    for name, make in ARGUMENTS.items():
        own = make(rank)
        arguments = {"steps": 1, name: os.path.join(folder, own) if isinstance(own, str) else own}
        try:
            mh.train(recipe(Net), show=False, **arguments)
        except mh.ConfigError as error:
            errors[name] = str(error)
    return errors


def test_different_arguments_of_train_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for errors in mh.launch(differing_arguments, str(tmp_path), workers=2):
        for name in ARGUMENTS:
            assert f"don't have the same arguments of train(): they differ in {name}" in errors[name]
    assert list(tmp_path.iterdir()) == []


COLLATES: dict[str, tuple[int, Callable[[list[Any]], Any]]] = {
    "the sample": (1, lambda items: items[0]),
    "a view of the sample": (1, lambda items: {"x": items[0]["x"].flatten(), "y": items[0]["y"]}),
    "arrays": (1, lambda items: {"x": items[0]["x"].numpy(), "y": items[0]["y"]}),
    "a list of samples": (2, lambda items: items),
}


@pytest.mark.parametrize("case", COLLATES)
def test_a_loss_that_changes_its_batch_does_not_change_the_data(case: str) -> None:
    size, collate = COLLATES[case]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        total = torch.zeros(())
        for item in batch if isinstance(batch, list) else [batch]:
            item["x"] *= 0.5
            total = total + model(torch.as_tensor(item["x"]).view(1, -1)).square().sum()
        return total

    def digest(group: Group) -> str:
        samples = [{"x": sample.clone().view(1, -1), "y": torch.ones(1)} for sample in SAMPLES]  # of this worker alone
        batch = mh.Batch(global_size=6 * size, micro_size=size, virtual_workers=3)
        made = recipe(Net, data=samples, collate=collate, loss=loss, batch=batch)
        steps = len(samples) // (6 * size) * 2 + 1
        return train_with_engine(made, mh.Strategy(), steps=steps, group=group).digest

    assert len({found for workers in (1, 2, 3) for found in run_threads(workers, digest)}) == 1
