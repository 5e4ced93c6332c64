"""Decides when sharded units are unsharded and resharded.

Unsharding is collective, so all workers must unshard the same units in the same order, whatever their models do.

In each round all workers go through one list, the round's *plan*: first the units that must stay unsharded, then the
other units in the order of forward, then these units again in the order of backward. A worker advances in the plan when
its model needs a unit (`need`), and unshards a few units in advance. It also takes part in the unshards of units that
its own model doesn't need.

A model may need a unit that is no longer in the plan, because the model uses the unit again or in another order. The
worker then goes to the plan's end and requests the unit there. All workers stay at the plan's end until no worker has a
request. After the step they agree on a better plan. So even if models behave differently on different data, no worker
waits for a collective call that another worker doesn't make.

Unshards have their own sequence of collective calls (`Group.sibling`). So a worker waits only for its peers to reach
the same point of the plan, and never for their gradients.

A unit stays unsharded after the model has left it, until the model needs another unit. At the latest, the unit is
resharded when its gradients are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.engine.units.params import ParamView
from manyhands.engine.units.unit import ParamUnit, State
from manyhands.errors import ConfigError, InvariantError

NO_REQUEST = -1


def _has_storage(leaf: object) -> TypeGuard[Tensor]:
    """Return True if the tensor is in memory. torch.vmap passes tensors that are not."""
    return isinstance(leaf, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)


class _Saved(NamedTuple):
    """The record that autograd stores for backward in place of a tensor.

    unit: the unit that backward must unshard again, if the tensor is a view of its parameters; otherwise None.
    view: the description of the view of the unit's buffer; None for other tensors.
    values: the tensor itself or, in place of a view of a unit, a tensor without data that only counts in-place changes.
    version: the number of in-place changes when the tensor was saved. torch doesn't check this number if saved-tensor
    hooks are in use.
    """

    unit: ParamUnit | None
    view: ParamView | None
    values: Tensor
    version: int


class Unsharder:
    """Unshards and reshards a model's units, as the module's docstring describes.

    For each round, call `begin`, then `need`, `enter` and `leave` while the model computes, then `end`.
    group: a group that is used only for unsharding.
    units: the units that are unsharded on demand. If there are none, all methods do nothing.
    ahead: the number of units that are unsharded before they are needed.
    """

    def __init__(self, group: Group, units: Sequence[ParamUnit], ahead: int) -> None:
        self._units, self._ahead = list(units), ahead
        self._group = group
        self._always = [unit for unit in self._units if not unit.modules]
        self._order = [unit for unit in self._units if unit.modules]  # the order in which forward will need them
        self._in_round = self._backward = False
        self._tag = "start"
        self._plan: list[ParamUnit] = []
        self._next = 0  # index in the plan
        self._ahead_units: deque[ParamUnit] = deque()  # unsharded ahead, not yet needed
        self._used: list[ParamUnit] = []  # unsharded, and perhaps not needed any more
        self._skipped: set[str] = set()  # names of the units in `_used` that have not been needed so far
        self._by_address: dict[int, ParamUnit] = {}  # by the address of the unsharded parameters
        self._inside: dict[str, int] = {}  # number of forwards in progress, by unit
        self._serving: deque[Callable[[], None]] = deque()  # functions that wait for unshards that only peers need
        self._needed: list[ParamUnit] = []  # units needed in this round's forward, in order
        self._plan_failed = False  # a worker had to request a unit, so a better plan is needed

    # - Rounds

    def begin(self, tag: str, *, computes: bool, backward: bool = True) -> None:
        """Start a round. computes: True if this worker has a micro-batch in it. Collective."""
        if not self._units:
            return
        self._tag = tag
        # The last unit appears once: backward starts with the unit that forward ended with.
        self._plan = [*self._always, *self._order, *(reversed(self._order[:-1]) if backward else ())]
        self._next, self._needed, self._in_round, self._backward = 0, [], True, False
        self._inside, self._used, self._skipped = {}, [], set()
        if computes:
            for _ in self._always:
                self._advance()
            while self._ahead_units:
                self._arrive(self._ahead_units.popleft())

    @contextmanager
    def watching_autograd(self) -> Iterator[None]:
        """Context for a forward whose backward unshards the parameters that it needs. Raises ConfigError."""
        if not self._units:
            yield
            return
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        except RuntimeError as error:
            if "don't yet support saved tensor hooks" in str(error):
                raise self._refused_transform() from error
            raise

    def _refused_transform(self) -> ConfigError:
        return ConfigError(
            "a transform of torch.func uses a model whose parameters are sharded",
            where=self._tag,
            expected="forwards outside of transforms, or inside of torch.vmap",
            hint="use sharding zero2 for this model",
        )

    @property
    def is_used(self) -> bool:
        """Return True if any unit is unsharded on demand."""
        return bool(self._units)

    @property
    def not_finite_hint(self) -> str:
        """Return a sentence about another possible cause of a non-finite loss, for an error's hint, or an empty
        string.
        """
        cause = ". The loss is also NaN if the model uses a sharded parameter outside of its unit's forward"
        advice = "in that case, use sharding zero2, or update averages of weights (EMA) in a step hook of the optimizer"
        return f"{cause}: {advice}" if self._units else ""

    def begin_backward(self) -> None:
        """Mark the end of forward. From now on, a unit stays unsharded until another one is needed."""
        self._backward = True

    def end(self) -> None:
        """Finish a round. This worker's model doesn't need the remaining units of the plan. Collective."""
        if not self._units:
            return
        while self._next < len(self._plan):
            self._reshard_ahead()
            self._advance(needed=False)
        self._reshard_ahead()
        self._request(None)
        for unit in self._units:
            unit.reshard()
        self._in_round = False

    def end_step(self) -> None:
        """Finish a step: agree on a better plan if any worker requested a unit. Collective in that case."""
        # All workers take part in every request, so `_plan_failed` is the same on all of them.
        if not self._plan_failed:
            return
        self._plan_failed = False
        mine = [self._units.index(unit) for unit in self._needed]
        # All workers must use the same order: worker 0's. Any order is correct; a good one avoids requests.
        indices = all_gather_json(self._group, mine, f"{self._tag} / plan / control")[0]
        agreed = [self._units[index] for index in indices]  # type: ignore[attr-defined]
        for before, unit in pairwise([None, *(unit for unit in self._units if unit.modules)]):
            # Worker 0 didn't need the unit, but peers may: insert it after the unit that was built before it.
            if unit is not None and unit not in agreed:
                position = 0 if before not in agreed else len(agreed) - agreed[::-1].index(before)
                agreed.insert(position, unit)
        self._order = agreed

    def abort(self) -> None:
        """Leave the round after a failure in the step."""
        self._in_round = False

    # - Called while the model computes

    def enter(self, unit: ParamUnit) -> None:
        """Note that the forward of a module that uses the unit begins, and unshard the unit."""
        self.need(unit)
        self._inside[unit.name] = self._inside.get(unit.name, 0) + 1

    def leave(self, unit: ParamUnit, result: object) -> None:
        """Note that the forward of a module that uses the unit has ended. result: the value that the forward returned.

        Raises ConfigError if a tensor in it is a view of the parameters, because the view would read as NaN once the
        parameters are resharded.
        """
        self._inside[unit.name] = self._inside.get(unit.name, 1) - 1
        if self._inside[unit.name] == 0 and self._in_round and not self._backward:
            for leaf in tree_leaves(result):
                if _has_storage(leaf) and unit.on_demand_params.view_of(leaf) is not None:
                    raise ConfigError(
                        f"a module of unit {unit.name!r} returns its own parameter, which is resharded before it is "
                        "used",
                        where=self._tag,
                        expected="results that are computed from the parameter",
                        hint="use sharding zero2, or set strategy.units to modules whose forwards contain all uses of "
                        "their parameters",
                    )

    @contextmanager
    def using(self, module: str) -> Iterator[None]:
        """Return a context in which backward recomputes a module's forward."""
        units = [unit for unit in self._units if module in unit.modules]
        for unit in units:
            self.enter(unit)
        try:
            yield
        finally:
            for unit in units:
                self.leave(unit, None)

    def need(self, unit: ParamUnit) -> None:
        """Unshard the unit, which the model needs now.

        Raises ConfigError outside of a round or after the unit's gradients were complete, and WorkerError.
        """
        unsharded = unit.is_unsharded and unit not in self._ahead_units
        if unsharded and unit.name not in self._skipped:
            return
        if not self._backward:
            self._needed.append(unit)
        self._skipped.discard(unit.name)
        if unsharded:
            return
        self._check_need(unit)
        if unit in self._ahead_units and unit.life.state is State.RESTING:  # resharded when its gradients were sent
            self._ahead_units.remove(unit)
        self._reshard_used(unit)
        while unit not in self._ahead_units and self._next < len(self._plan):
            self._advance(needed=self._plan[self._next] is unit or len(self._ahead_units) < self._ahead)
        if unit in self._ahead_units:
            while (first := self._ahead_units.popleft()) is not unit:
                self._arrive(first)
                self._used.append(first)
                self._skipped.add(first.name)  # the model may still need it, later than planned
            self._arrive(unit)
        else:
            self._reshard_ahead()
            self._request(unit)
        self._used.append(unit)
        while len(self._ahead_units) < self._ahead and self._next < len(self._plan):
            self._advance()
        if self._next < len(self._plan):
            self._plan[self._next].on_demand_params.prefetch()

    def pack(self, tensor: Tensor) -> _Saved:
        """Return the record that autograd stores in place of a tensor that backward will need."""
        unit = self._by_address.get(tensor.untyped_storage().data_ptr())
        view = None if unit is None else unit.on_demand_params.view_of(tensor)
        # Don't store the tensor itself: it may refer to the graph node that stores it, and this cycle would never be
        # freed.
        values = tensor.detach()
        if view is not None:
            values.data = values.new_empty(0)  # still shares the version counter, but not the buffer
        return _Saved(unit, view, values, values._version)

    def unpack(self, saved: _Saved) -> Tensor:
        """Return the tensor that was passed to `pack`. Unshards its unit if needed. Raises ConfigError."""
        if saved.values._version != saved.version:
            raise ConfigError(
                f"a tensor that backward needs was changed in place (shape {tuple(saved.values.shape)})",
                where=f"{self._tag} / backward",
                hint="don't use in-place operations on it between forward and backward",
            )
        if saved.unit is None or saved.view is None:
            return saved.values
        self.need(saved.unit)
        full = saved.unit.on_demand_params.full
        if full is None:
            raise InvariantError(f"unit {saved.unit.name!r} is not unsharded", where=self._tag)
        return saved.view.of(full)

    def _check_need(self, unit: ParamUnit) -> None:
        transforms = torch._C._functorch.get_interpreter_stack() or []
        if any(transform.key() != torch._C._functorch.TransformType.Vmap for transform in transforms):
            raise self._refused_transform()
        if not self._in_round:
            raise ConfigError(
                f"the parameters of {unit.name!r} are sharded, and can be used only during a step",
                hint="use the model inside `with engine.evaluating():` or, if every worker has memory for the full "
                "model, `with engine.unsharded_model():`",
            )
        if unit.life.state is State.REDUCING:
            raise ConfigError(
                f"backward needs the parameters of {unit.name!r} again after their gradients were complete",
                where=self._tag,
                hint="use sharding zero2 for this model",
            )

    # - Collective calls

    @contextmanager
    def unsharded(self, units: Sequence[ParamUnit] | None = None) -> Iterator[None]:
        """Unshard these units (None: all) between steps.

        Units that are already unsharded stay unsharded. Collective.
        """
        resting = [unit for unit in (self._units if units is None else units) if not unit.is_unsharded]
        for unit in resting:
            unit.unshard(self._group, f"{self._tag} / {unit.name} / param")
            unit.wait_unsharded()
        try:
            yield
        finally:
            for unit in resting:
                unit.reshard()
            for unit in resting[:1]:  # all units share one pool
                unit.on_demand_params.trim_pool()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Return a context for a round in which each worker may run any number of forwards. Collective."""
        self.begin("evaluation", computes=True, backward=False)
        yield
        self.end_evaluation()

    def end_evaluation(self) -> None:
        """Finish a round that was not a part of a step. Collective.

        The requests of this round must not change the plan of the steps. They must not make the end of the next step a
        collective call, either.
        """
        self.end()
        self._plan_failed = False

    def _arrive(self, unit: ParamUnit) -> None:
        unit.wait_unsharded()
        full = unit.on_demand_params.full
        if full is not None:
            self._by_address[full.untyped_storage().data_ptr()] = unit

    def _advance(self, needed: bool = True) -> None:
        """Start the plan's next unshard. needed: False if only peers need the unit."""
        unit = self._plan[self._next]
        self._next += 1
        tag = f"{self._tag} / {unit.name} / param"
        if needed and unit.life.state is State.RESTING:
            unit.unshard(self._group, tag)
            self._ahead_units.append(unit)
        else:
            self._serve(unit, tag)

    def _serve(self, unit: ParamUnit, tag: str) -> None:
        self._serving.append(unit.serve(self._group, tag))
        # Each unshard takes a buffer until it ends, so only a few may be in flight.
        while len(self._serving) > self._ahead + 1:
            self._serving.popleft()()

    def _reshard_ahead(self) -> None:
        """Reshard the units that were unsharded ahead, since this worker's model doesn't need them."""
        while self._ahead_units:
            self._ahead_units.popleft().reshard()

    def _reshard_used(self, needed: ParamUnit) -> None:
        """Reshard units that were used before `needed`, unless their forward is still in progress.

        Units of one module (for example, a block's matrices and its other parameters) stay together, because backward
        needs them alternately.
        """
        staying = []
        for unit in self._used:
            if unit is needed or self._inside.get(unit.name, 0) > 0 or set(unit.modules) & set(needed.modules):
                staying.append(unit)
            else:
                unit.reshard()
        self._used = staying

    def _request(self, unit: ParamUnit | None) -> None:
        """Request `unit` at the plan's end and serve peers' requests.

        If `unit` is None, serve requests until no worker makes one.
        """
        while True:
            number = NO_REQUEST if unit is None else self._units.index(unit)
            numbers = self._group.all_gather_small(torch.tensor([number]), f"{self._tag} / request / control")
            # Sorted, so that all workers use the same order.
            requested = sorted({int(each) for each in numbers} - {NO_REQUEST})
            if not requested:
                break
            self._plan_failed = True
            for index in requested:
                other = self._units[index]
                tag = f"{self._tag} / {other.name} / param"
                if other is unit:
                    unit.unshard(self._group, tag)
                    self._arrive(unit)
                else:
                    self._serve(other, tag)
            if unit is not None:
                return
        while self._serving:
            self._serving.popleft()()
