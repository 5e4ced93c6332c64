"""Metrics refuse what would give wrong figures, and evaluations give each micro-batch the same beginning."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands import metrics
from manyhands.comm.group import Group
from manyhands.errors import ConfigError, WorkerError
from support.threads import run_threads

SAMPLES = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.TensorDataset(SAMPLES)


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[0]).square().mean()
    return loss


def recipe_of(**changes: Any) -> mh.Recipe:
    given = {
        "model": lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)),
        "loss": mean_loss,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "data": DATA,
        "batch": mh.Batch(global_size=6, micro_size=2),
    }
    return mh.Recipe(**given | changes)  # type: ignore[arg-type]


def evaluated(recipe: mh.Recipe, given: Any = (), workers: int = 1, batch: int = 2, data: Any = DATA) -> mh.Evaluation:
    def run(group: Group | None) -> mh.Evaluation:
        with mh.Engine(recipe, group=group) as engine:
            return engine.evaluate(data, given, batch=batch)

    return run_threads(workers, run)[0]


def figure_of(metric: Any, predictions: Tensor, labels: Tensor) -> Any:
    return metric.figure(metric.measure(metrics.Measured(predictions, (None, labels), 0.0, 0.0, False, len(labels))))


@pytest.mark.parametrize("metric", [metrics.confusion(classes=3), metrics.f1(classes=3), metrics.accuracy(classes=3)])
def test_predictions_that_are_no_class_are_refused(metric: Any) -> None:
    """A confusion matrix would count the prediction 4 of class 0 as the prediction 1 of class 1."""
    for predictions in (torch.tensor([4, 0]), torch.tensor([-1, 0]), torch.randn(2, 5).abs() + torch.eye(5)[3] * 9):
        with pytest.raises(ConfigError, match="a predicted class is out of range"):
            figure_of(metric, predictions, torch.tensor([0, 0]))


def test_labels_and_predictions_of_other_meanings_are_refused() -> None:
    column = torch.tensor([[-3.0], [2.0]])
    for metric in (metrics.accuracy(), metrics.top_k(1)):
        with pytest.raises(ConfigError, match=r"the shapes of predictions and labels don't match(.|\n)*squeeze"):
            figure_of(metric, column, torch.tensor([0, 0]))
    with pytest.raises(ConfigError, match="a label is not a whole number"):
        figure_of(metrics.accuracy(threshold=0.5), torch.tensor([0.7, 0.2]), torch.tensor([0.7, 0.2]))
    assert figure_of(metrics.accuracy(threshold=0.5), torch.tensor([0.7, 0.2]), torch.tensor([1.0, 1.0])) == 0.5


def test_auroc_of_more_samples_than_pairs_fit_into_an_integer() -> None:
    counts = {"negatives": torch.tensor([3 * 10**9, 0]).numpy(), "positives": torch.tensor([0, 3 * 10**9]).numpy()}
    assert metrics.auroc(thresholds=2).figure(counts) == 1.0


def test_a_function_may_return_an_integer_for_some_micro_batches() -> None:
    def positive(output: Any, batch: Any) -> tuple[Any, Any]:
        return (output.sum().reshape(1) if float(batch[0][0, 0]) > 0 else 0), torch.ones(1)

    def each(output: Any, batch: Any) -> tuple[Any, Any]:
        return output.sum(1), len(output)

    assert {evaluated(recipe_of(), [positive], workers).metrics["positive"] for workers in (1, 3)} == {
        evaluated(recipe_of(), [positive]).metrics["positive"]
    }
    with pytest.raises(ConfigError, match="the metric each returned more than one number as the sum"):
        evaluated(recipe_of(), [each])


def test_names_of_figures_do_not_replace_others() -> None:
    for name in ("", 1):
        with pytest.raises(ConfigError, match="the name of a metric of validation is not text"):
            evaluated(recipe_of(), {name: lambda output, batch: (1, 1)})

    def loss(model: nn.Module, batch: Any) -> Any:
        return mean_loss(model, batch), {"step": (7.0, 1)}

    with pytest.raises(ConfigError, match="the loss function returns a metric with the name 'step'"):
        evaluated(recipe_of(loss=loss))


def test_each_micro_batch_begins_in_evaluation_mode() -> None:
    """Which micro-batches a worker has computed before would decide about dropout otherwise."""

    def loss(model: Any, batch: Any) -> Tensor:
        found = mean_loss(model, batch)
        model[1].train()
        return found

    figures = {evaluated(recipe_of(loss=loss), workers=workers).loss for workers in (1, 2, 3)}
    assert figures == {evaluated(recipe_of()).loss}


def test_global_modes_of_torch_are_as_before() -> None:
    def doubles(output: Any, batch: Any) -> tuple[float, int]:
        was_single = torch.get_default_dtype() == torch.float32
        torch.set_default_dtype(torch.float64)
        return float(was_single), 1

    assert evaluated(recipe_of(), [doubles]).metrics["doubles"] == 1.0
    assert torch.get_default_dtype() == torch.float32
    with mh.Engine(recipe_of()) as engine, engine.evaluating():
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_is_unusable_after_an_evaluation_failed_whatever_the_number_of_workers(workers: int) -> None:
    def broken(output: Any, batch: Any) -> Any:
        if torch.equal(batch[0][0], SAMPLES[0]):  # on the first worker only
            raise ZeroDivisionError
        return 1, 1

    def run(group: Group | None) -> list[str]:
        with mh.Engine(recipe_of(), group=group) as engine:
            for wrong in (lambda: engine.evaluate([]), lambda: engine.evaluate(DATA, ["acuracy"])):
                with pytest.raises(mh.ManyhandsError):
                    wrong()  # refused on all workers before anything has begun
            engine.evaluate(DATA)
            with pytest.raises(
                (ConfigError, WorkerError), match="the metric broken raised ZeroDivisionError"
            ) as raised:
                engine.evaluate(DATA, [broken])
            if isinstance(raised.value, WorkerError):  # the launcher would name samples of the training otherwise
                assert raised.value.position.micro_batch is None
                assert "validation, micro-batch" in str(raised.value)
            with pytest.raises(ConfigError, match=r"can't be used any more(.|\n)*the metric broken raised"):
                engine.evaluate(DATA)
        return []

    run_threads(workers, run)


# - Metrics that need all predictions


def test_the_size_of_collected_values_is_projected_once_and_then_measured() -> None:
    """A long text in a later micro-batch would be projected to all samples otherwise."""

    def recorded(first: str, last: str, max_bytes: int) -> Any:
        texts = iter([first, *["a"] * 3, last])
        metric = metrics.collected(
            lambda output, batch: [next(texts), "a"],
            lambda values: float(len(values)),
            name="text",
            max_bytes=max_bytes,
        )
        return evaluated(recipe_of(), [metric]).metrics["text"]

    assert recorded("a", "a" * 900, 3000) == 10.0
    for first, last in (("a" * 900, "a"), ("a", "a" * 4000)):
        with pytest.raises(ConfigError, match="the metric text would collect too much"):
            recorded(first, last, 3000)


def test_collected_values_that_grow_are_refused_long_before_the_first_exchange() -> None:
    picked: list[int] = []

    def pick(output: Any, batch: Any) -> list[str]:
        picked.append(len(picked))
        return ["a" * (900 if picked[-1] else 1)] * 2

    metric = metrics.collected(pick, lambda values: float(len(values)), name="text", max_bytes=9000)
    data = torch.utils.data.TensorDataset(SAMPLES.repeat(6, 1))
    with pytest.raises(ConfigError, match=r"the metric text would collect too much(.|\n)*before the end"):
        evaluated(recipe_of(), [metric], data=data)
    assert len(picked) == 6


@pytest.mark.parametrize("rows", [[2, 2, 1], [0, 2, 0], [0, 0, 0]])
@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.int16])
def test_arrays_of_any_kind_are_collected_also_without_rows(dtype: Any, rows: list[int]) -> None:
    """A micro-batch may have no row that counts."""
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    seen: list[Any] = []

    def then(collected: Any) -> float:
        seen.append(collected)
        return float(collected.sum())

    metric = metrics.collected(lambda output, batch: values[: batch[0]], then, name="x")
    batches = [metric.rows(metrics.Measured(None, [count], 0.0, 0.0, False, 2)) for count in rows]
    expected = np.concatenate([values[:count] for count in rows])
    assert metric.figure(batches) == float(expected.sum())
    (found,) = seen
    assert (found.dtype, found.shape, found.tolist()) == (values.dtype, expected.shape, expected.tolist())


def test_a_class_that_does_not_exist_is_refused() -> None:
    for made, given in itertools.product(
        (metrics.f1, metrics.precision, metrics.recall),
        ({"positive": -1}, {"positive": 2, "classes": 2}, {"positive": True}, {"positive": 0, "average": "macro"}),
    ):
        with pytest.raises(ConfigError, match=r"positive (is not a class|has no effect)"):
            made(**{"average": "binary", **given})  # type: ignore[arg-type]
    data = torch.utils.data.TensorDataset(SAMPLES, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"positive is not a class(.|\n)*less than 8(.|\n)*got: 8"):
        evaluated(recipe_of(), [metrics.f1(average="binary", positive=8)], data=data)
    assert evaluated(recipe_of(), [metrics.f1(average="binary", positive=7)], data=data).metrics.keys() == {"f1"}


def test_the_best_is_kept_by_a_figure_of_a_mapping_that_the_trial_could_not_compute(tmp_path: Path) -> None:
    def both(values: Any) -> dict[str, float]:
        return {"first": float(values[5]), "last": float(values[9])}  # the trial has fewer values

    metric = metrics.collected(lambda output, batch: batch[0][:, 0], both)
    given = mh.Validation(data=DATA, metrics=[metric], patience=2, watch="both.last:max")
    recipe = recipe_of(validation=given)
    summary = mh.train(recipe, steps=1, run_dir=tmp_path, keep_best="validation.both.first:max", show=False)
    assert summary.best["validation.both.first:max"]["value"] == float(SAMPLES[5, 0])
    with pytest.raises(ConfigError, match=r"there is no figure validation\.both\.fist"):
        mh.train(recipe, steps=1, run_dir=tmp_path / "other", keep_best="validation.both.fist:max", show=False)


def test_collected_values_are_copies() -> None:
    """The views of many outputs would keep their memory."""
    output = torch.arange(4.0)
    metric = metrics.collected(lambda output, batch: output[:2], lambda values: float(values.sum()), name="sum")
    rows = metric.rows(metrics.Measured(output, None, 0.0, 0.0, False, 2))
    output += 10
    assert metric.figure([rows]) == 1.0


def test_a_trial_may_lack_what_a_metric_needs(capfd: pytest.CaptureFixture[str]) -> None:
    def auroc(values: Any) -> float:
        if len(set(values.tolist())) < 2:
            raise ValueError("only one class")
        return 0.75

    data = torch.utils.data.TensorDataset(SAMPLES, torch.arange(10) // 5)
    metric = metrics.collected(lambda output, batch: batch[1], auroc)
    recipe = recipe_of(validation=mh.Validation(data=data, metrics=[metric]))
    assert mh.train(recipe, steps=1).validations["validation"]["auroc"] == 0.75
    said = " ".join(capfd.readouterr().err.split())
    assert "validation.auroc can't be computed from the micro-batch that is tried first: ValueError: only one" in said
    one_class = mh.Validation(data=torch.utils.data.TensorDataset(SAMPLES, torch.zeros(10)), metrics=[metric])
    with pytest.raises(ConfigError, match="the metric auroc raised ValueError: only one class"):
        mh.train(recipe_of(validation=one_class), steps=1, show=False)


def test_metrics_that_look_into_an_output_that_is_not_there() -> None:
    recipe = recipe_of(loss=lambda model, batch: model[0](batch[0]).square().mean())
    for look in (lambda output, batch: (output[0], 1), lambda output, batch: (output.sum(), 1)):
        with pytest.raises(ConfigError, match="the loss function doesn't call the model itself"):
            evaluated(recipe, {"looks": look})
    with pytest.raises(ConfigError, match="the loss function doesn't call the model itself"):
        evaluated(recipe, {"looks": lambda output, batch: (torch.argmax(output), len(output))})


def test_a_metric_of_torchmetrics_that_takes_its_range_from_each_batch_is_refused() -> None:
    image = pytest.importorskip("torchmetrics.image")
    with pytest.raises(ConfigError, match="takes the range of values from each batch"):
        metrics.torchmetric(image.StructuralSimilarityIndexMeasure())
    metrics.torchmetric(image.StructuralSimilarityIndexMeasure(data_range=1.0))
