"""Averages of weights have the same bits however a run is divided, change no bit of it, and can be used afterwards."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import manyhands as mh
from manyhands.average import Average
from manyhands.checkpoint.format import AVERAGE, list_checkpoints, read_manifest
from manyhands.cli.main import app
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError, WorkerError
from manyhands.listeners.run_directory import RunDirectory
from manyhands.validation import Validation
from support.threads import run_threads

SAMPLES = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
HELD_OUT = SAMPLES[:7] + 1
STEPS = 5


class One(nn.Module):
    """One parameter, whose gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return self.weight.sum()


def of_one(**changes: Any) -> mh.Recipe:
    given: dict[str, Any] = {
        "model": One,
        "loss": lambda model, batch: model(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=1.0),
        "data": [torch.zeros(1)] * 6,
        "batch": mh.Batch(global_size=6, micro_size=1),
    }
    return mh.Recipe(**given | changes)


class Net(nn.Module):
    """Parameters of one and of several blocks, in modules that zero3 unshards one by one, and batch norm."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(60) if normed else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(40, 60), norm, nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def reconstruction(model: nn.Module, batch: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(batch.to(dtype)).float() - batch).square().mean()


def recipe_of(**changes: Any) -> mh.Recipe:
    given: dict[str, Any] = {
        "model": Net,
        "loss": reconstruction,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "data": list(SAMPLES),
        "batch": mh.Batch(global_size=12, micro_size=2),
        "ema": 0.9,
    }
    return mh.Recipe(**given | changes)


def in_bf16(**changes: Any) -> mh.Recipe:
    return recipe_of(model=lambda: Net(normed=False), precision="bf16", **changes)


def trained(
    recipe: mh.Recipe,
    way: tuple[int, str, str],
    folder: Path,
    steps: int = STEPS,
    *,
    load: Path | None = None,
    validate: bool = False,
    with_others: bool = False,
) -> tuple[Any, ...]:
    """Train in threads, or as a worker of the launcher, and leave a checkpoint in `folder`.

    Return the digest, the average's digest, and figures.
    """
    workers, sharding, offload = way
    strategy = mh.Strategy(
        sharding=sharding,
        offload=offload,
        scratch=str(folder / "scratch"),
        transport="distributed" if with_others else "auto",
    )

    def work(group: Group | None) -> tuple[Any, ...]:
        found = []
        with mh.Engine(recipe, strategy, group=group) as engine:
            if load is not None:
                engine.load(load)
            for batch in engine.batches(steps):
                engine.step(batch)
                if validate:
                    before = engine.digest()
                    for weights in ("ema", "trained"):
                        found.append(engine.evaluate(list(HELD_OUT), batch=2, weights=weights).loss)
                    assert engine.digest() == before
            engine.save(folder)
            return engine.digest(), tuple(found)

    ((digest, figures),) = {work(None)} if with_others else set(run_threads(workers, work))
    if with_others and os.environ["RANK"] != "0":
        return digest, "", figures
    summary = mh.export(folder, folder / "averaged", step=steps, weights="ema")
    return digest, summary.digest, figures


def numbers_of(folder: Path, name: str = "averaged") -> dict[str, Tensor]:
    return load_file(folder / name / "model.safetensors")


@cache
def expected(bf16: bool, average: Average, steps: int = STEPS) -> dict[str, np.ndarray]:
    """The average of the weights as numpy computes it from the weights after each step."""
    recipe = replace(in_bf16() if bf16 else recipe_of(), ema=None)
    means: dict[str, np.ndarray] = {}
    count = 0
    with mh.Engine(recipe) as engine:
        for step in range(steps + 1):
            if step:
                engine.step(next(engine.batches()))
            now = {name: value.numpy() for name, value in engine.full_params().items()}
            if step == average.start:
                means, count = now, 1
            elif average.is_due(step):
                rate = np.float32(average.rate(count))
                means = {name: mean + (now[name] - mean) * rate for name, mean in means.items()}
                count += 1
    return means


# - Values


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_average_starts_from_the_initial_weights(workers: int, sharding: str, tmp_path: Path) -> None:
    """-0.5, -1.25, -2.125. torch's AveragedModel copies the weights at its first update, which gives -2.25."""

    def work(group: Group) -> list[Any]:
        found = []
        with mh.Engine(of_one(ema=0.5), mh.Strategy(sharding=sharding), group=group) as engine:
            for batch in engine.batches(3):
                engine.step(batch)
                found.append(engine.evaluate([torch.zeros(1)], weights="ema").loss)
                assert engine.evaluate([torch.zeros(1)]).loss == -engine.step_index
            engine.save(tmp_path)
        return found

    assert run_threads(workers, work) == [[-0.5, -1.25, -2.125]] * workers
    mh.export(tmp_path, tmp_path / "trained")
    summary = mh.export(tmp_path, tmp_path / "averaged", weights="ema")
    assert (summary.weights, numbers_of(tmp_path)["weight"].item()) == ("ema", -2.125)
    assert numbers_of(tmp_path, "trained")["weight"].item() == -3.0


@pytest.mark.parametrize(
    ("average", "values"),
    [
        (Average("swa"), [-0.5, -1.0, -1.5, -2.0]),  # the means of 0, -1, ...
        (Average("swa", start=1, every=2), [-1.0, -1.0, -2.0, -2.0]),  # of -1 and -3
        (Average(decay=0.5, start=2), [-1.0, -2.0, -2.5, -3.25]),
        (Average(decay=0.5, every=2), [0.0, -1.0, -1.0, -2.5]),
        (Average(warmup=True), [-9 / 11, -1.7045455, -2.6013986, -3.5004995]),  # decay 2/11, 3/12, ...
    ],
)
def test_kinds_of_averages(average: Average, values: list[float]) -> None:
    """Before the average begins, its figures are those of the trained weights."""
    with mh.Engine(of_one(average=average)) as engine:
        found = []
        for batch in engine.batches(4):
            engine.step(batch)
            found.append(engine.evaluate([torch.zeros(1)], weights="ema").loss)
    assert found == pytest.approx(values, abs=1e-6)


def test_skipped_steps_change_no_average(tmp_path: Path) -> None:
    """Also if the average would begin with a step that is skipped."""
    recipe = of_one(
        average=Average(decay=0.5, start=1),
        validation=Validation(data=[torch.zeros(1)], every="1 steps", weights="ema"),
    )
    mh.train(recipe, steps=4, skip_steps=[2], run_dir=tmp_path, show=False)
    figures = [each["loss"] for each in RunDirectory(tmp_path).read_validations()]
    assert figures == [-1.0, -1.0, -1.5, -2.25]


# - The same bits


WAYS = [(workers, sharding, "none") for workers in (1, 2, 3) for sharding in ("ddp", "zero2", "zero3")]
ON_DISK = [(1, "ddp", "disk"), (2, "zero2", "disk"), (3, "zero3", "disk")]
QUICK = [
    *((False, way) for way in ((2, "ddp", "none"), (3, "zero2", "none"), (3, "zero3", "disk"))),
    *((True, way) for way in ((3, "ddp", "none"), (2, "zero2", "disk"), (2, "zero3", "none"))),
]


@cache
def first(bf16: bool) -> list[Any]:
    """What the first way has found; the others must find the same."""
    return []


@pytest.mark.parametrize(
    ("bf16", "way"),
    [
        pytest.param(bf16, way, marks=() if (bf16, way) in QUICK else pytest.mark.slow)
        for bf16 in (False, True)
        for way in (*WAYS[1:], *ON_DISK)
    ],
)
def test_every_way_gives_the_same_average_and_leaves_no_trace(
    bf16: bool, way: tuple[int, str, str], tmp_path: Path
) -> None:
    recipe = in_bf16() if bf16 else recipe_of()
    found = trained(recipe, way, tmp_path, validate=True)
    if not first(bf16):
        means, averaged = expected(bf16, Average(decay=0.9)), numbers_of(tmp_path)
        for name, mean in means.items():
            now = torch.from_numpy(mean)
            assert torch.equal(averaged[name], now.bfloat16() if bf16 else now), name
        without = trained(recipe, WAYS[0], tmp_path / "without")  # no evaluation
        assert found[:2] == without[:2]
        plain = mh.train(replace(recipe, ema=None), steps=STEPS, show=False)
        assert plain.digest == found[0]
        first(bf16).append(found)
    assert found == first(bf16)[0]


def over_gloo(folder: Path) -> list[Any]:
    """Train in a worker that unshards parameters by collective calls, in fp32 and in bf16."""
    return [
        trained(recipe, (2, "zero3", "none"), folder / recipe.precision, validate=True, with_others=True)
        for recipe in (recipe_of(), in_bf16())
    ]


def test_sharded_parameters_are_exchanged_over_torch_distributed(tmp_path: Path) -> None:
    found = mh.launch(over_gloo, tmp_path, workers=2)
    alone = [
        trained(recipe, (1, "zero2", "none"), tmp_path / "alone" / recipe.precision, validate=True)
        for recipe in (recipe_of(), in_bf16())
    ]
    assert found[0] == alone
    assert [figures for _, _, figures in found[1]] == [figures for _, _, figures in alone]


def test_a_small_share_moves_the_average_in_bf16(tmp_path: Path) -> None:
    """In bf16 itself, 0.999 would never move it: half a unit in the last place of 1 is 0.004."""
    recipe = replace(in_bf16(), ema=0.999)
    trained(recipe, (2, "zero2", "none"), tmp_path)
    mh.export(tmp_path, tmp_path / "fp32", weights="ema", dtype="fp32")
    with mh.Engine(recipe) as engine:
        start = engine.full_params()
    averaged = numbers_of(tmp_path, "fp32")
    assert all(not torch.equal(averaged[name], start[name]) for name in start)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_an_evaluation_that_fails_restores_the_weights(offload: str, tmp_path: Path) -> None:
    def fails(output: Any, batch: Any) -> Any:
        raise ValueError("mine")

    with mh.Engine(recipe_of(), mh.Strategy(sharding="zero3", offload=offload, scratch=str(tmp_path))) as engine:
        engine.step(next(engine.batches()))
        before = [unit.master.clone() for unit in engine.units]
        with pytest.raises(ConfigError, match="mine"):
            engine.evaluate(list(HELD_OUT), [fails], weights="ema")
        assert all(map(torch.equal, before, [unit.master for unit in engine.units]))


# - Checkpoints


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, "zero2", "none"), (3, "zero3", "none")), ((3, "ddp", "none"), (2, "zero2", "disk"))],
    ids=["1-3", "3-2"],
)
def test_an_average_is_resumed_by_other_workers(before: Any, after: Any, tmp_path: Path) -> None:
    """Also one that has not begun yet. Other averages are refused."""
    recipe = recipe_of(ema=None, average=Average("swa", start=2))
    undisturbed = trained(recipe, (1, "zero2", "none"), tmp_path / "undisturbed")
    for step in (2, 4):
        folder = tmp_path / str(step)
        recipe_then = recipe if step > 2 else replace(recipe, average=Average("swa", start=2))
        strategy = mh.Strategy(sharding=before[1], offload=before[2])

        def save(group: Group, folder: Path = folder, step: int = step, used: Any = (recipe_then, strategy)) -> None:
            with mh.Engine(*used, group=group) as engine:
                for batch in engine.batches(step):
                    engine.step(batch)
                engine.save(folder)

        run_threads(before[0], save)
        ((_, saved),) = list_checkpoints(folder)
        kinds = {piece.kind for piece in read_manifest(saved).pieces}
        assert (AVERAGE in kinds) == (step > 2)
        assert trained(recipe, after, tmp_path / f"{step}-resumed", load=Path(str(saved))) == undisturbed
    for other in (recipe_of(), recipe_of(ema=None), replace(recipe, average=Average("swa", start=1))):
        with mh.Engine(other) as engine, pytest.raises(CheckpointError, match="average of the weights differs"):
            engine.load(str(saved))


def test_a_recipe_without_an_average_has_the_same_checkpoints_as_before(tmp_path: Path) -> None:
    with mh.Engine(recipe_of(ema=None)) as engine:
        engine.step(next(engine.batches()))
        manifest = read_manifest(engine.save(tmp_path))
    assert not manifest.averaged
    assert "averaged" not in manifest.model_dump()
    assert not any("average" in name for name in manifest.facts)
    assert {piece.kind for piece in manifest.pieces} == {"master", "exp_avg", "exp_avg_sq", "buffer"}


def one_run(run: str, kill_after: int | None) -> list[Any]:
    """Train `One` in a worker that kills itself in the validation after step `kill_after`."""
    validation = Validation(data=[torch.zeros(1)], every="1 steps", weights="both", patience=9, watch="ema.loss:min")
    recipe = of_one(ema=0.5, validation=validation)
    plain = recipe.loss

    def loss(model: Any, batch: Tensor) -> Any:
        if not model.training and model.weight.item() == -(kill_after or 99):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, batch)

    object.__setattr__(recipe, "loss", loss)
    summary = mh.train(
        recipe, steps=3, run_dir=run, checkpoint_every=1, keep_best="validation.ema.loss:min", show=False
    )
    return [summary.best, summary.digest, summary.validations["validation.ema"]["loss"]]


def test_a_killed_run_goes_on_with_its_average(tmp_path: Path) -> None:
    killed = str(tmp_path / "killed")
    with pytest.raises(WorkerError):
        mh.launch(one_run, killed, 2, workers=3, max_restarts=0)
    found, plain = one_run(killed, None), one_run(str(tmp_path / "plain"), None)
    assert found == plain
    assert plain[0] == {"validation.ema.loss:min": {"step": 3, "value": -2.125}}
    figures = [
        (each["step"], each.get("weights"), each["loss"]) for each in RunDirectory(Path(killed)).read_validations()
    ]
    assert figures == [
        (1, None, -1.0),
        (1, "ema", -0.5),
        (2, None, -2.0),
        (2, "ema", -1.25),
        (3, None, -3.0),
        (3, "ema", -2.125),
    ]
    mh.export(killed, tmp_path / "out", weights="ema")
    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].item() == -2.125


# - Recipe files and commands

MODULE = """
import torch
from torch import nn

class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

def loss(model, batch):
    return model.weight.sum()

def data():
    return [torch.zeros(1)] * 6
"""

RECIPE = """
name = "one"
steps = 3
AVERAGE
model.path = "averaged_module:One"
loss.path = "averaged_module:loss"
data.path = "averaged_module:data"
optimizer = { path = "torch.optim:SGD", arguments = { lr = 1.0 } }
batch = { global_size = 6, micro_size = 1 }
validation = { data.path = "averaged_module:data", weights = "both" }
"""


def test_recipe_files_and_commands_know_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "averaged_module", raising=False)
    (tmp_path / "averaged_module.py").write_text(MODULE)
    path = tmp_path / "recipe.toml"
    for text, average in (
        ("ema = 0.5", Average(decay=0.5)),
        ("average = { decay = 0.5 }", Average(decay=0.5)),
        ('average = { kind = "swa", start = 1, every = 2 }', Average("swa", start=1, every=2)),
        ("", None),
    ):
        path.write_text(
            RECIPE.replace("AVERAGE", text if average else "").replace("both", "both" if average else "trained")
        )
        assert mh.load_recipe(path).recipe.average_of_weights == average
    for text, what in (
        ("ema = 1.5", r"ema is out of range(.|\n)*recipe\.toml:4(.|\n)*from 0.0 to 1.0"),
        ('average = { kind = "swa", decay = 0.9 }', "no meaning for the mean"),
        ("ema = 0.5\naverage = { decay = 0.5 }", "both recipe.ema and recipe.average are set"),
        ("", "needs an average of the weights"),
    ):
        path.write_text(RECIPE.replace("AVERAGE", text))
        with pytest.raises(ConfigError, match=what):
            mh.load_recipe(path)
    path.write_text(RECIPE.replace("AVERAGE", "ema = 0.5"))
    mh.train(mh.load_recipe(path).recipe, steps=3, run_dir=tmp_path / "run", show=False)
    figures = mh.evaluate(mh.load_recipe(path).recipe, tmp_path / "run", show=False)
    assert {name: each.loss for name, each in figures.items()} == {"validation": -3.0, "validation.ema": -2.125}
    shown = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--weights", "ema"])
    assert shown.exit_code == 0, shown.output
    assert "exported the average of the weights after step 3" in shown.output
    assert "buffers are not averaged: they are the current ones" in shown.output
    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].item() == -2.125


# - Refusals


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Average("swa", decay=0.9), "have no meaning for the mean of the weights"),
        (lambda: Average("swa", warmup=True), "have no meaning for the mean of the weights"),
        (lambda: Average("mean"), "average.kind has an unknown value"),
        (lambda: Average(decay=1.5), "average.decay is out of range"),
        (lambda: Average(every=0), "average.every is out of range"),
        (lambda: Average(warmup=3), "average.warmup has the wrong type"),  # type: ignore[arg-type]
        (lambda: recipe_of(average=Average()), "both recipe.ema and recipe.average are set"),
        (lambda: recipe_of(ema=2), "recipe.ema is out of range"),
        (lambda: recipe_of(ema=None, average=0.9), "recipe.average has the wrong type"),
        (
            lambda: recipe_of(ema=None, validation=Validation(data=[1], weights="both")),
            "needs an average of the weights, but the recipe has none",
        ),
        (lambda: Validation(data=[1], weights="averaged"), "validation.weights has an unknown value"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make()


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with mh.Engine(recipe_of(ema=None)) as engine:
        with pytest.raises(ConfigError, match="there are no such weights"):
            engine.evaluate(list(HELD_OUT), weights="swa")
        with pytest.raises(ConfigError, match="needs an average of the weights"):
            engine.evaluate(list(HELD_OUT), weights="ema")
        engine.save(tmp_path)
    with pytest.raises(ConfigError, match="there are no such weights"):
        mh.export(tmp_path, tmp_path / "out", weights="swa")
    with pytest.raises(ConfigError, match="the checkpoint has no average of the weights"):
        mh.export(tmp_path, tmp_path / "out", weights="ema")
    recipe = of_one(ema=0.5, validation=Validation(data=[torch.zeros(1)], weights="ema"))
    with pytest.raises(ConfigError, match=r"there is no figure validation\.loss(.|\n)*'validation\.ema\.loss'"):
        mh.train(recipe, steps=1, keep_best="validation.loss:min", run_dir=tmp_path / "run", show=False)
