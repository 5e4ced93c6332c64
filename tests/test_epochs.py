"""Epochs and the order of samples: how many steps there are, which samples each has, and that workers don't matter."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.cli.train import describer_of_samples
from manyhands.comm.group import Group
from manyhands.data.epochs import Epochs
from manyhands.data.sample_order import sample_order_of
from manyhands.documents.recipe_file import check_recipe_file
from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.listeners.run_directory import RunDirectory
from support.threads import run_threads
from test_recipe_file import MODULE, RECIPE

ROWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def recipe_of(**changes: Any) -> mh.Recipe:
    given = {
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)),
        "loss": lambda model, batch: model(batch).square().mean(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "data": list(ROWS),
        "batch": mh.Batch(global_size=4, micro_size=2),
    }
    return mh.Recipe(**given | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("end", "steps", "epochs"),
    [("join", 8, [1, 1, 1, 2, 2, 3, 3, 3]), ("short", 9, [1, 1, 1, 2, 2, 2, 3, 3, 3]), ("drop", 6, [1, 1, 2, 2, 3, 3])],
)
def test_three_epochs_of_ten_samples(end: str, steps: int, epochs: list[int], tmp_path: Path, capfd: Any) -> None:
    """With "join", a step belongs to the epoch of its first sample."""
    summary = mh.train(recipe_of(epochs=3, epoch_end=end), run_dir=tmp_path)
    assert summary.steps == steps
    metrics = RunDirectory(tmp_path).read_metrics()
    assert [each.epoch for each in metrics] == epochs
    assert [each.samples for each in metrics] == ([4, 4, 2] * 3 if end == "short" else [4] * steps)
    passes = {"join": "3.2", "short": "3", "drop": "3"}[end]
    assert f"{steps} steps = {passes} epochs of 10 samples, 4 in a step" in capfd.readouterr().err


@pytest.mark.parametrize("micro_size", [1, 2, 4])
def test_a_short_step_divides_by_its_own_samples(micro_size: int) -> None:
    """Over 1, 2 and 3 workers and all shardings, by digest; and the gradients are those of plain PyTorch."""
    batch = mh.Batch(global_size=4, micro_size=micro_size)

    def plain_model() -> nn.Module:
        return nn.Linear(4, 1)

    recipe = recipe_of(model=plain_model, epoch_end="short", order="sequential", batch=batch)
    found: list[Any] = []
    for workers in (1, 2, 3):
        for sharding in ("ddp", "zero2", "zero3"):
            if workers > batch.micro_batches:
                continue

            def run(group: Group | None, sharding: str = sharding) -> Any:
                with mh.Engine(recipe, mh.Strategy(sharding=sharding), group) as engine:
                    losses = [engine.step(batch).loss for batch in engine.batches(6)]
                    return losses, engine.digest(), {k: v.tolist() for k, v in engine.full_params().items()}

            found.append(run_threads(workers, run)[0])
            assert found[-1] == found[0]
    losses, _, weights = found[0]
    model = plain_model()
    with mh.Engine(recipe) as engine:
        model.load_state_dict(engine.full_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, rows in enumerate([ROWS[:4], ROWS[4:8], ROWS[8:]] * 2):
        optimizer.zero_grad()
        loss = model(rows).square().mean()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
    for name, param in model.named_parameters():
        torch.testing.assert_close(torch.tensor(weights[name]), param.detach(), rtol=1e-5, atol=1e-6)


def test_errors_name_the_samples_of_short_steps() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = model(batch).square().mean()
        return found * float("nan") if len(batch) == 1 else found

    given = {"data": list(ROWS[:9]), "epoch_end": "short", "order": "sequential"}
    recipe = recipe_of(loss=loss, model=lambda: nn.Linear(4, 1), **given)
    with pytest.raises(mh.NumericsError, match=r"samples 17 to 17 in the run's order \(in recipe\.data: 8\)"):
        mh.train(recipe, steps=9, skip_steps=[3], show=False)


def test_the_launcher_names_samples_only_if_it_knows_them(tmp_path: Path) -> None:
    """It doesn't read the data, on whose size the samples of later epochs depend."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "tiny.py").write_text(MODULE)
    described = {
        end: describer_of_samples(check_recipe_file(tmp_path / "recipe.toml", [f"epoch_end={end}"]))(5, 1)
        for end in ("join", "short", "drop")
    }
    assert described == {"join": "samples 34 to 35 in the run's order", "short": "", "drop": ""}


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_short_steps_have_the_same_bits_for_any_workers(sharding: str) -> None:
    """With dropout, batch norm, and micro-batches that are missing or smaller."""
    recipe = recipe_of(epoch_end="short", batch=mh.Batch(global_size=9, micro_size=3), data=list(ROWS) * 2)

    def run(group: Group | None) -> Any:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group) as engine:
            metrics = [engine.step(batch, digest=True) for batch in engine.batches(7)]
            buffers = {name: buffer.tolist() for name, buffer in engine.model.named_buffers()}
            return [(each.digest, each.loss, each.samples) for each in metrics], buffers

    found = [run_threads(workers, run)[0] for workers in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    assert [samples for _, _, samples in found[0][0]] == [9, 9, 2, 9, 9, 2, 9]


def counting_run(run: str, folder: str, steps: int | None) -> str:
    """Train for `steps` steps in total, or for two epochs, while each worker writes down its samples."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.write("".join(f"{int(index)}\n" for index in batch))
        total: Tensor = model(batch.float()[:, None]).sum()
        return total

    recipe = recipe_of(
        model=lambda: nn.Linear(1, 1),
        loss=loss,
        data=list(torch.arange(20)),
        epochs=2 if steps is None else None,
        batch=mh.Batch(global_size=4, micro_size=1),
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-6),
    )
    return mh.train(recipe, steps=steps, run_dir=run, show=False).digest


def test_each_sample_is_used_once_an_epoch_however_often_the_run_is_stopped(tmp_path: Path) -> None:
    """Stopped after steps 2, 4 and 7, and continued with another number of workers."""
    (tmp_path / "seen").mkdir()
    (tmp_path / "plain").mkdir()
    plain = counting_run(str(tmp_path / "run-plain"), str(tmp_path / "plain"), None)
    arguments = str(tmp_path / "run"), str(tmp_path / "seen")
    for steps in (2, 4):
        counting_run(*arguments, steps)
    mh.launch(counting_run, *arguments, 7, workers=3)
    assert counting_run(*arguments, None) == plain
    for folder in ("plain", "seen"):
        files = (tmp_path / folder).iterdir()
        numbers = Counter(int(line) for file in files for line in file.read_text().splitlines())
        assert numbers == Counter(list(range(20)) * 2)


# - Orders


def indices_of(recipe: mh.Recipe, epoch: int) -> list[int]:
    order = sample_order_of(recipe)
    return order.at(range(epoch * order.size, (epoch + 1) * order.size))


def test_sequential_and_own_orders() -> None:
    assert indices_of(recipe_of(order="sequential"), 3) == list(range(10))
    assert indices_of(recipe_of(order=lambda seed, epoch, place: (place + epoch) % 10), 1) == [*range(1, 10), 0]
    with pytest.raises(DataError, match=r"recipe\.order returned no valid index"):
        indices_of(recipe_of(order=lambda seed, epoch, place: 10), 0)
    for wrong in ("shuffled", [3, 1, 2], True, None):
        with pytest.raises(ConfigError, match=r"recipe\.order is not an order"):
            recipe_of(order=wrong)


def test_another_function_is_noticed_when_a_run_goes_on(tmp_path: Path) -> None:
    def ordered(order: Any) -> mh.Recipe:
        return recipe_of(order=order)

    with mh.Engine(ordered(lambda seed, epoch, place: (place * 3 + epoch) % 10)) as engine:
        saved = engine.save(tmp_path)
    with mh.Engine(ordered(lambda seed, epoch, place: (3 * place + epoch) % 10)) as engine:
        engine.load(saved)
    for other in (lambda seed, epoch, place: (place * 7) % 10, "sequential"):
        with mh.Engine(ordered(other)) as engine, pytest.raises(CheckpointError, match="order"):
            engine.load(saved)


def test_weighted_samples() -> None:
    weights = [0.0, 1.0, 3.0, 0.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    recipe = recipe_of(order=mh.weighted(weights, samples=20_000))
    counts = Counter(indices_of(recipe, 0))
    assert set(counts) == {1, 2, 4}
    for index, share in ((1, 0.1), (2, 0.3), (4, 0.6)):
        assert counts[index] / 20_000 == pytest.approx(share, abs=0.015)
    assert indices_of(recipe, 0) != indices_of(recipe, 1)
    few = recipe_of(order=mh.weighted(weights, samples=6), epoch_end="short")
    epochs, order = Epochs.of(few), sample_order_of(few)
    assert (epochs.size, epochs.steps(3)) == (6, 6)
    assert order.at(range(12)) == indices_of(few, 0) + indices_of(few, 1)
    with pytest.raises(ConfigError, match="another number of weights"):
        sample_order_of(recipe_of(order=mh.weighted([1.0])))
    for wrong in ([0.0], [-1.0, 2.0], [float("nan")]):
        with pytest.raises(ConfigError):
            mh.weighted(wrong)


def test_samples_of_similar_lengths_share_micro_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, size=1000)
    batch = mh.Batch(global_size=32, micro_size=8)
    recipe = recipe_of(order=mh.by_length(lengths.tolist()), data=list(range(1000)), batch=batch)

    def padding(indices: list[int]) -> float:
        groups = lengths[indices].reshape(-1, 8)
        return float(1 - groups.sum() / (groups.max(1) * 8).sum())

    first, second = indices_of(recipe, 0), indices_of(recipe, 1)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    assert lengths[first[:8]].max() == lengths.max(), "the longest sample is in the first micro-batch"
    assert padding(first) < 0.05 < 0.35 < padding(indices_of(recipe_of(data=list(range(1000)), batch=batch), 0))
    means = lengths[first].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3, "neighbouring micro-batches have similar lengths"


@pytest.mark.parametrize("end", ["join", "short", "drop"])
def test_micro_batches_of_similar_lengths_stay_whole_in_later_epochs(end: str) -> None:
    """1,003 is no multiple of 8, so joined epochs begin within a micro-batch."""
    lengths = np.random.default_rng(0).integers(1, 1000, size=1003)
    batch = mh.Batch(global_size=32, micro_size=8)
    order_given = mh.by_length(lengths.tolist())
    recipe = recipe_of(order=order_given, data=list(range(1003)), batch=batch, epoch_end=end)
    epochs, order = Epochs.of(recipe), sample_order_of(recipe)
    for epoch in (1, 2, 3):
        assert sorted(indices_of(recipe, epoch)) == list(range(1003))
    steps = range(epochs.steps(1), epochs.steps(3) - 1)
    groups = [lengths[order.at(epochs.positions(step, each))] for step in steps for each in epochs.present(step)]
    padded = sum(group.max() * len(group) for group in groups)
    assert 1 - sum(group.sum() for group in groups) / padded < 0.05
    few = recipe_of(order=mh.by_length([3, 1, 2]), data=list(range(3)), batch=mh.Batch(global_size=8, micro_size=8))
    assert [sorted(indices_of(few, epoch)) for epoch in range(4)] == [[0, 1, 2]] * 4


def test_a_run_with_an_order_goes_on_with_other_workers(tmp_path: Path) -> None:
    for number, order in enumerate(("sequential", mh.weighted([1.0, 2.0] * 5), mh.by_length([3, 1] * 5))):
        recipe = recipe_of(order=order)

        def run(group: Group | None, recipe: mh.Recipe = recipe) -> str:
            with mh.Engine(recipe, group=group) as engine:
                for each in engine.batches(5):
                    engine.step(each)
                return engine.digest()

        digests = {run_threads(workers, run)[0] for workers in (1, 2)}
        folder = tmp_path / str(number)
        mh.train(recipe, steps=2, run_dir=folder, show=False)
        digests.add(mh.train(recipe, steps=5, run_dir=folder, show=False).digest)
        assert len(digests) == 1
        with pytest.raises(mh.CheckpointError, match="order"):
            mh.train(recipe_of(), steps=6, run_dir=folder, show=False)


def test_lengths_of_runs_are_checked(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="both steps and epochs are set"):
        mh.train(recipe_of(epochs=1), steps=3)
    with pytest.raises(ConfigError, match="the number of steps is not set"):
        mh.train(recipe_of())
    with pytest.raises(ConfigError, match='epoch_end = "drop" leaves no step'):
        mh.train(recipe_of(epochs=1, epoch_end="drop", data=list(ROWS[:3])))
    assert mh.train(recipe_of(epochs=1, data=list(ROWS[:3]))).steps == 1
    assert "a step takes 4 samples, and an epoch has only 3" in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_the_first_step_may_lack_micro_batches_of_some_workers(sharding: str) -> None:
    """These workers have not seen what the loss function returns."""

    def loss(model: nn.Module, batch: Tensor) -> Any:
        found = model(batch).square()
        return (found.sum(), len(batch)), {"large": ((found > 0.1).sum(), len(batch))}

    recipe = recipe_of(loss=loss, data=list(ROWS[:6]), batch=mh.Batch(global_size=8, micro_size=2), epoch_end="short")

    def run(group: Group | None) -> Any:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group) as engine:
            metrics = [engine.step(batch) for batch in engine.batches(3)]
            return engine.digest(), [(each.loss, each.metrics, each.weight) for each in metrics]

    found = [run_threads(workers, run) for workers in (1, 2, 3, 4)]
    assert all(each == found[0][0] for results in found for each in results)
    assert [weight for _, _, weight in found[0][0][1]] == [6.0] * 3
