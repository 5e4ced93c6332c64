"""What a loss function may return: a scalar or (sum, weight), with named metrics or without. The rest is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.listeners.run_directory import RunDirectory
from manyhands.listeners.terminal import TrainingProgress
from support.threads import run_threads
from support.training import train_with_engine
from test_bad_input import on_all
from test_trust_nothing import Net, recipe


def with_result(make: Callable[[Tensor, Tensor], Any], **options: Any) -> mh.Recipe:
    """A recipe whose loss function returns `make(mean, batch)`."""

    def loss(model: nn.Module, batch: Tensor) -> Any:
        return make(model(batch).square().mean(), batch)

    return recipe(Net, loss=loss, **options)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "true": (lambda loss, batch: (loss, True), "True as the weight"),
    "a mask": (lambda loss, batch: (loss, torch.tensor(True)), "a tensor of type torch.bool as the weight"),
    "text": (lambda loss, batch: (loss, "4"), "str as the weight"),
    "two losses": (lambda loss, batch: (loss, 2 * loss), "with a gradient, though weights are constants"),
    "a rounded count": (lambda loss, batch: (loss, torch.tensor(511, dtype=torch.bfloat16)), "rounds counts above 256"),
    "a complex weight": (lambda loss, batch: (loss, torch.tensor(2j)), "torch.complex64 as the weight"),
    "an integer": (lambda loss, batch: torch.tensor(3), "a tensor of type torch.int64"),
    "a complex loss": (lambda loss, batch: loss * 1j, "a tensor of type torch.complex64"),
    "a detached loss": (lambda loss, batch: loss.detach(), r"a tensor without a gradient \(from detach"),
    "a loss without a value": (lambda loss, batch: loss.to("meta"), "on the meta device"),
    "a dict": (lambda loss, batch: {"loss": loss}, r'dict(?s:.*)the result\'s \["loss"\]'),
    "a dict and more": (lambda loss, batch: ({"loss": loss}, loss), r'dict(?s:.*)the result\'s \["loss"\]'),
    "a list": (lambda loss, batch: [loss, 4], "list(?s:.*)return a tuple instead of a list"),
    "four things": (lambda loss, batch: (loss, 4, {}, None), "tuple(?s:.*)return other figures as metrics"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_results_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(mh.ConfigError, match=rf"recipe.loss did not return a loss(?s:.*){message}"):
        train_with_engine(with_result(make), mh.Strategy(), steps=1)


METRICS: dict[str, tuple[Any, str]] = {
    "a number": ({"accuracy": 0.5}, "float"),
    "a tensor": ({"accuracy": torch.tensor([0.5, 0.5])}, "Tensor"),
    "a vector": ({"accuracy": (torch.ones(2), 2)}, r"shape \(2,\)"),
    "no number": ({"accuracy": (None, 2)}, "NoneType"),
    "another name": ({3: (1, 2)}, "a name of type int"),
    "a truth value": ({"accuracy": (1, True)}, "True"),
}


@pytest.mark.parametrize("case", METRICS)
def test_other_metrics_are_refused(case: str) -> None:
    metrics, message = METRICS[case]
    with pytest.raises(mh.ConfigError, match=rf"returned the metric .* than \(sum, weight\)(?s:.*){message}"):
        train_with_engine(with_result(lambda loss, batch: (loss, metrics)), mh.Strategy(), steps=1)


WEIGHTS: dict[str, tuple[Callable[[Tensor, Tensor], float], type[Exception], str]] = {
    "accuracy": (lambda loss, batch: 0.75, mh.ConfigError, "weight of micro-batch 0 is not a whole number: 0.75"),
    "negative": (lambda loss, batch: -2.0, mh.ConfigError, "weight of micro-batch 0 is negative: -2"),
    "nan": (lambda loss, batch: float("nan"), mh.NumericsError, "weight of micro-batch 0 is nan"),
    "infinite": (lambda loss, batch: float("inf"), mh.NumericsError, "weight of micro-batch 0 is inf"),
    "zero": (lambda loss, batch: 0, mh.NumericsError, "the global batch has no weight"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_wrong_weight_is_refused_with_its_reading_on_all_workers(case: str) -> None:
    weigh, kind, message = WEIGHTS[case]
    made = with_result(lambda loss, batch: (loss, weigh(loss, batch)))
    errors = on_all(lambda rank, group: train_with_engine(made, mh.Strategy(), steps=1, group=group))
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert type(error) is kind, error
        assert message in str(error)
        assert "the pair is read as a sum of" in str(error)
        assert '(loss, {"accuracy": (correct, count)})' in str(error)
        assert "fractional_weights = true" in str(error)


def test_an_accuracy_that_is_a_whole_number_at_first_is_refused_when_it_is_not() -> None:
    calls = [0]

    def make(loss: Tensor, batch: Tensor) -> tuple[Tensor, float]:
        calls[0] += 1
        return loss, 1.0 if calls[0] <= 4 else 0.5

    with mh.Engine(with_result(make)) as engine:
        batches = engine.batches(2)
        engine.step(next(batches))
        with pytest.raises(mh.ConfigError, match=r"weight of micro-batch 0 is not a whole number: 0.5(?s:.*)step 2"):
            engine.step(next(batches))


def test_fractional_weights_are_allowed_by_the_recipe_and_a_micro_batch_may_have_none() -> None:
    def make(loss: Tensor, batch: Tensor) -> tuple[Tensor, float]:
        weight = float(batch[0, 0] > 0) * 0.75
        return loss * weight, weight

    made = with_result(make, fractional_weights=True)
    expected = train_with_engine(made, mh.Strategy(), steps=2)
    assert run_threads(3, lambda group: train_with_engine(made, mh.Strategy(), steps=2, group=group).digest) == (
        [expected.digest] * 3
    )
    with pytest.raises(mh.ConfigError, match=r"recipe.fractional_weights has the wrong type"):
        with_result(make, fractional_weights=1)


def test_weights_in_some_micro_batches_only_are_refused() -> None:
    calls = [0]

    def make(loss: Tensor, batch: Tensor) -> Any:
        calls[0] += 1
        return (loss * 2, 2) if calls[0] == 2 else loss

    with pytest.raises(mh.ConfigError, match=r"a different form than before(?s:.*)a scalar(?s:.*)\(sum, weight\)"):
        train_with_engine(with_result(make), mh.Strategy(), steps=1)
    calls[0] = 0
    made = [with_result(lambda loss, batch: loss), with_result(lambda loss, batch: (loss, {"mean": (loss, 1)}))]
    for error in on_all(lambda rank, group: train_with_engine(made[rank], mh.Strategy(), steps=1, group=group)):
        assert isinstance(error, mh.ConfigError)
        assert "don't have the same loss function: they differ in the returned form" in str(error)


def with_metrics(weighted: bool) -> mh.Recipe:
    def make(loss: Tensor, batch: Tensor) -> Any:
        large = batch > 0.5
        metrics = {"large": (large.sum(), batch.numel()), "mean": (batch.double().sum().item(), len(batch))}
        if batch[0, 0] > 0:
            metrics["rare"] = (batch[0, 0].half(), 1)
        else:
            metrics["rare"] = (0, 0)
        metrics["never"] = (loss, 0)
        return ((loss * len(batch), len(batch)) if weighted else loss), metrics

    return with_result(make)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_have_the_same_bits_with_any_number_of_workers(weighted: bool) -> None:
    def run(group: Group) -> list[dict[str, float]]:
        with mh.Engine(with_metrics(weighted), mh.Strategy(sharding="zero3"), group) as engine:
            return [engine.step(batch).metrics for batch in engine.batches(2)]

    (expected,) = run_threads(1, run)
    samples = torch.stack([with_metrics(weighted).data[index] for index in range(24)])
    assert 0 < expected[0]["large"] < 1
    assert expected[0]["mean"] != expected[1]["mean"]
    assert samples.double().sum(1).min() < expected[0]["mean"] < samples.double().sum(1).max()
    for workers in (2, 3):
        for found in run_threads(workers, run):
            assert repr(found) == repr(expected)  # NaN equals NaN
    assert repr(expected[0]["never"]) == "nan"


def test_metrics_are_in_the_run_directory_and_on_the_terminal(tmp_path: Path) -> None:
    mh.train(with_metrics(weighted=True), steps=2, run_dir=tmp_path / "run", show=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(line["metrics"]) for line in lines] == [{"large", "mean", "rare", "never"}] * 2
    metrics = RunDirectory(tmp_path / "run").read_metrics()
    assert metrics[1].metrics["large"] == lines[1]["metrics"]["large"]
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console)
    progress.began({"step": 0, "steps": 2})
    progress.step(metrics[0], [])
    assert f"large {metrics[0].metrics['large']:.4f}" in console.file.getvalue()  # type: ignore[attr-defined]
