"""Skipped steps and amended settings: the same bits with any number of workers, and after any resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lr

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints, read_manifest
from manyhands.comm.group import Group
from manyhands.doctor.compare import compare_runs
from manyhands.doctor.runs import run_history
from manyhands.engine.step.amendments import Amendments, amendments_of
from manyhands.errors import CheckpointError, ConfigError, NumericsError
from manyhands.listeners.run_directory import RunDirectory
from support.models import gpt_recipe, grouped, muon_and_adamw
from support.threads import run_threads
from test_faults import MANYHANDS, PATIENT, SUPPORT

STEPS = 6
AMENDED = amendments_of([2, 5], {3: {"optimizer.lr": 1e-3, "clip_norm": 0.05}, 5: {"optimizer.1.weight_decay": 0.5}})


def chain(
    group: Group | None,
    strategy: mh.Strategy,
    amendments: Amendments,
    *,
    load: Path | None = None,
    save: Path | None = None,
) -> list[str]:
    """Train to the last step, and return the digest after every step."""
    digests = []
    with mh.Engine(gpt_recipe("bf16"), strategy, group=group) as engine:
        engine.amend(amendments)
        if load is not None:
            engine.load(load)
        for batch in engine.batches(STEPS):
            metrics = engine.step(batch, digest=True)
            assert metrics.skipped == (metrics.step in amendments.skipped)
            digests.append(str(metrics.digest))
            if save is not None:
                engine.save(save)
    return digests


def test_the_bits_do_not_depend_on_the_workers_or_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    expected = chain(None, mh.Strategy(sharding="ddp"), AMENDED, save=tmp_path)
    plain = chain(None, mh.Strategy(), Amendments())
    assert expected[0] == plain[0]
    assert len({*expected, *plain}) == 2 * STEPS - 3  # equal: after the first step, and after each skipped step
    assert (expected[1], expected[4]) == (expected[0], expected[3])
    for workers, sharding, loader_workers in ((2, "zero2", 0), (3, "zero3", 0), (1, "zero2", 1)):
        strategy = mh.Strategy(sharding=sharding, loader_workers=loader_workers)
        if loader_workers:
            assert chain(None, strategy, AMENDED) == expected
        else:
            found = run_threads(workers, lambda group, s=strategy: chain(group, s, AMENDED))
            assert all(each == expected for each in found)
    for step in range(1, STEPS):
        folder, workers = tmp_path / f"step-{step:08d}", 1 + step % 2
        resumed = run_threads(workers, lambda group, f=folder: chain(group, mh.Strategy(), AMENDED, load=f))
        assert all(each == expected[step:] for each in resumed)
        assert Amendments.from_json(read_manifest(folder).amendments) == AMENDED.up_to(step)
    # A checkpoint brings the amendments that it was computed with.
    future = amendments_of([5], {5: {"optimizer.1.weight_decay": 0.5}})
    assert chain(None, mh.Strategy(), future, load=tmp_path / "step-00000004") == expected[4:]


def test_a_skipped_step_passes_over_its_data_and_advances_schedules() -> None:
    """With a rate of 0 the weights stay, so the loss of a step shows its data."""
    loaded: list[int] = []

    class Noted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            loaded.append(index)
            return super().__getitem__(index)

    def metrics_of(skipped: list[int], rate: float) -> list[mh.StepMetrics]:
        recipe = gpt_recipe(
            data=Noted([gpt_recipe().data[index] for index in range(50)]),
            optimizer=grouped(torch.optim.SGD, lr=rate),
            schedule=lambda optimizer: lr.StepLR(optimizer, 2, 0.5),
            batch=mh.Batch(global_size=4, micro_size=2),
        )
        with mh.Engine(recipe) as engine:
            engine.amend(amendments_of(skipped, {}))
            loaded.clear()
            return [engine.step(batch) for batch in engine.batches(5)]

    plain, all_loaded = metrics_of([], 0.0), list(loaded)
    skipping = metrics_of([2, 3], 0.0)
    assert [each.loss for each in skipping if not each.skipped] == [plain[step - 1].loss for step in (1, 4, 5)]
    assert [each.step for each in skipping if math.isnan(each.loss)] == [2, 3]
    assert len(loaded) == len(all_loaded) - 2 * 4
    rates = [each.learning_rates for each in metrics_of([1, 3], 0.1)]
    assert rates == [each.learning_rates for each in metrics_of([], 0.1)]


SCHEDULES: dict[str, Callable[[Optimizer], Any] | None] = {
    "none": None,
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 9),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.5, total_iters=3), lr.StepLR(o, 2)], [4]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)]),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 25 * o.param_groups[0]["lr"], total_steps=9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_amended_rate_follows_the_schedule_that_starts_from_it(name: str) -> None:
    def rates(first: float, amendments: Amendments) -> list[float]:
        recipe = gpt_recipe(
            optimizer=grouped(torch.optim.AdamW, lr=first),
            schedule=SCHEDULES[name],
            batch=mh.Batch(global_size=2, micro_size=2),
        )
        with mh.Engine(recipe) as engine:
            engine.amend(amendments)
            return [engine.step(batch).learning_rates[0] for batch in engine.batches(7)]

    before, after = rates(4e-3, Amendments()), rates(1e-3, Amendments())
    found = rates(4e-3, amendments_of([], {4: {"optimizer.lr": 1e-3}}))
    assert found == pytest.approx([*before[:3], *after[3:]], rel=1e-12)


def nan_at(step: int, batch: mh.Batch) -> mh.Recipe:
    """A recipe whose loss is NaN in one step. The step is recognised by its data, as with a bad batch."""
    recipe = gpt_recipe(batch=batch)
    with mh.Engine(recipe) as engine:
        assert engine._loader is not None
        tokens = engine._loader.load(step - 1, 0)

    def loss(model: Any, given: torch.Tensor) -> Any:
        total, weight = recipe.loss(model, given)
        return total * math.nan if torch.equal(given, tokens) else total, weight

    return gpt_recipe(batch=batch, loss=loss)


def test_a_run_gets_past_a_bad_batch_and_every_later_resume_repeats_it(tmp_path: Path) -> None:
    run, bad = tmp_path / "run", nan_at(4, mh.Batch(global_size=4, micro_size=2))
    options: dict[str, Any] = {
        "run_dir": run,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "digest_every": 1,
        "show": False,
    }
    with pytest.raises(NumericsError, match="is nan") as caught:
        mh.train(bad, steps=STEPS, **options)
    assert str(caught.value.where).startswith("step 4, samples 12 to 13")
    assert "--skip-step 4 (skip_steps=[4])" in str(caught.value.hint)
    first = mh.train(bad, steps=STEPS, skip_steps=[4], amendments={5: {"clip_norm": 0.1}}, **options)
    assert first.steps == STEPS - 1
    assert math.isfinite(first.last_loss)
    digests = {each.step: each.digest for each in RunDirectory(run).read_metrics()}
    assert digests == {step: read_manifest(path).digest for step, path in list_checkpoints(run / "checkpoints")}
    assert list(digests) == list(range(1, STEPS + 1))
    assert digests[4] == digests[3]
    lines = [text for _, text in run_history(RunDirectory(run)).lines]
    assert {"step 4 was skipped", "amended: from step 5 on, clip_norm = 0.1"} <= set(lines)
    log = (run / "logs" / "worker-0.log").read_text()
    assert {"step 4 is skipped", "from step 5 on, clip_norm = 0.1", "step 4 was skipped"} <= set(log.splitlines())

    shutil.copytree(run, tmp_path / "again")
    for step in range(3, STEPS + 1):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}")
    assert mh.train(bad, steps=STEPS, run_dir=tmp_path / "again", show=False).digest == first.digest
    assert compare_runs(run, tmp_path / "again").differences == ()
    mh.train(bad, steps=2, run_dir=tmp_path / "other", digest_every=1, show=False)
    mh.train(bad, steps=STEPS, run_dir=tmp_path / "other", digest_every=1, skip_steps=[3, 4], show=False)
    assert any("skipped_steps" in each for each in compare_runs(run, tmp_path / "other").differences)

    with pytest.raises(CheckpointError, match="the checkpoint was computed without these amendments") as late:
        mh.train(bad, steps=STEPS + 1, run_dir=run, skip_steps=[2], show=False)
    assert late.value.expected == "step 2 is skipped"
    assert "amend steps from 7 on" in str(late.value.hint)
    with pytest.raises(CheckpointError, match="computed without these amendments"):
        mh.train(bad, steps=STEPS + 1, run_dir=run, amendments={5: {"clip_norm": 0.2}}, show=False)
    longer = mh.train(bad, steps=STEPS + 1, run_dir=run, show=False)
    both = {"skip_steps": [4], "amendments": {5: {"clip_norm": 0.1}}}
    assert longer.digest == mh.train(bad, steps=STEPS + 1, show=False, **both).digest

    mh.train(bad, steps=1, run_dir=run, start_over=True, show=False)
    assert not (run / "amendments.json").exists()
    assert json.loads((run / "earlier-1" / "amendments.json").read_text())["skipped_steps"] == [4]


@pytest.mark.parametrize("name", ["none", "OneCycleLR"])
def test_a_refused_step_leaves_the_settings_unchanged(name: str, tmp_path: Path) -> None:
    bad = nan_at(2, mh.Batch(global_size=4, micro_size=2))
    bad = dataclasses.replace(bad, optimizer=grouped(torch.optim.AdamW, lr=4e-3), schedule=SCHEDULES[name])
    changes = amendments_of([], {2: {"optimizer.lr": 0.0, "optimizer.0.lr": 1e-3, "optimizer.eps": 1e-3}})

    def state(engine: mh.Engine) -> str:
        schedules = [schedule.state_dict() for schedule in engine.schedules]
        return repr((engine.optimizer.hyperparameters(), schedules, engine.digest()))

    with mh.Engine(bad) as engine:
        engine.amend(changes)
        engine.step(next(engine.batches(1)))
        before = state(engine)
        for _ in range(2):
            with pytest.raises(NumericsError, match="is nan"):
                engine.step(next(engine.batches(2)))
            assert state(engine) == before
        engine.save(tmp_path)
        # The user decides to skip the step. The amended settings are valid from this step on all the same.
        engine.amend(dataclasses.replace(changes, skipped=(2,)))
        rest = [engine.step(batch, digest=True) for batch in engine.batches(3)]
        assert [each.learning_rates[1] for each in rest] == [0.0, 0.0]
        assert engine.optimizer.hyperparameters()[0]["eps"] == 1e-3
    with mh.Engine(bad) as engine:
        engine.amend(dataclasses.replace(changes, skipped=(2,)))
        engine.load(tmp_path / "step-00000001")
        again = [engine.step(batch, digest=True) for batch in engine.batches(3)]
    assert [(each.learning_rates, each.digest) for each in again] == [
        (each.learning_rates, each.digest) for each in rest
    ]


def test_an_invalid_amendment_is_refused_before_training() -> None:
    for changes, what in (
        ({"optimizer.rate": 0.1}, r"there is no setting optimizer\.rate that can be amended"),
        ({"optimizer.arguments.lr": 0.1}, r"no setting optimizer\.arguments\.lr"),
        ({"optimizer.7.lr": 0.1}, r"no setting optimizer\.7\.lr"),
        ({"seed": 1}, "no setting seed"),
        ({"optimizer.weight_decay": 0.1}, r"the param groups have different values of optimizer\.weight_decay"),
        ({"optimizer.betas": 0.1}, r"optimizer\.betas can't be amended to this value"),
        ({"optimizer.betas": [0.1]}, r"optimizer\.betas can't be amended to this value"),
        ({"optimizer.fused": 1}, r"optimizer\.fused can't be amended to this value"),
        ({"optimizer.lr": -1.0}, r"optimizer\.lr is out of range"),
        ({"optimizer.lr": "fast"}, r"the amendment optimizer\.lr is not a number"),
        ({"clip_norm": -1}, "clip_norm is out of range"),
    ):
        with pytest.raises(ConfigError, match=what):
            mh.train(gpt_recipe(), steps=1, amendments={1: changes}, show=False)
    for skipped in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="a step is out of range"):
            mh.train(gpt_recipe(), steps=1, skip_steps=[skipped], show=False)  # type: ignore[list-item]
    both = {"optimizer.0.lr": 1e-2, "optimizer.1.betas": [0.8, 0.9]}
    mh.train(gpt_recipe(optimizer=muon_and_adamw()), steps=2, amendments={2: both}, show=False)


def test_a_rate_of_zero_cannot_be_amended_under_a_schedule() -> None:
    changes = {2: {"optimizer.lr": 0.0}, 4: {"optimizer.lr": 1e-3}}
    mh.train(gpt_recipe(), steps=3, amendments=changes, show=False)
    with pytest.raises(mh.ConfigError, match="a learning rate of 0 can't be amended"):
        mh.train(gpt_recipe(), steps=4, amendments=changes, show=False)


@pytest.mark.slow
def test_the_command_amends_a_run_whose_worker_is_killed(tmp_path: Path) -> None:
    command = [
        *MANYHANDS,
        "train",
        str(SUPPORT / "faulty.toml"),
        *PATIENT,
        "--workers",
        "1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--skip-step", "2", "--amend", "optimizer.lr=0.05", "--from-step", "3", "--snapshot-every", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"FAULT": "kill-once forward 13 0", "FAULT_TIME": str(tmp_path / "fault")},
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 was skipped" in done.stderr
    assert "from step 3 on, optimizer.lr = 0.05" in done.stderr
    rates = [metrics.learning_rates for metrics in RunDirectory(tmp_path / "run").read_metrics()]
    assert rates == [(0.1,)] * 2 + [(0.05,)] * 3
    assert (tmp_path / "fault").exists()
    loaded = mh.load_recipe(SUPPORT / "faulty.toml")
    amended: dict[str, Any] = {"skip_steps": [2], "amendments": {3: {"optimizer.lr": 0.05}}}
    expected = mh.train(loaded.recipe, steps=5, strategy=loaded.strategy, show=False, **amended)
    assert RunDirectory(tmp_path / "run").read_metrics()[-1].digest == expected.digest
    command += ["--amend", "clip_norm=1"]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert wrong.returncode == 2
    assert "--amend and --from-step must be used together" in wrong.stderr
