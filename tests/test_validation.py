"""Validations give the same figures for any number of workers, leave no trace, and decide the same after a kill."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands import metrics
from manyhands.checkpoint.format import list_checkpoints, read_manifest
from manyhands.comm.group import Group
from manyhands.data.epochs import Epochs
from manyhands.errors import ConfigError, DataError, WorkerError
from manyhands.intervals import Period
from manyhands.listeners.run_directory import RunDirectory
from manyhands.validation import Validation
from support.threads import run_threads

LABELS, PREDICTIONS = [0, 1, 0, 1, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
SAMPLES = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
WAYS = [(workers, sharding) for workers in (1, 2, 3) for sharding in ("ddp", "zero3")]


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
        return out + 1e-3 * self.calls  # so that a micro-batch would notice an earlier one


def recipe_of(**changes: Any) -> mh.Recipe:
    given = {
        "model": Net,
        "loss": lambda model, batch: (model(batch[0]) - batch[0]).square().mean(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "data": torch.utils.data.TensorDataset(SAMPLES),
        "batch": mh.Batch(global_size=12, micro_size=4),
    }
    return mh.Recipe(**given | changes)  # type: ignore[arg-type]


def on_workers(work: Callable[[mh.Engine], Any], workers: int, sharding: str, recipe: mh.Recipe | None = None) -> Any:
    """Call `work` on the engines of all workers; check that the results are equal, and return one."""

    def run(group: Group | None) -> Any:
        with mh.Engine(recipe or recipe_of(), mh.Strategy(sharding=sharding), group) as engine:
            return work(engine)

    found = run_threads(workers, run)
    assert all(repr(each) == repr(found[0]) for each in found)
    return found[0]


# - Figures


def predicted(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return batch[2], batch[1]


@pytest.mark.parametrize(("workers", "sharding"), WAYS)
def test_each_of_ten_samples_counts_once(workers: int, sharding: str) -> None:
    data = [(SAMPLES[i], torch.tensor(LABELS[i]), torch.tensor(PREDICTIONS[i])) for i in range(10)]
    figures = {
        "accuracy": metrics.accuracy(classes=2, pick=predicted),
        "binary": metrics.f1(average="binary", classes=2, pick=predicted),
        "macro": metrics.f1(classes=2, pick=predicted),
        "confusion": metrics.confusion(classes=2, pick=predicted),
    }
    found = on_workers(lambda engine: engine.evaluate(data, figures, batch=4).metrics, workers, sharding)
    assert found["accuracy"] == 7 / 10
    assert (found["binary"], found["macro"]) == (0.8, pytest.approx(0.6, abs=1e-15))
    assert found["confusion"] == [[1, 3], [0, 6]]


def test_fewer_samples_than_workers() -> None:
    found = on_workers(lambda engine: engine.evaluate([SAMPLES[:1]] * 2, batch=4), 3, "zero3")
    assert (found.weight, found.samples) == (2.0, 2)
    with pytest.raises(DataError, match=r"validation\.data is empty"):
        mh.Engine(recipe_of(validation=Validation(data=[])))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_token_losses_are_divided_once(workers: int, batch: int) -> None:
    """Padding has the label -100. The mean of rows' perplexities would be 1.246245, the mean of means 1.241930."""
    nats = torch.tensor([[0.1, 0.2, 0.1, 0.0, 0.0], [0.3, 0.5, 0.1, 0.4, 0.2]], dtype=torch.float64)
    labels = torch.tensor([[1, 1, 1, -100, -100], [1, 1, 1, 1, 1]])

    def loss(model: nn.Module, given: Any) -> tuple[Tensor, Tensor]:
        counts = given[1] != -100
        return (given[0] * counts).sum() + 0 * model(torch.ones(1, 8)).sum(), counts.sum()

    data = torch.utils.data.TensorDataset(nats, labels)
    recipe = recipe_of(loss=loss, data=data)
    found = on_workers(lambda engine: engine.evaluate(data, ["perplexity"], batch=batch), workers, "ddp", recipe)
    assert found.loss == pytest.approx(1.9 / 8, abs=1e-7)
    assert found.metrics["perplexity"] == pytest.approx(1.268075, abs=1e-6)


def test_sums_are_added_in_the_order_of_the_data() -> None:
    values = [10.0 ** (index % 17 - 8) * (1 + index / 7) for index in range(200)]
    data = [torch.full((8,), value, dtype=torch.float64) for value in values]

    def of_first(output: Any, batch: Any) -> tuple[Tensor, int]:
        return batch[:, 0].sum(), len(batch)

    recipe = recipe_of(loss=lambda model, batch: model(batch.float()).sum() * 0 + 1.0)
    expected = 0.0
    for value in values:
        expected += value
    for workers in (1, 2, 3):
        found = on_workers(
            lambda engine: engine.evaluate(data, [of_first], batch=1).metrics["of_first"], workers, "ddp", recipe
        )
        assert found == expected / 200
    assert math.fsum(values) != expected, "the order of these sums doesn't matter"


@pytest.mark.parametrize("classes", [3, 5, 9])
def test_absent_classes_are_left_out(classes: int) -> None:
    labels, predictions = torch.tensor([2, 1, 0, 0, -100]), torch.tensor([2, 1, 0, 1, 2])
    measured = metrics.Measured(predictions, (None, labels), 0.0, 0.0, False, 5)
    for average, expected in (
        ("macro", 7 / 9),
        ("none", {"0": 2 / 3, "1": 2 / 3, "2": 1.0} | {str(number): None for number in range(3, classes)}),
    ):
        metric = metrics.f1(average=average, classes=classes)
        assert metric.figure(metric.measure(measured)) == pytest.approx(expected)
    ignored = metrics.Measured(predictions, (None, torch.full((5,), -100)), 0.0, 0.0, False, 5)
    metric = metrics.accuracy(classes=classes)
    assert metric.figure(metric.measure(ignored)) is None


def test_named_metrics_agree_with_torchmetrics() -> None:
    """Also in one evaluation over three workers, which adds torchmetrics' own states."""
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(50, 5, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    chances = torch.rand(50, generator=generator)
    data = torch.utils.data.TensorDataset(scores, labels, chances, (chances > 0.4).long())
    of_scores, of_chances = (lambda o, b: (b[0], b[1])), (lambda o, b: (b[2], (b[3])))
    figures: dict[str, Any] = {
        "accuracy": metrics.accuracy(pick=of_scores),
        "top_2": metrics.top_k(2, pick=of_scores),
        **{f"f1_{average}": metrics.f1(average=average, pick=of_scores) for average in ("macro", "micro", "weighted")},
        "precision": metrics.precision(pick=of_scores),
        "recall": metrics.recall(pick=of_scores),
        "auroc": metrics.auroc(thresholds=5000, pick=of_chances),
        "threshold": metrics.accuracy(threshold=0.5, pick=of_chances),
    }
    multiclass: dict[str, Any] = {"num_classes": 5}
    theirs: dict[str, Any] = {
        "accuracy": classification.MulticlassAccuracy(**multiclass, average="micro"),
        "top_2": classification.MulticlassAccuracy(**multiclass, average="micro", top_k=2),
        **{
            f"f1_{average}": classification.MulticlassF1Score(**multiclass, average=average)
            for average in ("macro", "micro", "weighted")
        },
        "precision": classification.MulticlassPrecision(**multiclass),
        "recall": classification.MulticlassRecall(**multiclass),
        "auroc": classification.BinaryAUROC(),  # stores all predictions
        "threshold": classification.BinaryAccuracy(),
    }
    of = {"auroc": of_chances, "threshold": of_chances}
    both = figures | {f"their_{k}": metrics.torchmetric(v, pick=of.get(k, of_scores)) for k, v in theirs.items()}
    recipe = recipe_of(loss=lambda model, batch: model(torch.ones(2, 8)).mean())
    found = on_workers(lambda engine: engine.evaluate(data, both, batch=7).metrics, 3, "ddp", recipe)
    for name in figures:
        assert found[name] == pytest.approx(found[f"their_{name}"], abs=2e-4 if name == "auroc" else 1e-6), name


def test_a_metric_of_torchmetrics_that_decides_by_batch_is_refused() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    metric = metrics.torchmetric(classification.BinaryAUROC(thresholds=20))
    assert isinstance(metric, metrics.Metric)
    labels = torch.tensor([0, 1])
    metric.measure(metrics.Measured(torch.tensor([0.2, 0.9]), (None, labels), 0.0, 0.0, False, 2))
    with pytest.raises(ConfigError, match="BinaryAUROC decides from the values of each batch"):
        metric.measure(metrics.Measured(torch.tensor([-2.0, 0.9]), (None, labels), 0.0, 0.0, False, 2))


def test_collected_values_come_in_the_order_of_the_data() -> None:
    data = [(SAMPLES[index], index) for index in range(11)]
    seen: list[Any] = []

    def pick(output: Any, batch: Any) -> dict[str, Any]:
        return {"index": batch[1], "text": [f"ü{index}" for index in batch[1].tolist()], "row": output[:, :3]}

    def then(values: dict[str, Any]) -> dict[str, float]:
        seen.append(values)
        return {"count": len(values["text"]), "last": float(values["index"][-1])}

    figures = [
        metrics.collected(pick, then, name="all"),
        metrics.collected(lambda o, b: b[1], lambda v: v[3], name="x"),
    ]
    for workers in (1, 3):
        found = on_workers(lambda engine: engine.evaluate(data, figures, batch=2).metrics, workers, "ddp")
        assert found == {"all": {"count": 11.0, "last": 10.0}, "x": 3.0}
    one, three = seen
    assert one["index"].tolist() == three["index"].tolist() == list(range(11))
    assert one["text"] == three["text"] == [f"ü{index}" for index in range(11)]
    assert one["row"].shape == (11, 3)
    assert one["row"].tobytes() == three["row"].tobytes()


def test_a_metric_that_would_collect_too_much_is_refused() -> None:
    figures = [metrics.collected(lambda o, b: o, lambda values: 0.0, name="logits", max_bytes=1000)]
    with pytest.raises(ConfigError, match=r"the metric logits would collect too much(.|\n)*got: 2\.00 KiB"):
        on_workers(lambda engine: engine.evaluate(list(SAMPLES), figures), 1, "ddp", recipe_of(loss=of_plain_batch))


def of_plain_batch(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch).square().mean()
    return loss


# - No trace


def noise(output: Any, batch: Any) -> tuple[Tensor, int]:
    random.random(), np.random.rand()
    return torch.rand(len(batch[0])).double().sum(), len(batch[0])


def state_of(engine: mh.Engine) -> list[object]:
    buffers = {name: buffer.tolist() for name, buffer in engine.model.named_buffers()}
    modes = [module.training for module in engine.model.modules()]
    return [
        engine.digest(),
        buffers,
        modes,
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state(),
    ]


def test_evaluations_leave_no_trace() -> None:
    held_out = torch.utils.data.TensorDataset(SAMPLES[:10] + 1)

    def trained(every: int | None, *, at_start: bool = False) -> Callable[[mh.Engine], Any]:
        def work(engine: mh.Engine) -> Any:
            found = []
            for batch in engine.batches(12):
                if every is not None and engine.step_index % every == 0 and (engine.step_index or at_start):
                    engine.model.layers[1].eval()  # type: ignore[index]
                    before = repr(state_of(engine)[1:3])
                    found.append(engine.evaluate(held_out, [noise], batch=3))
                    assert repr(state_of(engine)[1:3]) == before
                engine.step(batch)
            return [engine.digest(), {name: b.tolist() for name, b in engine.model.named_buffers()}], found

        return work

    found = []
    for workers, sharding in WAYS:
        plain, _ = on_workers(trained(None), workers, sharding)
        often, figures = on_workers(trained(1, at_start=True), workers, sharding)
        seldom, _ = on_workers(trained(3), workers, sharding)
        assert plain == often == seldom
        assert len(figures) == 12
        assert len({each.metrics["noise"] for each in figures}) == 1, "its random numbers depend on the step"
        found.append((plain, figures[-1].loss.hex(), figures[0].metrics))
    assert all(each == found[0] for each in found)


def test_generators_are_as_before() -> None:
    with mh.Engine(recipe_of()) as engine:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        before = repr(state_of(engine))
        engine.evaluate(torch.utils.data.TensorDataset(SAMPLES), [noise])
        assert repr(state_of(engine)) == before


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_run_with_validations_has_the_digest_of_a_run_without(loader_workers: int) -> None:
    held_out = torch.utils.data.TensorDataset(SAMPLES[:10] + 1)
    several = {
        "validation": Validation(data=held_out, metrics=[noise], every="2 steps", batch=3, at_start=True),
        "far-off": Validation(data=torch.utils.data.TensorDataset(SAMPLES * 9), every="1 epoch", samples=20),
    }
    strategy = mh.Strategy(loader_workers=loader_workers)
    plain = mh.train(recipe_of(), steps=7, strategy=strategy, show=False)
    found = mh.train(recipe_of(validation=several), steps=7, strategy=strategy, show=False)
    assert found.digest == plain.digest
    assert found.validations["far-off"]["samples"] == 20
    assert found.validations["far-off"]["step"] == found.validations["validation"]["step"] == 7


# - When, and what follows


def test_periods() -> None:
    def ends(text: str, steps: int) -> list[int]:
        period, epochs = Period.parsed(text, "every"), Epochs(10, mh.Batch(global_size=4, micro_size=2), "join")
        return [step for step in range(1, steps + 1) if period.ends_with(step, epochs.complete_after)]

    assert ends("500 steps", 1200) == [500, 1000]
    assert ends("1 epoch", 8) == [3, 5, 8]
    assert ends("0.5 epochs", 6) == [2, 3, 4, 5]
    for wrong in (3, "3", "1.5 steps", "0 steps", "2 min", "epoch"):
        with pytest.raises(ConfigError, match="can't be parsed"):
            Validation(data=[1], every=wrong)  # type: ignore[arg-type]


class Counter(nn.Module):
    """Its weight is the number of steps, if its gradient is -1 and the learning rate 1."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))


def scripted(losses: list[float], **of_validation: Any) -> mh.Recipe:
    """A recipe whose validation losses are those of the list, by step."""

    def loss(model: Counter, batch: Tensor) -> Tensor:
        if model.training:
            return -model.steps
        return model.steps.double() * 0 + losses[int(model.steps)]

    return mh.Recipe(
        model=Counter,
        loss=loss,  # type: ignore[arg-type]
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        data=[torch.zeros(1)] * 6,
        batch=mh.Batch(global_size=6, micro_size=1),
        validation=Validation(data=[torch.zeros(1)], **of_validation),
    )


def validations_of(run: Path) -> list[tuple[int, float]]:
    return [(each["step"], each["loss"]) for each in RunDirectory.open_existing(run).read_validations()]


def test_the_best_checkpoint_is_of_the_very_step_and_stays(tmp_path: Path) -> None:
    """Losses 4 2 3 5 after steps 3, 6, 9 and 12; a tie at step 9 in the second case, and NaN."""
    for number, losses in enumerate(
        ([0, 0, 0, 4, 0, 0, 2, 0, 0, 3, 0, 0, 5], [0, 0, 0, math.nan, 0, 0, 2, 0, 0, 2, 0, 0, 5])
    ):
        run = tmp_path / str(number)
        recipe = scripted(list(map(float, losses)), every="3 steps")
        summary = mh.train(
            recipe,
            steps=12,
            run_dir=run,
            checkpoint_every=5,
            keep_checkpoints=1,
            digest_every=1,
            keep_best="validation.loss:min",
            show=False,
        )
        assert summary.best == {"validation.loss:min": {"step": 6, "value": 2.0}}
        assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [6, 12]
        digests = {each.step: each.digest for each in RunDirectory(run).read_metrics()}
        assert read_manifest(run / "checkpoints" / "step-00000006").digest == digests[6]
        assert [step for step, _ in validations_of(run)] == [3, 6, 9, 12]


LOSSES = [9.0, 1.0, 0.8, 0.9, 0.85, 0.81, 0.7, 0.6]


def patient_run(run: str, kill_after: int | None) -> list[Any]:
    """Train in a worker that kills itself between step `kill_after` and its validation."""
    recipe = scripted(LOSSES, every="1 steps", patience=3)
    if kill_after is not None:
        plain = recipe.loss

        def loss(model: Any, batch: Tensor) -> Any:
            if not model.training and int(model.steps) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(model, batch)

        object.__setattr__(recipe, "loss", loss)
    summary = mh.train(
        recipe, steps=7, run_dir=run, checkpoint_every=1, keep_best="validation.loss:min", digest_every=1, show=False
    )
    return [summary.steps, summary.best, summary.digest]


def test_patience_ends_a_run_also_if_it_was_killed(tmp_path: Path) -> None:
    plain = patient_run(str(tmp_path / "plain"), None)
    assert plain[:2] == [5, {"validation.loss:min": {"step": 2, "value": 0.8}}]
    killed = str(tmp_path / "killed")
    for kill_after in (3, 5):
        with pytest.raises(WorkerError):
            mh.launch(patient_run, killed, kill_after, workers=1)
    assert mh.launch(patient_run, killed, None, workers=3) == [plain] * 3
    assert validations_of(tmp_path / "killed") == validations_of(tmp_path / "plain")
    assert [step for step, _ in validations_of(tmp_path / "plain")] == [1, 2, 3, 4, 5]
    # A run that has stopped early makes no further step.
    assert patient_run(killed, None) == plain


def test_patience_that_is_changed_takes_effect_when_a_run_goes_on(tmp_path: Path) -> None:
    """Also a shorter one: the validations without an improvement are counted, not the decision."""

    def steps(patience: int | None) -> int:
        recipe = scripted([9.0, 1.0, 2.0, 3.0, 4.0, 0.5, 0.6], every="1 steps", patience=patience)
        return mh.train(recipe, steps=6, run_dir=tmp_path, show=False).steps

    assert [steps(patience) for patience in (1, 3, 2, None)] == [2, 4, 4, 6]
    texts = [f"{count} validations without a better loss:min by 0" for count in (1, 3, 2)] + ["none"]
    changed = [each for each in RunDirectory(tmp_path).read_events() if each["event"] == "patience changed"]
    assert [(each["step"], each["before"], each["after"]) for each in changed] == [
        (2, texts[0], texts[1]),
        (4, texts[1], texts[2]),
        (4, texts[1], texts[3]),  # no step was made, and no checkpoint written, with a patience of 2
    ]
    assert [step for step, _ in validations_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_validation_of_an_end_does_not_count_for_patience_if_the_run_goes_on(tmp_path: Path) -> None:
    def steps(run: str, steps: int) -> int:
        losses = [9.0, 9.0, 1.0, 9.0, 0.9, 2.0, 0.95, 9.0, 0.97, 0.98, 0.99]
        recipe = scripted(losses, every="2 steps", patience=2)
        return mh.train(recipe, steps=steps, run_dir=tmp_path / run, show=False).steps

    assert steps("whole", 10) == 8
    assert [steps("parts", end) for end in (3, 5, 10)] == [3, 5, 8]
    assert [step for step, _ in validations_of(tmp_path / "parts")] == [2, 3, 4, 5, 6, 8]


def test_the_state_before_the_first_step_may_be_the_best(tmp_path: Path) -> None:
    def train(steps: int, *keep_best: str) -> Any:
        recipe = scripted([0.5, 1.0, 2.0, 3.0, 0.1], every="1 steps", at_start=True)
        arguments = {"run_dir": tmp_path, "keep_checkpoints": 1, "keep_best": keep_best, "show": False}
        best = mh.train(recipe, steps=steps, **arguments).best  # type: ignore[arg-type]
        return best, [step for step, _ in list_checkpoints(tmp_path / "checkpoints")]

    assert train(2, "validation.loss:min") == ({"validation.loss:min": {"step": 0, "value": 0.5}}, [0, 2])
    # Without keep_best, the checkpoint stays, but nothing is said about the best.
    assert train(3) == ({}, [0, 3])
    assert train(4, "validation.loss:min") == ({"validation.loss:min": {"step": 4, "value": 0.1}}, [4])


def test_a_complete_run_says_that_there_is_nothing_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        summary = mh.train(scripted(LOSSES, every="2 steps"), steps=3, run_dir=tmp_path)
    assert "the run already has 3 steps, so there is nothing to train" in capfd.readouterr().err
    assert summary.validations["validation"]["loss"] == 0.9


def test_a_validation_that_an_interruption_prevented_is_made_on_resume(tmp_path: Path) -> None:
    recipe = scripted(LOSSES, every="2 steps")
    sent: list[int] = []

    def interrupted(model: Any, batch: Tensor) -> Any:
        if model.training and int(model.steps) == 4 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return recipe.loss(model, batch)

    stopping = scripted(LOSSES, every="2 steps")
    object.__setattr__(stopping, "loss", interrupted)
    with pytest.raises(mh.Interrupted):
        mh.train(stopping, steps=7, run_dir=tmp_path, show=False)
    assert [step for step, _ in validations_of(tmp_path)] == [2, 4]
    mh.train(recipe, steps=7, run_dir=tmp_path, show=False)
    assert validations_of(tmp_path) == [(2, 0.8), (4, 0.85), (6, 0.7), (7, 0.6)]


def test_state_of_the_users_own_is_saved_and_loaded(tmp_path: Path) -> None:
    with mh.Engine(recipe_of()) as engine:
        engine.extra_state = {"seen": 3, "names": ["a", ("b", 2.5)], "best": math.inf}
        saved = engine.save(tmp_path)
        engine.extra_state = {"best": math.nan}
        engine.save(tmp_path / "nan")
        engine.extra_state = {"tensor": torch.zeros(1)}
        with pytest.raises(mh.CheckpointError, match=r"engine\.extra_state can't be saved exactly"):
            engine.save(tmp_path / "other")
    with mh.Engine(recipe_of()) as engine:
        engine.load(saved)
        assert engine.extra_state == {"seen": 3, "names": ["a", ("b", 2.5)], "best": math.inf}


# - Refusals before step 1


def test_what_is_wrong_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(SAMPLES)

    def broken(output: Any, batch: Any) -> Any:
        return output.no_such_attribute

    def by_rank(output: Any, batch: Any) -> Any:
        return torch.zeros(len(batch))

    for given, arguments, message in (
        ({"metrics": ["acuracy"]}, {}, r"there is no metric 'acuracy'(.|\n)*did you mean 'accuracy'"),
        ({"metrics": ["top_k"]}, {}, "the metric 'top_k' needs arguments"),
        ({"metrics": [lambda o, b: (1, 1)]}, {}, "a metric has no name, because it is a lambda"),
        ({"metrics": ["accuracy"]}, {}, "a metric doesn't find the labels in the batch"),
        ({"metrics": [broken]}, {}, r"the metric broken raised AttributeError(.|\n)*validation, micro-batch 0"),
        ({"metrics": [by_rank]}, {}, r"the metric by_rank returned something other than \(sum, weight\)"),
        ({"metrics": {"loss": noise}}, {}, "the name of a metric of validation is the name of another figure"),
        ({}, {"keep_best": "validation.acuracy:max"}, r"there is no figure validation\.acuracy"),
        ({}, {"keep_best": "validation.loss"}, "keep_best can't be parsed"),
        ({"patience": 2, "watch": "los:min"}, {}, r"there is no figure validation\.los(.|\n)*did you mean 'loss'"),
        ({"patience": 2, "watch": "validation.loss:min"}, {}, r"without 'validation\.'(.|\n)*did you mean 'loss'"),
    ):
        recipe = recipe_of(validation=Validation(data=data, **given))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            mh.train(recipe, steps=1, run_dir=tmp_path, show=False, **arguments)  # type: ignore[arg-type]
    for recipe, place, message in (
        (recipe_of(), tmp_path, "keep_best needs a validation"),
        (recipe_of(validation=Validation(data=data)), None, "keep_best has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            mh.train(recipe, steps=1, run_dir=place, keep_best="validation.loss:min", show=False)
    with pytest.raises(ConfigError, match=r"have no effect without validation\.patience"):
        Validation(data=data, watch="accuracy:max")


# - Recipe files and the command

RECIPE = """
name = "shapes"
steps = 4
model = { path = "parts:model" }
loss = { path = "parts:loss" }
data = { path = "parts:data" }
optimizer = { path = "torch.optim:SGD", arguments = { lr = 0.1 } }
batch = { global_size = 4, micro_size = 2 }

[validation]
data = { path = "parts:data", arguments = { shift = 1.0 } }
metrics = ["accuracy", { name = "f1", arguments = { average = "none" } }, "parts:mean_score"]
every = "2 steps"
batch = 3

[validations.other]
data = { path = "parts:data", arguments = { shift = 2.0 } }
metrics = [
    { path = "parts:mean_score", arguments = { times = 2.0 } },
    "parts:exact",
    "parts:Rows",
    { path = "parts:Rows", arguments = { times = 2 } },
    "parts:right",
]
every = "3 steps"
"""

PARTS = """
import torch
from torch import nn
from manyhands import metrics

def model():
    return nn.Linear(4, 3)

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def data(shift=0.0):
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + shift
    return [(row, index % 3) for index, row in enumerate(rows)]

def mean_score(output, batch, times=1.0):
    return output.double().sum() * times, output.numel()

exact = metrics.collected(
    lambda output, batch: (output.argmax(-1), batch[1]), lambda values: (values[0] == values[1]).mean(), name="exact"
)

class Rows(metrics.Metric):
    def __init__(self, times=1):
        self.name, self.times = f"rows_{times}", times

    def measure(self, measured):
        return {"rows": len(measured.output) * self.times}

    def figure(self, totals):
        return float(totals["rows"])

class Right(nn.Module):  # like a metric of torchmetrics

    def __init__(self):
        super().__init__()
        self._defaults = {"right": torch.tensor(0)}
        self._reductions = {"right": dim_zero_sum}
        self.reset()

    def reset(self):
        self.right = torch.tensor(0)

    def update(self, scores, labels):
        self.right = self.right + (scores.argmax(-1) == labels).sum()

    def compute(self):
        return self.right

    def forward(self, *_):
        raise AssertionError

def dim_zero_sum(x):
    return x

right = Right()
"""


def test_a_recipe_file_declares_validations(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "parts.py").write_text(PARTS)
    script = (
        "import json, sys, manyhands as mh; loaded = mh.load_recipe(sys.argv[1]);"
        "mh.train(loaded.recipe, steps=loaded.steps, run_dir=sys.argv[2], recipe_as_used=loaded.settings, show=False);"
        "found = mh.evaluate(loaded.recipe, sys.argv[2], show=False);"
        "print(json.dumps({name: each.as_json() for name, each in found.items()}))"
    )
    import subprocess
    import sys

    again = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "recipe.toml"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    recorded = RunDirectory.open_existing(tmp_path / "run").read_validations()
    assert [(each["step"], each["set"]) for each in recorded] == [
        (2, "validation"),
        (3, "other"),
        (4, "other"),
        (4, "validation"),
    ]
    assert set(recorded[0]["f1"]) == {"0", "1", "2"}
    other = recorded[2]
    assert other["mean_score"] is not None
    assert (other["rows_1"], other["rows_2"], other["right"] / 10) == (10, 20, other["exact"])
    found = json.loads(again.stdout)
    assert [found["other"], found["validation"]] == recorded[2:]
    evaluated = subprocess.run(
        [sys.executable, "-m", "manyhands.cli.main", "evaluate", "recipe.toml", "run", "--workers", "2", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(evaluated.stdout) == found
    unknown = subprocess.run(
        [sys.executable, "-m", "manyhands", "evaluate", "recipe.toml", "run", "--workers", "2", "--only", "otter"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert unknown.returncode == 2
    assert "the recipe has no validation 'otter'" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_mistakes_in_the_table_of_a_validation_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    for old, new, message in (
        (
            '"parts:mean_score"]',
            '"parts:mean_scores"]',
            r"validation\.metrics\.2\.path: parts has no mean_scores(.|\n)*:12",
        ),
        ('"parts:right"', '{ path = "parts:right", arguments = { a = 1 } }', r"which takes no arguments(.|\n)*:18"),
        ("times = 2 }", "time = 2 }", r"Rows takes no time(.|\n)*did you mean"),
        ('every = "2 steps"', 'every = "2"', r"validation\.every can't be parsed(.|\n)*say which"),
        ('name = "f1"', 'name = "f2"', r"has no f2(.|\n)*did you mean 'f1'"),
        ("batch = 3", "bach = 3", r"bach(.|\n)*did you mean 'batch'"),
        ('average = "none"', 'averag = "none"', r"takes no averag"),
        (
            "[validations.other]",
            "[validations.validation]",
            r"two validations with the name 'validation'(.|\n)*recipe\.toml",
        ),
    ):
        assert old in RECIPE
        (tmp_path / "recipe.toml").write_text(RECIPE.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            mh.load_recipe(tmp_path / "recipe.toml")
