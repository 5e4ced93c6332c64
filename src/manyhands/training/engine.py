"""Engine: the public interface to train one step at a time. The step itself is in engine/step_engine.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import nn

from manyhands.checkpoint.extra_state import check_extra_states
from manyhands.checkpoint.format import Manifest, folder_name
from manyhands.checkpoint.initial import InitialWeights, load_initial
from manyhands.checkpoint.load import load_checkpoint
from manyhands.checkpoint.save import Saving, start_checkpoint
from manyhands.checkpoint.snapshot import SnapshotMemory, load_snapshot
from manyhands.comm.agreement import all_gather_json
from manyhands.comm.connect import connect
from manyhands.comm.group import Group
from manyhands.config import Recipe, Strategy, strategy_or_default
from manyhands.data.loader import TRAINING, LoadedBatch, MicroBatchLoader, load_batch
from manyhands.data.samples import HeldOutSamples
from manyhands.engine.sharding import SHARDED, sharding_named
from manyhands.engine.step.amendments import CLIP_NORM, Amendments
from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics
from manyhands.engine.step_engine import StepEngine
from manyhands.errors import CheckpointError, ConfigError, Interrupted
from manyhands.intervals import step_number
from manyhands.metrics.choice import chosen_metrics
from manyhands.optim.amending import apply_changes, check_change
from manyhands.optim.schedules import advance, advance_by_figure
from manyhands.storage.location import Location, location_of
from manyhands.training.evaluating import evaluate_engine
from manyhands.training.exchanging import Numbers, gathered, mean
from manyhands.training.given_recipe import check_given_recipe
from manyhands.validation import AVERAGED, TRAINED, Validation
from manyhands.weights import Weights


class StepBatch(NamedTuple):
    """The data of one step on this worker.

    step: the number of the step, counted from 1. until: the number of steps for which loader processes read ahead; None
    if the number is not limited.
    """

    step: int
    until: int | None


class Engine(StepEngine):
    """Trains a recipe's model, one step at a time, together with the other workers that the launcher started.

        engine = Engine(recipe, Strategy(sharding="zero2"))
        for batch in engine.batches(steps=100):
            metrics = engine.step(batch)
        engine.close()

    The constructor, `step`, `evaluate`, `evaluating`, `mean`, `all_gather_json`, `save`, `load`, `digest`,
    `full_state_dict` and `close` are collective.
    group: only for tests that run workers as threads. By default, the launcher's environment determines the group.
    resumes: True if a checkpoint will be loaded before the first step. In that case, only the frozen parameters are
    read from the recipe's initial weights, because the checkpoint lacks them.
    weights_read_bytes: bytes of the recipe's initial weights that this worker has read. weights_source: where these
    weights come from, with the step and digest if they are a checkpoint of another run; None if no weights were read.
    Raises ConfigError, DataError.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy | None = None,
        group: Group | None = None,
        *,
        resumes: bool = False,
    ) -> None:
        check_given_recipe(recipe)
        strategy = strategy_or_default(strategy)
        self._awaits_checkpoint = resumes
        self._loader: MicroBatchLoader | None = None
        self._stream: Iterator[LoadedBatch] | None = None
        self._stream_at: StepBatch | None = None  # the step at which the stream continues
        self._saving: Saving | None = None
        # zero3 shards parameters over all hosts, but a hierarchical group holds every parameter once per host. So
        # "auto" does not choose hierarchical groups for zero3.
        may_be_hierarchical = strategy.transport != "auto" or sharding_named(strategy.sharding).param is not SHARDED
        own = group or connect(
            strategy.transport,
            device=recipe.device,
            stall_seconds=strategy.stall_seconds,
            max_hosts=recipe.batch.virtual_workers if may_be_hierarchical else 0,
        )
        try:
            self._loader = MicroBatchLoader(recipe, strategy.loader_workers)
            self._metrics = {name: chosen_metrics(each.metrics, name) for name, each in recipe.validations.items()}
            super().__init__(recipe, strategy, own)
            self.stream_position = self._loader.position
            initial = self._load_initial(recipe.initial_weights, resumes)
            self.weights_read_bytes, self.weights_source = initial
            self._first_step = True
        except BaseException as error:
            own.fail(error)
            own.close()
            raise

    def _load_initial(self, weights: Weights | None, resumes: bool) -> InitialWeights:
        try:
            check_extra_states(self.model, self.group)
            return InitialWeights() if weights is None else load_initial(self, weights, resumes=resumes)
        except BaseException:
            self.allocator.close()
            raise

    def batches(self, steps: int | None = None) -> Iterator[StepBatch]:
        """Yield the data of each step, from the current step until `steps` steps are complete, or forever."""
        while steps is None or self.step_index < steps:
            if not self.data_facts and self.next_step not in self.amendments.skipped:
                self._stream = None  # loading other samples would end it
                self.data_facts = self._facts(self.batch_index)
            yield StepBatch(self.next_step, steps)

    def _reading(self, batch: StepBatch) -> Iterator[LoadedBatch]:
        """Return the stream of micro-batches from this step on.

        Its loader processes read ahead, so one stream serves several steps. A new stream begins after an evaluation,
        after a step that failed, and after a checkpoint was loaded.
        """
        if self._stream is None or self._stream_at != batch:
            self._stream = self._new_stream(self.step_index, batch.until)
        self._stream_at = None  # set again when the step is complete
        return self._stream

    def _new_stream(self, first: int, steps: int | None) -> Iterator[LoadedBatch]:
        loader = self._open_loader()
        indices = count(first) if steps is None else range(first, steps)
        skipped = frozenset(self.amendments.skipped)
        return loader.stream(
            (batch_index, micro_batch)
            for step_index in indices
            if step_number(step_index) not in skipped
            for batch_index in [self.recipe.batch_index(step_index, self.island)]
            for micro_batch in self.my_micro_batches(batch_index)
        )

    def _facts(self, step_index: int, of: str = TRAINING) -> dict[str, str]:
        """Return facts about the first micro-batch of a step, to be compared between workers."""
        try:
            return self._open_loader().facts(step_index, 0, of)
        except BaseException as error:
            self.group.fail(error)
            raise

    def _open_loader(self) -> MicroBatchLoader:
        if self._loader is None:
            raise ConfigError("the engine was closed", hint="create a new engine, and load a checkpoint to continue")
        return self._loader

    def amend(self, amendments: Amendments) -> None:
        """Skip steps, and change settings of the recipe from certain steps on. Call this before the first call of
        `batches`.

        All workers must make the same call. A checkpoint that is loaded later adds the amendments with which it was
        computed. Raises ConfigError for settings that the recipe lacks.
        """
        for change in amendments.changes:
            if change.key != CLIP_NORM:
                check_change(change.key, change.value, self.optimizer.fronts)
        self.amendments = amendments

    def step(self, batch: StepBatch, *, digest: bool = False) -> StepMetrics:
        """Run the next step, or skip it if the amendments say so. Collective. Raises the errors of `run_step`."""
        self._refuse_without_checkpoint()
        if not isinstance(batch, StepBatch):
            raise ConfigError(
                "engine.step was given a batch that is not from engine.batches",
                expected="the loop `for batch in engine.batches(steps=N): engine.step(batch)`",
                got=type(batch).__name__,
                hint="pass the data set to the recipe: the engine loads each worker's micro-batches itself",
            )
        if batch.step != self.next_step:
            raise ConfigError(
                "the engine was given another step's batch",
                expected=f"step {self.next_step}",
                got=f"step {batch.step}",
                hint="pass each batch of batches() to step() once, in order",
            )
        if self.next_step in self.amendments.skipped:
            goes_on = self._stream_at == batch
            metrics = self._skip(digest)
            self._stream_at = batch._replace(step=self.next_step) if goes_on else None
            return metrics

        stream = self._reading(batch)
        metrics = self.run_step(lambda micro_batch: next(stream).batch, digest=digest)
        self._stream_at = batch._replace(step=self.next_step)
        if self._first_step:  # state that counts micro-batches, for example, now differs between workers
            self._first_step = False
            check_extra_states(self.model, self.group)
        return metrics

    def evaluate(
        self,
        data: Any,
        metrics: Sequence[Any] | Mapping[str, Any] = (),
        *,
        name: str = "validation",
        batch: int | None = None,
        samples: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        weights: str = TRAINED,
    ) -> Evaluation:
        """Evaluate the model on data between two steps, and return the figures, the same on every worker. Collective.

        The training is not affected. All workers share the micro-batches, which this process loads itself. The
        arguments are those of `Validation`. name: the name of the figures; the random numbers of an evaluation depend
        on the seed, this name and the micro-batch only, so that evaluations after different steps are comparable.
        weights: "trained", or "ema" for the average of the weights. Raises ConfigError, DataError.
        """
        given = Validation(data=data, metrics=metrics, batch=batch, samples=samples, collate=collate, predict=predict)
        self._check_weights(weights)
        held_out = HeldOutSamples(name, given, self.recipe)
        chosen = chosen_metrics(given.metrics, name)

        def load(indices: Iterable[int]) -> Iterator[Any]:
            return (load_batch(held_out, 0, micro_batch, preserves=False) for micro_batch in indices)

        return evaluate_engine(self, held_out, chosen, load, predict, weights=weights)

    def _check_weights(self, weights: str) -> None:
        if weights not in (TRAINED, AVERAGED):
            raise ConfigError("there are no such weights", expected=f"{TRAINED!r} or {AVERAGED!r}", got=repr(weights))
        if weights == AVERAGED and self.recipe.average_of_weights is None:
            raise ConfigError(
                "an evaluation needs an average of the weights, but the recipe has none",
                expected="a recipe with ema=0.999 or average=manyhands.Average(...)",
            )

    def facts_of_data(self) -> dict[str, str]:
        """Return facts about the first micro-batch of the run."""
        self._stream = None
        return self._facts(0)

    def facts_of_validation(self, name: str) -> dict[str, str]:
        """Return facts about a validation, to be compared between workers. This ends a stream in progress."""
        self._stream = None
        held_out = self._open_loader().held_out[name]
        sizes = {"samples": held_out.num_samples, "samples in the data": held_out.size, "batch": held_out.micro_size}
        figures = {"metrics": ", ".join(self._metrics[name])}
        return {key: str(value) for key, value in sizes.items()} | figures | self._facts(0, name)

    def validate(self, name: str, *, weights: str | None = None, micro_batches: int | None = None) -> Evaluation:
        """Evaluate the model on one of the recipe's validations, by name. Collective. Raises ConfigError, DataError.

        weights: "trained", or "ema" for the average of the weights; None: the weights that the validation asks for, or
        the trained ones if it asks for both. micro_batches: use only this many, for a trial.
        """
        loader, given = self._open_loader(), self.recipe.validations[name]

        def load(indices: Iterable[int]) -> Iterator[Any]:
            self._stream = None  # loading other samples would end it
            return (loaded.batch for loaded in loader.stream(((0, index) for index in indices), name))

        held_out, metrics = loader.held_out[name], self._metrics[name]
        weights = given.evaluated_weights[0] if weights is None else weights
        self._check_weights(weights)
        return evaluate_engine(
            self, held_out, metrics, load, given.predict, weights=weights, micro_batches=micro_batches
        )

    @property
    def is_first(self) -> bool:
        """Return True on the first worker, which is the one that should print and write results."""
        return self.group.rank == 0

    def mean(self, total: Numbers, weight: Numbers) -> float | None:
        """Return the sum of all workers' totals divided by the sum of their weights, or None if that is 0. Collective.

        Sums are fp64, and are divided once. total, weight: this worker's numbers, which are added in the order of the
        workers; or mappings from the index of a part (a sample or micro-batch) to the part's total and weight. Parts
        are added in the order of their indices, whichever worker has them, so the figure doesn't depend on the number
        of workers. Raises the same ConfigError on all workers.
        """
        self.check_usable()
        return mean(self.group, total, weight, f"step {self.step_index} / mean")

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the values of all workers, in the order of the workers. Collective.

        value: None, numbers, texts, and lists, tuples and dicts of them, at most 1 MiB as JSON. It is never pickled.
        Raises the same ConfigError on all workers.
        """
        self.check_usable()
        return gathered(self.group, value, f"step {self.step_index} / values")

    def advance_schedules(self, value: float | None) -> None:
        """Advance the schedules that need a figure (ReduceLROnPlateau) by the figure's value.

        All workers must make the same call. `manyhands.train` makes it after each validation of the recipe's
        `schedule_on`; in a loop of your own, make it after `evaluate`.
        """
        self.check_usable()
        advance_by_figure(self.schedules, value)

    def _skip(self, digest: bool) -> StepMetrics:
        """Count the next step and advance the schedules, without an update.

        The step's data are not loaded. Collective.
        """
        step, epoch = self.next_step, self.epochs.epoch_of(self.batch_index)
        with self.changing():
            requests = [self.stop_requested, self.save_requested]
            all_ranks: list[Any] = all_gather_json(self.group, requests, f"step {step} / skipped / control")
            self.stop_requested, self.save_requested = map(any, zip(*all_ranks, strict=True))
            apply_changes(self.amendments.of_optimizers(step), self.optimizer.fronts, self.schedules)
            rates = self.optimizer.learning_rates
            with warnings.catch_warnings():
                # torch warns about a schedule that advances before the first update, which is intended here.
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
                advance(self.schedules)
            self.step_index += 1
            return StepMetrics(
                step=step,
                epoch=epoch,
                island=None if self.recipe.islands is None else self.island,
                skipped=True,
                loss=math.nan,
                weight=0.0,
                samples=0,
                gradient_norm=math.nan,
                learning_rates=rates,
                step_seconds=0.0,
                digest=self.digest() if digest else None,
            )

    def save(
        self,
        folder: str | Location,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        best: Collection[int] = (),
        published: Callable[[Location], None] | None = None,
    ) -> Location:
        """Write a checkpoint below `folder`, a path or an address (s3://bucket/folder), and return its location.
        Collective.

        keep, keep_every: keep the last `keep` checkpoints and those of every `keep_every`-th step (default: all).
        best: also keep the checkpoints of these steps.
        published: called on worker 0, in the writer thread, once the checkpoint is complete. It is not called if the
        checkpoint existed before.
        Raises CheckpointError on all workers; training may continue after that.
        """
        self.begin_save(folder, keep=keep, keep_every=keep_every, best=best, published=published)
        self.finish_save()
        return location_of(folder) / folder_name(self.step_index)

    def begin_save(
        self,
        folder: str | Location,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        best: Collection[int] = (),
        without: Collection[str] = (),
        published: Callable[[Location], None] | None = None,
    ) -> None:
        """Start to write a copy of the current state as a checkpoint. Training may continue meanwhile. Collective.

        Takes the arguments of `save`. First waits for the previous checkpoint, as `finish_save` does. without: kinds of
        tensors that the checkpoint leaves out.
        """
        self.check_usable()
        self._refuse_without_checkpoint()
        self.finish_save()
        try:
            self._saving = start_checkpoint(
                self,
                location_of(folder),
                keep=keep,
                keep_every=keep_every,
                best=best,
                without=without,
                published=published,
            )
        except CheckpointError:
            raise  # all workers raise it
        except BaseException as error:
            self.group.fail(error)
            raise

    def finish_save(self) -> Location | None:
        """Wait until the checkpoint of `begin_save` is published, and return its location; None if there is none.
        Collective.

        Raises CheckpointError on all workers.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.wait()

    @property
    def is_saving(self) -> bool:
        """Return True while this worker writes the checkpoint of `begin_save`, or waits for its publication."""
        return self._saving is not None and not self._saving.is_done

    def load(
        self,
        checkpoint: str | Location,
        *,
        accept_new_numerics: bool = False,
        other_facts: Mapping[str, str | None] | None = None,
    ) -> Manifest:
        """Load a checkpoint that any number of workers saved with any sharding. Collective.

        other_facts: facts about the recipe in which the checkpoint must differ; see `load_checkpoint`. Raises
        CheckpointError, NumericsError.
        """
        location = location_of(checkpoint)
        return self._restored(
            lambda: load_checkpoint(self, location, accept_new_numerics=accept_new_numerics, other_facts=other_facts)
        )

    def load_snapshot(self, memory: SnapshotMemory) -> Manifest:
        """Load the newest snapshot in `memory`. Collective."""
        return self._restored(lambda: load_snapshot(self, memory))

    def _restored(self, load: Callable[[], Manifest]) -> Manifest:
        try:
            manifest = load()
        except BaseException as error:  # possibly on this worker only (a damaged file), so the peers must be informed
            self.group.fail(error)
            raise
        self._awaits_checkpoint = False
        self._stream = None
        self._open_loader().restore(manifest.stream)
        self._param_guard.after_load()
        return manifest

    def weights_changed(self) -> None:
        """Note that the weights were changed outside of a step. Without this, the next step would refuse the change."""
        self._param_guard.after_load()
        self._stream = None  # samples that were read ahead may be those of another island

    def _refuse_without_checkpoint(self) -> None:
        if self._awaits_checkpoint:
            raise ConfigError(
                "the engine was created with resumes=True, but no checkpoint was loaded",
                hint="call load() first, or create the engine with resumes=False",
            )

    def close(self) -> None:
        """Finish a pending checkpoint, leave the group and end loader processes. Collective, unless a worker failed.

        Raises CheckpointError.
        """
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        try:
            self.finish_save()
        finally:
            super().close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Interrupted):  # all workers raise Interrupted together
            self.group.fail(error)
            if self._saving is not None:
                self._saving.abandon()
                self._saving = None
        self.close()
