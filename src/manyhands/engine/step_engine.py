"""StepEngine: one training step, from loading micro-batches to new weights and advanced schedules."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manyhands.comm.agreement import agree
from manyhands.comm.group import Group
from manyhands.comm.local import LocalGroup
from manyhands.config import Recipe, Strategy
from manyhands.data.stream_samples import epochs_of
from manyhands.engine.agreement import (
    agree_on_attributes,
    agree_on_functions,
    agree_on_model,
    agree_on_start,
    buffer_rules,
    frozen_facts,
    optimizer_facts,
    recipe_facts,
)
from manyhands.engine.assembly import Storage, check_scratch_space, lay_out
from manyhands.engine.evaluation import EvaluationMode
from manyhands.engine.full_state import full_params, full_state_dict
from manyhands.engine.sharding import sharding_named
from manyhands.engine.step.amendments import Amendments
from manyhands.engine.step.buffers import Buffers, names_in_order
from manyhands.engine.step.call_seeds import CallSeeds
from manyhands.engine.step.control import Control, added_in_order, all_gather_control
from manyhands.engine.step.hooks import Removable, around_forward, call_last, on_gradients, to_device
from manyhands.engine.step.loss import LossReader, LossResult
from manyhands.engine.step.metrics import PhaseClock, StepMetrics
from manyhands.engine.step.reduce import GradientReducer
from manyhands.engine.step.refusals import not_finite, refuse_weights
from manyhands.engine.step.settings import Settings
from manyhands.engine.units.unit import ParamUnit
from manyhands.engine.units.unit_plan import called_units, repeated_children
from manyhands.engine.units.unsharding import Unsharder
from manyhands.engine.update.companions import kinds_for
from manyhands.engine.update.step_hooks import StepHooks
from manyhands.engine.update.updater import Allocators, Updater
from manyhands.errors import ConfigError, NumericsError
from manyhands.intervals import step_number
from manyhands.models.admission import ParamGuard
from manyhands.models.attributes import AttributeGuard
from manyhands.models.bf16_products import bf16_products_in_fp32, mixed_types_explained
from manyhands.models.building import build_model
from manyhands.models.compiling import CompiledModules, avoid_compiler_import, compiler_identity
from manyhands.models.modes import TrainingMode
from manyhands.models.recompute import checkpoint_activations
from manyhands.models.seed_guard import refusing_seeds
from manyhands.numerics.arithmetic import fix_arithmetic, numerics_identity, preserved_arithmetic
from manyhands.numerics.counters import derive
from manyhands.numerics.digest import digest_of, slots_in_order, tensor_hashes, words_of
from manyhands.numerics.seeds import preserved_generators
from manyhands.offload.allocator import Allocator, allocator_for
from manyhands.offload.process_memory import keep_freed_memory, return_freed_memory
from manyhands.optim.amending import apply_changes
from manyhands.optim.schedules import advance, build_schedules, schedule_facts
from manyhands.optim.sliced import SlicedOptimizer
from manyhands.shard_layout import blocks_of

_HINT_SAME_MACHINES = "use the same version of torch and the same kind of CPU (and GPU) for all workers"
_HINT_SAME_RECIPE = "start all workers with the same program, the same recipe and the same data"


class StepEngine:
    """A recipe's model on this worker, and the training steps on it. The constructor is collective.

    model: this worker's model as it was built, but its parameters are views of flat buffers.
    step_index: the number of steps made so far, which is the index, counted from 0, of the next step. island: the
    island whose weights and state the engine holds; 0 without islands. identity: the run's numerics identity. clock:
    measures the phases of a step on every worker. trained: the (name, numel) of each trainable parameter, in the order
    of the block numbers. digest_names: the name and 32-bit words (see `words_of`) of each tensor that the digest
    covers, in order. data_facts: names and hashes of a part of the data, which are compared before the first step.
    progress: the state of the run's validations, for checkpoints. extra_state: the user's own numbers, texts, and lists
    and dicts of them, for checkpoints; they must be the same on all workers. stream_position: returns the position from
    which this worker can continue to read a stream; empty without a stream. pending: names of parameters whose values
    have yet to be loaded from the recipe's files; after loading, the fingerprints of the frozen ones are added to
    `frozen_facts`. Raises the same ConfigError on all workers.
    """

    def __init__(self, recipe: Recipe, strategy: Strategy, group: Group) -> None:
        self.recipe, self.strategy, self.group = recipe, strategy, group
        # This must come before any optimizer is created: torch.optim would import the compiler (150 MiB, 1 to 2 s).
        avoid_compiler_import()
        fix_arithmetic(recipe)
        recipe.batch.check_workers(group.size)
        agree(group, "recipe", recipe_facts(recipe) | buffer_rules(recipe.buffers), hint=_HINT_SAME_RECIPE)
        agree_on_functions(recipe, group)
        settings = {"sharding": strategy.sharding, "offload": strategy.offload, "units": str(strategy.units)}
        agree(group, "strategy", settings, hint=_HINT_SAME_RECIPE)
        update_on = group.device if strategy.offload == "none" else torch.device("cpu")
        identity = numerics_identity(group.device, recipe.threads_per_worker, update_on)
        self.identity = identity | compiler_identity(recipe.compile)
        agree(group, "numerics", self.identity, hint=_HINT_SAME_MACHINES)
        keep_freed_memory(large=strategy.offload != "disk")
        scratch = Path(strategy.scratch or tempfile.gettempdir())
        self.allocator = allocator_for(strategy.offload, group.device, scratch)
        try:
            with closing(allocator_for(strategy.offload, torch.device("cpu"), scratch)) as building:
                storage = self._build(building)
            return_freed_memory()
            self._set_up(storage)
        except BaseException:
            self.allocator.close()
            raise

    def _build(self, building: Allocator) -> Storage:
        """Build the model in buffers of `building`, then move it into its units. Collective."""
        recipe, group = self.recipe, self.group
        self.model, self.pending = build_model(recipe, building)
        agree_on_model(self.model, self.pending, group, building)
        # Record shapes and dtypes as built, because `lay_out` casts parameters and replaces their data.
        self.param_shapes = {name: param.shape for name, param in self.model.named_parameters()}
        self.param_dtypes = {name: param.dtype for name, param in self.model.named_parameters()}
        trainable = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        self.optimizer = SlicedOptimizer(recipe.optimizer, trainable, recipe.optimizer_kind, self.allocator.device)
        self.frozen_facts = frozen_facts(self.model, self.pending, building)
        storage = lay_out(
            self.model, recipe, group, self.strategy, self.optimizer.unsplittable, self.pending, self.allocator
        )
        check_scratch_space(self.allocator, group, storage.units, self.optimizer, recipe)
        return storage

    def _set_up(self, storage: Storage) -> None:
        """Create the parts of a step: hooks, gradient reduction, update. Collective."""
        recipe, strategy, group = self.recipe, self.strategy, self.group
        sharding = sharding_named(strategy.sharding)
        self.layout, self.units, self.frozen_units = storage.layout, storage.units, storage.frozen
        self._params = dict(storage.named_params)
        self._param_names = list(self._params)
        # Record these facts now, because schedules change hyperparameters.
        self._optimizer_facts = optimizer_facts(self.optimizer)
        self.schedules = build_schedules(recipe.schedule, self.optimizer.fronts, recipe.schedule_on)
        groups = self.optimizer.plain_hyperparameters()
        self._optimizer_facts |= schedule_facts(self.schedules, groups, self._optimizer_facts)
        agree(group, "optimizer", self._optimizer_facts, hint=_HINT_SAME_RECIPE)
        self.epochs = epochs_of(recipe)
        self.buffers = Buffers(self.model, recipe.buffers, reports=group.rank == 0)
        self._training_mode = TrainingMode(self.model, recipe.eval_modules)
        self._attributes = AttributeGuard(self.model, recipe.attributes, recipe.loss)
        self._settings = Settings(self._params, self.optimizer, self.buffers)
        self.trained = slots_in_order([slot for unit in self.units for slot in unit.layout.slots])
        self.digest_names = self._tensors_in_digest()
        self._param_guard = ParamGuard(self.model, self.buffers.frozen, (*self.units, *self.frozen_units))
        allocators = Allocators.of(self.allocator, sharding, group.device)
        self._reducer = GradientReducer(group, self.units, recipe.batch, sharding, allocators.sums)
        self.updater = Updater(
            group,
            self.units,
            self.layout,
            sharding,
            self.optimizer,
            allocators,
            recipe.average_of_weights,
            kinds_for(recipe.islands, pretrained=recipe.weights is not None),
        )
        self._has_bf16 = any(param.dtype == torch.bfloat16 for param in self.model.parameters())
        self._compiled = CompiledModules(self.model, repeated_children(self.model) if recipe.compile else None)
        on_demand = storage.on_demand_units
        for unit in on_demand:
            # Hooks stay outside of compiled code: on the compiled module that contains the unit's module, if any.
            unit.modules = self._compiled.around(unit.modules)
        # Unsharding is a copy if this worker can read all shards. Otherwise it has collective calls of its own.
        unshard_group = group.sibling() if on_demand and not group.pieces_are_views else LocalGroup(group.device)
        self._unsharder = Unsharder(unshard_group, on_demand, strategy.unshard_ahead)
        self._step_hooks = StepHooks(self.optimizer.fronts, self._unsharder, self._param_guard, recipe.seed)
        self._hooks = on_gradients(self._params.items(), self._reducer.arrived) if strategy.overlap else []
        self._compiled.refuse_inside(strategy.activation_checkpointing, "strategy.activation_checkpointing")
        self._undo = checkpoint_activations(self.model, strategy.activation_checkpointing, self._unsharder.using)
        self._call_seeds, self._loss_reader = CallSeeds(), LossReader()
        self._module_hooks = [*self._unshard_around_forwards(on_demand), *self._seed_behind_calls()]
        self.clock = PhaseClock(group.recorder)
        self.step_index, self.island, self.amendments = 0, 0, Amendments()
        self.last_hashes: np.ndarray | None = None
        # A signal or a timer may set these on any one worker. The next step's control values set them on all workers.
        self.stop_requested = self.save_requested = False
        self.data_facts: dict[str, str] = {}
        self.progress: dict[str, Any] = {}
        self.extra_state: dict[str, Any] = {}
        self.stream_position: Callable[[], dict[str, Any]] = dict
        self._failed: BaseException | None = None
        self.evaluation = EvaluationMode(
            self.model, group, self.buffers, self._attributes, self._unsharder, self._call_seeds, self._compiled
        )

    def _unshard_around_forwards(self, units: Sequence[ParamUnit]) -> list[Removable]:
        """Register hooks that unshard a unit before the forward of each module that uses it. Return their handles."""
        handles: list[Removable] = []
        for unit in units:
            for name in unit.modules:
                enter = self._compiled.outside(partial(self._unsharder.enter, unit))
                handles += around_forward(self.model.get_submodule(name), enter, partial(self._unsharder.leave, unit))
        return handles

    def _seed_behind_calls(self) -> list[Removable]:
        """Register hooks that seed the generators after each call of a unit. Return their handles."""
        handles: list[Removable] = []
        for name in self._compiled.around(called_units(self.model)):
            enter, leave = partial(self._call_seeds.enter, name), partial(self._call_seeds.leave, name)
            handles += around_forward(self.model.get_submodule(name), enter, leave)
        return handles

    @property
    def next_step(self) -> int:
        """Return the number of the next step, or of the step in progress. See `step_number`."""
        return step_number(self.step_index)

    @property
    def batch_index(self) -> int:
        """Return the index of the next step's batch, see `Recipe.batch_index`. Seeds and samples depend on it."""
        return self.recipe.batch_index(self.step_index, self.island)

    def my_micro_batches(self, batch_index: int) -> list[int]:
        """Return the indices of the micro-batches that this worker computes in a step, in order."""
        present = self.epochs.present(batch_index)
        return [each for this in self._reducer.rounds if (each := this.micro_batch) is not None and each in present]

    def run_step(self, load: Callable[[int], Any], *, digest: bool = False) -> StepMetrics:
        """Run one training step. Collective.

        load(i) returns micro-batch i; it is called for each of `my_micro_batches`, in order. digest: also compute the
        digest of the weights. Raises NumericsError if a loss or gradient of a micro-batch is not finite. In that case
        no state has changed: the engine can be saved, and the step can be repeated with other data.
        After any other error, such as a WorkerError, an exception in the model or the loss function, or a NumericsError
        because only the sum of the gradients is not finite, the engine is unusable.
        """
        with self.changing():
            return self._step(load, digest)

    def check_usable(self) -> None:
        """Raise ConfigError if an earlier failure left the state partly changed, and inside `evaluating()`."""
        if (failed := self._failed or self.evaluation.failed) is not None:
            raise ConfigError(
                f"this engine can't be used any more, because it failed after step {self.step_index}: {failed}",
                hint="create a new engine and load the last checkpoint",
            )
        if self.evaluation.is_active:
            raise ConfigError(
                "the engine's state can't be used inside evaluating()",
                expected="only forward passes, because the buffers that they change are restored after the block",
                hint="leave the block before a step, save, load, digest or another evaluation",
            )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the engine as failed if the block raises, unless the error guarantees that no state changed."""
        self.check_usable()
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, NumericsError) and getattr(error, "nothing_changed", False)):
                self._failed = error
                # First notify the peers, so that they raise this error instead of waiting for this worker's next call.
                self.group.fail(error)
                self._unsharder.abort()
                for unit in self.units:
                    unit.abort()
            raise

    def _step(self, load: Callable[[int], Any], digest: bool) -> StepMetrics:
        batch_index, step, tag = self.batch_index, self.next_step, f"step {self.next_step}"
        self.clock.begin()
        self._param_guard.before_step()
        self.buffers.begin_step()
        self._attributes.begin_step()
        self._settings.begin_step()
        if not self._loss_reader.is_agreed:  # in the first step
            agree_on_start(self.buffers.named(), self.data_facts, self.group)
        self._reducer.begin_step(step)
        results = self._compute_rounds(load, batch_index, tag)
        self._param_guard.after_backward()
        self._attributes.restore()
        with self.clock.phase("communication"):
            self._unsharder.end_step()
            self._reducer.close_rounds()
            if not self._loss_reader.is_agreed:
                self._loss_reader.agree(self.group)
            control = all_gather_control(self._my_control(results), self.group, f"{tag} / control")
            self._reducer.await_pieces()
        self._accept(control)
        weight = added_in_order(control.weights)
        with self.clock.phase("update"):
            learning_rates = self.optimizer.learning_rates  # before schedules change them for the next step
            norm = self._update(control, weight, tag)
            self.step_index += 1
            digest_text = self.digest() if digest else None
        self._param_guard.after_step()
        self.group.status(f"after {tag}", step)
        return StepMetrics(
            step=step,
            loss=added_in_order(control.losses) / weight,
            weight=weight,
            samples=self.epochs.samples(batch_index),
            epoch=self.epochs.epoch_of(batch_index),
            island=None if self.recipe.islands is None else self.island,
            weighted=self._loss_reader.form.weighted,
            metrics=self._loss_reader.metrics(control),
            gradient_norm=norm,
            learning_rates=learning_rates,
            step_seconds=self.clock.step_seconds,
            seconds=self.clock.seconds,
            bytes_moved=self.clock.bytes_moved,
            digest=digest_text,
        )

    def _compute_rounds(self, load: Callable[[int], Any], batch_index: int, tag: str) -> dict[int, LossResult]:
        """Compute this worker's micro-batches, exchange gradients, and return the results. Collective."""
        results, mine = {}, self.my_micro_batches(batch_index)
        for index, this in enumerate(self._reducer.rounds):
            # A step at the end of an epoch may lack micro-batches, which contribute zeros.
            micro_batch = this.micro_batch if this.micro_batch in mine else None
            with self.clock.phase("data"):
                if micro_batch is not None:
                    self._publish_status("data", micro_batch)
                    batch = to_device(load(micro_batch), self.group.device)
            with self.clock.phase("communication"):
                self._reducer.begin(index)
                self._unsharder.begin(f"{tag}, round {index}", computes=micro_batch is not None)
            with self.clock.phase("compute"):
                if micro_batch is not None:
                    results[micro_batch] = self._compute(batch_index, micro_batch, batch)
                    batch = None  # free its memory before this worker communicates
            with self.clock.phase("communication"):
                self._publish_status("communication")
                self._unsharder.end()
                self._reducer.end()
        return results

    def _publish_status(self, activity: str, micro_batch: int | None = None) -> None:
        """Publish the current activity for peers and for the launcher."""
        part = "" if micro_batch is None else f", micro-batch {micro_batch}"
        self.group.status(f"step {self.next_step}{part} / {activity}", self.next_step, micro_batch)

    def _compute(self, batch_index: int, micro_batch: int, batch: Any) -> LossResult:
        """Run forward and backward of one micro-batch. Return its loss, weight and metrics."""
        self._publish_status("forward and backward", micro_batch)
        bf16 = self._has_bf16 and not self.recipe.compile  # torch compiles nothing under a dispatch mode
        # Generators are seeded for each micro-batch and after each call of a unit, so it doesn't matter which worker
        # computes which of them. They are restored, so the caller's numbers don't depend on what was computed here.
        seed = derive(self.recipe.seed, "compute", batch_index, micro_batch)
        self._training_mode.begin()
        with (
            self._param_guard.micro_batch(),
            self._attributes.micro_batch(),
            preserved_generators(),
            preserved_arithmetic(),
            self._call_seeds.micro_batch(seed),
            self._compiled.computing(),
            bf16_products_in_fp32(bf16),
        ):
            with (
                self._unsharder.watching_autograd(),
                mixed_types_explained(self.model),
                refusing_seeds(not self.recipe.compile),
            ):
                result = self._loss_reader.read(self.recipe.loss(self.model, batch))
                result = result.of_samples(self.epochs.share(batch_index, micro_batch), self._loss_reader.form)
            self._param_guard.before_backward(result.loss)
            self._unsharder.begin_backward()
            call_last(self._params.values(), self._hooks)
            result.loss.backward()  # type: ignore[no-untyped-call]
            # Take the gradients that no hook has reported: all if `overlap` is off, else those that the loss function
            # assigned itself. The last parameter comes first, because units are sent in that order.
            for name, param in reversed(self._params.items()):
                self._reducer.arrived(name, param)
            self.buffers.end_micro_batch(micro_batch, refuse_nan=self._unsharder.is_used)
            self._settings.end_micro_batch()
        return result.detached()

    def _my_control(self, results: dict[int, LossResult]) -> Control:
        """Return this worker's control values for the step. results: the loss function's results, by micro-batch."""
        losses, weights, *metrics = self._loss_reader.values(results, self.recipe.batch.micro_batches)
        bad = self._reducer.not_finite
        return Control(
            losses=losses,
            weights=weights,
            metrics=np.array(metrics).reshape(len(metrics), len(losses)),
            got_gradient=np.array([name not in self._reducer.without_gradient for name in self._param_names]),
            changed_buffers=np.array(self.buffers.changed(), dtype=bool),
            bad=None if bad is None else (bad[0], self._param_names.index(bad[1])),
            settings=(self._settings.hash,),
            stop=self.stop_requested,
            save=self.save_requested,
            has_hooks=self._step_hooks.exist,
            sets_attributes=self._attributes.sets_anew,
            measured=self.clock.measured,
        )

    def _accept(self, control: Control) -> None:
        """Refuse a step with invalid control values, before any state has changed, or apply the step's amendments."""
        self._settings.compare(control.settings, self.group)
        if control.sets_attributes:
            agree_on_attributes(self._attributes.assigned(), self.group)
        self.buffers.refuse_changes(list(control.changed_buffers))
        form, step = self._loss_reader.form, self.next_step
        refuse_weights(control, form, fractional=self.recipe.fractional_weights, tag=f"step {step}")
        error = not_finite(control, self._param_names, self.recipe, self.batch_index, self._unsharder.not_finite_hint)
        if error is not None:
            # All workers raise this error and leave no collective call unmatched, so the engine stays usable.
            self._reducer.discard()
            error.nothing_changed = True  # type: ignore[attr-defined]
            raise error
        apply_changes(self.amendments.of_optimizers(step), self.optimizer.fronts, self.schedules)

    def _update(self, control: Control, weight: float, tag: str) -> float:
        """Update weights, buffers and schedules from the step's sums. Return the gradient's norm. Collective."""
        self.stop_requested, self.save_requested = control.stop, control.save
        self.clock.of_workers = control.measured
        unused = {name for name, got in zip(self._param_names, control.got_gradient, strict=True) if not got}
        self._publish_status("update")
        present, mine = self.epochs.present(self.batch_index), self.my_micro_batches(self.batch_index)
        self.buffers.merge(list(control.changed_buffers), present, mine, self.group, f"{tag} / buffers")
        before = partial(self._step_hooks.before, self.batch_index) if control.has_hooks else None
        clip_norm = self.amendments.clip_norm(self.next_step, self.recipe.clip_norm)
        norm = self.updater.update(self._reducer, weight, clip_norm, unused, self.next_step, before)
        self._step_hooks.after(self.batch_index, called=control.has_hooks)
        advance(self.schedules)
        return norm

    @contextmanager
    def unsharded_model(self) -> Iterator[nn.Module]:
        """Unshard the complete model, to inspect it between two steps. Collective.

        Every worker needs memory for the full model until the block ends.
        """
        with self._unsharder.unsharded():
            yield self.model

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the model for forward passes between two steps. Collective: the end of the block waits for all workers.

        See `EvaluationMode`. Sharded parameters are unsharded unit by unit, as the model needs them. Workers may call
        the model different numbers of times, or not at all. Raises ConfigError inside another `evaluating` block.
        """
        self.check_usable()
        with self.evaluation.free():
            yield self.model

    def digest(self) -> str:
        """Return the digest of master weights and persistent buffers, see `numerics.digest`. Collective.

        Also stores the hashes of their blocks in `last_hashes`, [num_blocks] int64, in the order of `digest_names`.
        """
        self.check_usable()
        of_params = self.updater.hashes(f"step {self.step_index}").numpy()
        starts = np.cumsum([blocks_of(numel) for _, numel in self.trained])[:-1]
        hashes = dict(zip(dict(self.trained), np.split(of_params, starts), strict=True))
        current = self.buffers.named()
        hashes |= {name: tensor_hashes(current[name]) for name in self.buffers.persistent}
        self.last_hashes = np.concatenate([hashes[name] for name, _ in self.digest_names])
        return digest_of(self.digest_names, self.last_hashes)

    def _tensors_in_digest(self) -> list[tuple[str, int]]:
        words, current = dict(self.trained), self.buffers.named()
        words |= {name: words_of(current[name]) for name in self.buffers.persistent}
        return [(name, words[name]) for name in names_in_order(self.model) if name in words]

    def full_params(self) -> dict[str, Tensor]:
        """Return the complete master weights of every trainable parameter by name, fp32 on the CPU. Collective."""
        self.check_usable()
        shapes = {name: param.shape for name, param in self._params.items()}
        return full_params(self.units, shapes, self.group, f"step {self.step_index}")

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the complete state_dict on every worker, on the CPU. Collective.

        The values of trainable parameters are the master weights, in fp32. Frozen parameters and buffers have their own
        dtypes. Tied parameters appear under all of their names. Extra states are as `get_extra_state` returns them.
        """
        full = self.full_params()
        with self._unsharder.unsharded(self.frozen_units):
            return full_state_dict(self.model, {id(param): full[name] for name, param in self._params.items()})

    def facts(self) -> dict[str, str]:
        """Return the facts that a checkpoint must share with this engine. They describe the recipe as text."""
        params = {f"parameter {name}": str(numel) for name, numel in self.trained}
        buffers = {f"buffer {name}": str(list(buffer.shape)) for name, buffer in self.model.named_buffers()}
        buffers |= buffer_rules(self.buffers.rules_of_bits)
        return recipe_facts(self.recipe) | params | self.frozen_facts | buffers | self._optimizer_facts

    def close(self) -> None:
        """Leave the group. Collective, unless a worker failed."""
        for hook in (*self._hooks, *reversed(self._module_hooks)):
            hook.remove()
        self._undo()
        self._compiled.undo()
        self.allocator.close()
        self.group.close()
