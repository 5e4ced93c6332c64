"""Evaluates a model on data that no step trains on. All workers share the micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from manyhands.data.samples import HeldOutSamples
from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.hooks import last_output, to_device
from manyhands.engine.step.loss import LossReader, LossResult
from manyhands.engine.step_engine import StepEngine
from manyhands.errors import ConfigError
from manyhands.metrics.choice import RESERVED
from manyhands.metrics.metric import Measured, Totals, number
from manyhands.metrics.tally import ROUNDS_PER_EXCHANGE, Tally
from manyhands.validation import AVERAGED, TRAINED

if TYPE_CHECKING:
    from manyhands.metrics.collected import Collected
    from manyhands.metrics.metric import Metric


def evaluate_engine(
    engine: StepEngine,
    samples: HeldOutSamples,
    metrics: Mapping[str, Metric | Collected],
    batches: Callable[[Iterable[int]], Iterator[Any]],
    predict: Callable[[Any, Any], Any] | None,
    *,
    weights: str = TRAINED,
    micro_batches: int | None = None,
) -> Evaluation:
    """Evaluate the engine's model. Collective.

    batches: yields the micro-batches with the given indices. weights: "trained" or "ema", the average of the weights.
    micro_batches: evaluate only the first ones.
    """
    engine.check_usable()
    group, started = engine.group, time.perf_counter()
    tag = f"step {engine.step_index} / {samples.set_name}"
    number_of = samples.micro_batches if micro_batches is None else min(micro_batches, samples.micro_batches)
    where, is_trial = f"evaluation on {samples.set_name}", number_of < samples.micro_batches
    tally = Tally(group, metrics, samples.num_samples, where, is_trial=is_trial)
    reader = LossReader(trains=False)
    loaded = batches(range(group.rank, number_of, group.size))
    with _computing_with(weights, engine, tag), engine.evaluation.rounds():
        rounds = math.ceil(number_of / group.size)
        for index in range(rounds):
            micro_batch = index * group.size + group.rank
            computes = micro_batch < number_of
            if computes:
                # Only the text names the micro-batch: the launcher would take a number for a training micro-batch.
                group.status(f"{tag}, micro-batch {micro_batch} / data", engine.step_index)
                batch = to_device(next(loaded), group.device)
            seed = samples.seed_of_forward(micro_batch) if computes else None
            with engine.evaluation.round(f"{tag}, round {index}", seed):
                if computes:
                    group.status(f"{tag}, micro-batch {micro_batch} / forward", engine.step_index)
                    count = len(samples.indices(0, micro_batch))
                    result, output = _forward(engine, reader, batch, predict)
                    measured = _measured(reader, result, output, batch, count)
                    tally.add(micro_batch, measured, _of_loss(reader, result, metrics))
                    del batch, output, measured
            if (index + 1) % ROUNDS_PER_EXCHANGE == 0 or index + 1 == rounds:
                tally.exchange(f"{tag}, round {index}")
        loss, weight, figures = tally.figures(tag)
    return Evaluation(
        set=samples.set_name,
        step=engine.step_index,
        loss=loss,
        weight=weight,
        samples=samples.num_samples,
        samples_in_data=samples.size,
        metrics=figures,
        weights=weights,
        not_computed=tally.not_computed,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _computing_with(weights: str, engine: StepEngine, tag: str) -> Iterator[None]:
    """Context in which the model computes with the trained weights, or with their average if it has begun. Collective.

    The trained weights are restored bit for bit at the end of the block, even if it raises an error.
    """
    if weights != AVERAGED or not engine.updater.average.has_begun:
        yield
        return
    with engine.changing():
        engine.updater.exchange_with_average(tag)
    try:
        yield
    except BaseException:  # the peers have been told, and take part in no further call
        engine.updater.exchange_with_average(tag, alone=True)
        raise
    with engine.changing():
        engine.updater.exchange_with_average(tag)


def _forward(
    engine: StepEngine, reader: LossReader, batch: Any, predict: Callable[[Any, Any], Any] | None
) -> tuple[LossResult, Any]:
    """Return the loss function's result, and the output that metrics get."""
    with last_output(engine.model) as outputs:
        result = reader.read(engine.recipe.loss(engine.model, batch))
    if predict is not None:
        return result, predict(engine.model, batch)
    return result, outputs[0] if outputs else _NO_OUTPUT


class _NoOutput:
    """Stands for a model's output if the loss function never called the model.

    A metric that uses it raises an error that says so.
    """

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def __getitem__(self, key: object) -> Any:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: object) -> Any:
        cls._refuse()

    @classmethod
    def _refuse(cls) -> NoReturn:
        raise ConfigError(
            "the loss function doesn't call the model itself, so metrics have no output to look at",
            expected="a call of model(...) in the loss function",
            hint="give the validation a function: predict=lambda model, batch: model.generate(batch)",
        )


_NO_OUTPUT = _NoOutput()


def _measured(reader: LossReader, result: LossResult, output: Any, batch: Any, samples: int) -> Measured:
    loss = float(result.loss)
    if not reader.form.weighted:  # a mean over the micro-batch, which may be smaller than the others
        return Measured(output, batch, loss * samples, float(samples), False, samples)
    return Measured(output, batch, loss, float(result.weight), True, samples)


def _of_loss(reader: LossReader, result: LossResult, metrics: Mapping[str, Any]) -> dict[str, Totals]:
    """Return the parts of the metrics that the loss function returned."""
    names = reader.form.metrics
    if taken := [name for name in names if name in RESERVED]:
        raise ConfigError(
            f"the loss function returns a metric with the name {taken[0]!r}, which is the name of another figure",
            expected=f"a name other than {', '.join(RESERVED)}",
            hint=f'return it as "my_{taken[0]}", for example',
        )
    if twice := [name for name in names if name in metrics]:
        raise ConfigError(
            f"two metrics have the name {twice[0]!r}: one of the validation, and one that the loss function returns",
            hint="leave it out: the metrics that the loss function returns are always reported; or give it another "
            f'name: metrics={{"my_{twice[0]}": ...}}',
        )
    pairs = zip(names, result.metrics, strict=True)
    return {
        name: {"sum": number(total).astype(float).reshape(()), "weight": number(weight).astype(float).reshape(())}
        for name, (total, weight) in pairs
    }
