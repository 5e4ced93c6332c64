"""The step that all workers run together."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manyhands.comm.group import Group
from manyhands.comm.local import LocalGroup
from manyhands.config import Recipe, Strategy
from manyhands.engine.agreement import (
    agree,
    agree_on_model,
    frozen_facts,
    optimizer_facts,
    recipe_facts,
    schedule_facts,
)
from manyhands.engine.assembly import Storage, check_scratch_space, lay_out
from manyhands.engine.sharding import SHARDED, sharding_named
from manyhands.engine.step.buffers import Buffers
from manyhands.engine.step.compute import around_forward, loss_and_weight, on_gradients, to_device
from manyhands.engine.step.control import Control, all_gather_control
from manyhands.engine.step.metrics import PhaseClock, StepMetrics
from manyhands.engine.step.reduce import GradientReducer
from manyhands.engine.units.partition import repeated_children
from manyhands.engine.units.unit import ParamUnit
from manyhands.engine.units.unsharding import Unsharder
from manyhands.engine.update.apply import Allocators, Updater
from manyhands.errors import InvariantError, NumericsError
from manyhands.models.admission import ParamGuard
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.models.building import build_model
from manyhands.models.compiling import CompiledModules, avoid_compiler_import, compiler_identity
from manyhands.models.recompute import checkpoint_activations
from manyhands.numerics.arithmetic import fix_arithmetic, numerics_identity
from manyhands.numerics.counters import derive
from manyhands.numerics.digest import digest_of, slots_in_order
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.offload.allocator import Allocator, allocator_for
from manyhands.offload.process_memory import keep_freed_memory, return_freed_memory
from manyhands.optim.sliced import SlicedOptimizer

_HINT_SAME_MACHINES = "use the same version of torch and the same kind of CPU (and GPU) for all workers"

_HINT_SAME_RECIPE = "start all workers with the same program, the same recipe and the same data"


class StepEngine:
    """The model of a recipe on this worker, and its steps. Making one is collective.

    model: the worker's model; its parameters are views of flat buffers, with the names, order and shapes they were
    built with. step_index: the number of steps made so far. identity: the run's numerics identity. Raises ConfigError,
    on all workers alike.
    awaited: the parameters whose values are to be loaded from the recipe's files, and told in `frozen_facts` if frozen.
    """

    def __init__(self, recipe: Recipe, strategy: Strategy, group: Group) -> None:
        self.recipe, self.strategy, self.group = recipe, strategy, group
        avoid_compiler_import()
        fix_arithmetic(recipe)
        recipe.batch.check_workers(group.size)
        agree(group, "recipe", recipe_facts(recipe), hint=_HINT_SAME_RECIPE)
        held = {"sharding": strategy.sharding, "offload": strategy.offload, "units": str(strategy.units)}
        agree(group, "strategy", held, hint=_HINT_SAME_RECIPE)
        scratch = Path(strategy.scratch or tempfile.gettempdir())
        update_on = group.device if strategy.offload == "none" else torch.device("cpu")
        self.identity = numerics_identity(group.device, recipe.threads_per_worker, update_on)
        self.identity |= compiler_identity(recipe.compile)
        agree(group, "numerics", self.identity, hint=_HINT_SAME_MACHINES)
        keep_freed_memory(large=strategy.offload != "disk")
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
        """The model, first at `building`, in its units."""
        recipe, group = self.recipe, self.group
        with group.exclusive():
            self.model, self.awaited = build_model(recipe, building)
        agree_on_model(self.model, self.awaited, group, building)
        self.param_shapes = {name: param.shape for name, param in self.model.named_parameters()}  # as they were built
        self.param_dtypes = {name: param.dtype for name, param in self.model.named_parameters()}  # likewise
        optimizer_params = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        self.optimizer = SlicedOptimizer(recipe.optimizer, optimizer_params, declared_kind=recipe.optimizer_kind)
        self.frozen_facts = frozen_facts(self.model, self.awaited, building)
        storage = lay_out(
            self.model, recipe, group, self.strategy, self.optimizer.unsplittable, self.awaited, self.allocator
        )
        check_scratch_space(self.allocator, group, storage.units, self.optimizer, recipe.batch)
        return storage

    def _set_up(self, storage: Storage) -> None:
        """What trains the model."""
        recipe, strategy, group = self.recipe, self.strategy, self.group
        sharding = sharding_named(strategy.sharding)
        self.layout, self.units, self.frozen_units = storage.layout, storage.units, storage.frozen
        self._params = dict(storage.named_params)
        self._param_names = list(self._params)
        self._optimizer_facts = optimizer_facts(self.optimizer)  # as the recipe has it: a schedule changes it
        self.schedules = tuple(map(recipe.schedule, self.optimizer.fronts)) if recipe.schedule is not None else ()
        self._optimizer_facts |= schedule_facts(self.schedules)
        agree(group, "optimizer", self._optimizer_facts, hint=_HINT_SAME_RECIPE)
        self.buffers = Buffers(self.model, recipe.batch.micro_batches)
        self._watch = ParamGuard(self.model, self.buffers.frozen, (*self.units, *self.frozen_units))
        # A model that doesn't fit has sums of gradients that don't.
        sums_allocator = (
            self.allocator if self.allocator.on_disk and sharding.param is SHARDED else Allocator(group.device)
        )
        self._reducer = GradientReducer(group, self.units, recipe.batch, sharding, sums_allocator)
        self.updater = Updater(
            group, self.units, self.layout, sharding, self.optimizer, Allocators(self.allocator, sums_allocator)
        )
        self._has_bf16 = any(param.dtype == torch.bfloat16 for param in self.model.parameters())
        self._compiled = CompiledModules(self.model, repeated_children(self.model) if recipe.compile else None)
        gathered = storage.gathered_units
        for unit in gathered:
            unit.modules = self._compiled.around(unit.modules)
        # Where memory is shared, or nobody else is there, a gather is a copy, and needs nobody.
        gathering = group.sibling() if gathered and not group.pieces_are_views else LocalGroup(group.device)
        self._unsharder = Unsharder(gathering, gathered, strategy.unshard_ahead)
        self._hooks = on_gradients(self._params.items(), self._reducer.arrived) if strategy.overlap else []
        self._compiled.refuse_inside(strategy.activation_checkpointing, "strategy.activation_checkpointing")
        self._undo = checkpoint_activations(self.model, strategy.activation_checkpointing, self._unsharder.using)
        self._module_hooks = self._gather_around_forwards(gathered)
        self._clock = PhaseClock(group.recorder)
        self.step_index = 0
        self._weighted = False  # whether the loss function gives weights
        self.last_hashes: np.ndarray | None = None
        # Set by one worker that hears a signal, or by its clock; all of them learn it at the next step.
        self.stop_requested = self.save_requested = False
        self._failed: BaseException | None = None

    def _gather_around_forwards(self, units: Sequence[ParamUnit]) -> list[RemovableHandle]:
        """Modules make the units whole that they use."""
        gathers, handles = self._unsharder, []
        for unit in units:
            for name in unit.modules:
                enter = self._compiled.outside(partial(gathers.enter, unit))
                handles += around_forward(self.model.get_submodule(name), enter, partial(gathers.leave, unit))
        return handles

    @property
    def my_micro_batches(self) -> list[int]:
        """The micro-batches of a step that this worker computes, in order."""
        return [this.micro_batch for this in self._reducer.rounds if this.micro_batch is not None]

    def run_step(self, load: Callable[[int], Any], *, digest: bool = False) -> StepMetrics:
        """Make one step. Collective.

        load(i) gives micro-batch i, for each of `my_micro_batches` in order. digest: compute the digest, too.
        Raises NumericsError (a loss or gradient is not finite; nothing was changed: the engine may be saved, or the
        step made again with other data),
        WorkerError, and what the model or the loss raises; after those the engine can't be used any more.
        """
        with self.changing():
            return self._step(load, digest)

    def check_usable(self) -> None:
        """Raises InvariantError after a failure that left the state half changed."""
        if self._failed is not None:
            raise InvariantError(
                f"this engine failed at step {self.step_index} and can't go on: {self._failed}",
                hint="make a new engine and load the last checkpoint",
            )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While the state changes: unless an error says that nothing did, the engine is of no use after it."""
        self.check_usable()
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, NumericsError) and getattr(error, "nothing_changed", False)):
                self._failed = error
                self.group.fail(error)
                self._unsharder.abort()
                for unit in self.units:
                    unit.abort()
            raise

    def _step(self, load: Callable[[int], Any], digest: bool) -> StepMetrics:
        step, tag = self.step_index, f"step {self.step_index}"
        self._clock.begin()
        self._watch.before_step()
        self.model.train()  # also after an evaluation that forgot to: a step depends on the last one's state alone
        self.buffers.begin_step()
        self._reducer.begin_step(step)
        losses = {}
        for index, this in enumerate(self._reducer.rounds):
            with self._clock.phase("data"):
                if this.micro_batch is not None:
                    self._say("data", this.micro_batch)
                    with self.group.exclusive():  # loading seeds the generators, too
                        batch = to_device(load(this.micro_batch), self.group.device)
            with self._clock.phase("communication"):
                self._reducer.begin(index)
                self._unsharder.begin(f"{tag}, round {index}", computes=this.micro_batch is not None)
            with self._clock.phase("compute"):
                if this.micro_batch is not None:
                    losses[this.micro_batch] = self._compute(step, this.micro_batch, batch)
                    batch = None
            with self._clock.phase("communication"):
                self._say("communication")
                self._unsharder.end()
                self._reducer.end()
        self._watch.after_backward()
        with self._clock.phase("communication"):
            self._unsharder.end_step()
            self._reducer.close_rounds()
            control = all_gather_control(self._my_control(losses), self.group, f"{tag} / control")
            self._reducer.await_pieces()
        self._refuse_not_finite(control, tag)
        weight = _added_in_order(control.weights)
        with self._clock.phase("update"):
            learning_rates = self.optimizer.learning_rates
            norm = self._update(control, weight, tag)
            self.step_index += 1
            digest_text = self.digest() if digest else None
        self.group.status(f"after {tag}", step)
        return StepMetrics(
            step=step,
            loss=_added_in_order(control.losses) / weight,
            weight=weight,
            samples=self.recipe.batch.global_size,
            weighted=self._weighted,
            gradient_norm=norm,
            learning_rates=learning_rates,
            step_seconds=self._clock.step_seconds,
            seconds=self._clock.seconds,
            bytes_moved=self._clock.bytes_moved,
            digest=digest_text,
        )

    def _say(self, doing: str, micro_batch: int | None = None) -> None:
        """What this step does now, for the others, and for whoever starts the workers again."""
        part = "" if micro_batch is None else f", micro-batch {micro_batch}"
        self.group.status(f"step {self.step_index}{part} / {doing}", self.step_index, micro_batch)

    def _compute(self, step: int, micro_batch: int, batch: Any) -> tuple[Tensor, Tensor | float]:
        """Forward and backward of one micro-batch; its loss and weight."""
        self._say("forward and backward", micro_batch)
        bf16 = self._has_bf16 and not self.recipe.compile
        with self.group.exclusive(), preserved_generators(), self._compiled.computing(), bf16_products_in_fp32(bf16):
            seed_generators(derive(self.recipe.seed, "compute", step, micro_batch))
            with self._unsharder.watching_autograd():
                result = self.recipe.loss(self.model, batch)
            self._weighted = isinstance(result, tuple) and len(result) == 2
            loss, weight = loss_and_weight(result)
            self._watch.before_backward(loss)
            self._unsharder.begin_backward()
            loss.backward()  # type: ignore[no-untyped-call]
            # What no hook has told of: all, in the order in which units are sent, or what the loss set by hand.
            for name, param in reversed(self._params.items()):
                self._reducer.arrived(name, param)
            self.buffers.end_micro_batch(micro_batch)
        return loss.detach(), weight.detach() if isinstance(weight, Tensor) else weight

    def _my_control(self, losses: dict[int, tuple[Tensor, Tensor | float]]) -> Control:
        count = self.recipe.batch.micro_batches
        values, weights = np.zeros(count), np.zeros(count)
        for micro_batch, (loss, weight) in losses.items():
            values[micro_batch], weights[micro_batch] = float(loss), float(weight)
        bad = self._reducer.not_finite
        return Control(
            losses=values,
            weights=weights,
            got_gradient=np.array([name not in self._reducer.without_gradient for name in self._param_names]),
            changed_buffers=np.array(self.buffers.changed(), dtype=bool),
            bad=None if bad is None else (bad[0], self._param_names.index(bad[1])),
            stop=self.stop_requested,
            save=self.save_requested,
        )

    def _refuse_not_finite(self, control: Control, tag: str) -> None:
        """Raised on all workers alike, before anything has changed."""
        bad_losses = np.flatnonzero(~np.isfinite(control.losses))
        weight = _added_in_order(control.weights)
        error: NumericsError | None = None
        if control.bad is not None and not (len(bad_losses) and bad_losses[0] <= control.bad[0]):
            loss = control.losses[control.bad[0]]
            error = NumericsError(
                f"the gradient of {self._param_names[control.bad[1]]!r} is not finite in micro-batch {control.bad[0]}",
                where=f"{tag}, {self.recipe.batch.samples_of(self.step_index, control.bad[0])}; its loss is {loss:g}",
                hint="lower the learning rate, set clip_norm, or look at those samples; no weight has been changed",
            )
        elif len(bad_losses):
            error = NumericsError(
                f"the loss of micro-batch {bad_losses[0]} is {control.losses[bad_losses[0]]:g}",
                where=f"{tag}, {self.recipe.batch.samples_of(self.step_index, int(bad_losses[0]))}",
                hint="look at those samples, or lower the learning rate; no weight has been changed"
                + self._unsharder.why_not_finite,
            )
        elif not (math.isfinite(weight) and weight > 0):
            error = NumericsError(
                "the global batch has no weight",
                where=tag,
                expected="a positive sum of the loss function's weights",
                got=weight,
            )
        if error is not None:
            self._reducer.drop()
            self.buffers.abort()
            error.nothing_changed = True  # type: ignore[attr-defined]
            raise error

    def _update(self, control: Control, weight: float, tag: str) -> float:
        self.stop_requested, self.save_requested = control.stop, control.save
        unused = {name for name, got in zip(self._param_names, control.got_gradient, strict=True) if not got}
        self._say("update")
        norm = self.updater.update(self._reducer, weight, self.recipe.clip_norm, unused, tag)
        self._reducer.release()
        self.buffers.merge(list(control.changed_buffers), self.my_micro_batches, self.group, f"{tag} / buffers")
        for front in self.optimizer.fronts:
            front.step()  # updates nothing (no parameter has a gradient); schedules want to see it
        for schedule in self.schedules:
            schedule.step()
        return norm

    @contextmanager
    def unsharded_model(self) -> Iterator[nn.Module]:
        """The model with all its parameters, to look into it between two steps. Collective; where these are sharded
        they take the whole model's memory on every worker meanwhile."""
        with self._unsharder.whole():
            yield self.model

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model, to call it between two steps; sharded parameters are gathered unit by unit, as it needs them, also
        if a worker calls it more often than another one, or never. Collective: its end waits for everyone."""
        try:
            with self._unsharder.evaluating(), bf16_products_in_fp32(self._has_bf16):
                yield self.model
        except BaseException as error:
            self.group.fail(error)  # the others wait for this worker
            self._unsharder.abort()
            raise

    def digest(self) -> str:
        """SHA-256 over the hashes of the master weights' blocks; `last_hashes` keeps these, [num_blocks] int64.
        Collective."""
        self.check_usable()
        self.last_hashes = self.updater.hashes(f"step {self.step_index}").numpy()
        return digest_of(self.digest_names, self.last_hashes)

    @property
    def digest_names(self) -> list[tuple[str, int]]:
        """(name, numel) of the parameters that the digest covers, in order."""
        return slots_in_order([slot for unit in self.units for slot in unit.layout.slots])

    def full_params(self) -> dict[str, Tensor]:
        """Every trainable parameter's master weights, whole, fp32 on CPU, under its name. Collective."""
        full = {}
        for unit in self.units:
            mine = torch.zeros(unit.layout.shard_numel)
            start = unit.shard.start - unit.held.start
            mine[: unit.shard.numel] = unit.master[start : start + unit.shard.numel]
            whole = torch.cat(self.group.all_gather_small(mine, f"step {self.step_index} / {unit.name} / full"))
            for slot in unit.layout.slots:
                full[slot.name] = whole[slot.range.start : slot.range.end].view(self._params[slot.name].shape).clone()
        return full

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's state_dict with the master weights, fp32 on CPU; frozen parameters and buffers as they are.
        Collective; every worker gets it whole."""
        full = self.full_params()
        names = {id(param): name for name, param in self._params.items()}
        state = {}
        with self._unsharder.whole(self.frozen_units):
            for key, value in self.model.state_dict(keep_vars=True).items():  # tied parameters under all of their names
                state[key] = full[names[id(value)]] if id(value) in names else value.detach().cpu().clone()
        return state

    def facts(self) -> dict[str, str]:
        """What a checkpoint must have in common with this engine: the recipe, as far as it can be told."""
        params = {f"parameter {name}": str(numel) for name, numel in self.digest_names}
        buffers = {f"buffer {name}": str(list(buffer.shape)) for name, buffer in self.model.named_buffers()}
        return recipe_facts(self.recipe) | params | self.frozen_facts | buffers | self._optimizer_facts

    def close(self) -> None:
        """Leave the group. Collective, unless a worker failed."""
        for hook in (*self._hooks, *self._module_hooks):
            hook.remove()
        self._undo()
        self._compiled.undo()
        self.allocator.close()
        self.group.close()


def _added_in_order(values: np.ndarray) -> float:
    """Their sum, left to right."""
    total = 0.0
    for value in values:
        total += float(value)
    return total
