"""Decides when sharded units are unsharded and resharded.

A gather is collective, so all workers must make the same ones in the same order, whatever their models do. In each
round they go through one list, the round's *plan*: units that must be whole all the time, then the others in the order
of forward, then in that of backward. A worker goes on in the plan when its model needs a unit (`need`), a few units
ahead of it; it takes part in gathers that its own model doesn't want. What a model needs and the plan doesn't have any
more (a unit used again, or in another order) it asks for at the plan's end, where all workers meet until nobody asks;
afterwards they agree on a better plan. So whatever a model chooses by its data, nobody waits for a gather that another
one doesn't make. These calls have a sequence of their own (`Group.sibling`), and waiting in it depends on nothing else
than others coming this far.

A unit is released when its model has left it and needs another one, and for good when its gradients leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.comm.group import Group
from manyhands.engine.agreement import all_gather_json
from manyhands.engine.units.unit import ParamUnit, State
from manyhands.errors import ConfigError, InvariantError

NOTHING = -1


class _Saved(NamedTuple):
    """What autograd keeps of a tensor for backward.

    view: of a unit's parameters, which have to be gathered again: shape, strides and offset. values: the tensor; of a
    view only to count changes. version: how often it had been changed in place (torch itself doesn't look then).
    """

    unit: ParamUnit | None
    view: tuple[torch.Size, tuple[int, ...], int] | None
    values: Tensor
    version: int


class Unsharder:
    """See the module. For each round: `begin`; `need`, `enter` and `leave` while the model computes; then `end`.

    group: for gathers alone. units: those whose parameters are gathered; without any nothing is done. ahead: how many
    are gathered before they are needed.
    """

    def __init__(self, group: Group, units: Sequence[ParamUnit], ahead: int) -> None:
        self._units, self._ahead = list(units), ahead
        self._group = group
        self._always = [unit for unit in self._units if not unit.modules]
        self._order = [unit for unit in self._units if unit.modules]  # as forward is expected to need them
        self._in_round = self._backward = False
        self._tag = "start"
        self._plan: list[ParamUnit] = []
        self._next = 0  # of the plan
        self._coming: deque[ParamUnit] = deque()  # gathered ahead, not yet needed
        self._left: list[ParamUnit] = []  # whole, and not known to be needed any more
        self._passed: set[str] = set()  # of those, the ones that weren't needed yet
        self._at: dict[int, ParamUnit] = {}  # by the address of its whole parameters
        self._inside: dict[str, int] = {}  # forwards under way, by unit
        self._serving: deque[Callable[[], None]] = deque()
        self._needed: list[ParamUnit] = []  # in this round's forward, in order
        self._surprised = False

    # - A round

    def begin(self, tag: str, *, computes: bool, backward: bool = True) -> None:
        """A round begins. computes: whether this worker has a micro-batch in it. Collective."""
        if not self._units:
            return
        self._tag = tag
        # Backward begins with the unit that forward ended with.
        self._plan = [*self._always, *self._order, *(reversed(self._order[:-1]) if backward else ())]
        self._next, self._needed, self._in_round, self._backward = 0, [], True, False
        self._inside, self._left, self._passed = {}, [], set()
        if computes:
            for _ in self._always:
                self._issue()
            while self._coming:
                self._arrive(self._coming.popleft())

    def watching_autograd(self) -> AbstractContextManager[object]:
        """While forward goes on: backward gathers what it needs."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack) if self._units else nullcontext()

    @property
    def why_not_finite(self) -> str:
        """What else may be behind a loss that is not finite."""
        told = ". With sharded parameters it's also what comes of using one outside of its unit's forward"
        return f"{told}: try sharding zero2" if self._units else ""

    def begin_backward(self) -> None:
        """Forward is over: from here on a unit that's needed stays until another one is."""
        self._backward = True

    def end(self) -> None:
        """This worker's model needs nothing more in this round: go on to where all others are, too. Collective."""
        if not self._units:
            return
        while self._next < len(self._plan):
            self._drop()
            self._issue(wanted=False)
        self._drop()
        self._ask(None)
        for unit in self._units:
            unit.reshard()
        self._in_round = False

    def end_step(self) -> None:
        """All rounds are over. Collective if any worker was surprised, which all know alike."""
        if not self._surprised:
            return
        self._surprised = False
        mine = [self._units.index(unit) for unit in self._needed]
        indices = all_gather_json(self._group, mine, f"{self._tag} / plan / control")[0]
        agreed = [self._units[index] for index in indices]  # type: ignore[attr-defined]
        for before, unit in pairwise([None, *(unit for unit in self._units if unit.modules)]):
            if unit is not None and unit not in agreed:  # others may use it: after the one that was built before it
                place = 0 if before not in agreed else len(agreed) - agreed[::-1].index(before)
                agreed.insert(place, unit)
        self._order = agreed

    def abort(self) -> None:
        """The step failed."""
        self._in_round = False

    # - What the model does

    def enter(self, unit: ParamUnit) -> None:
        """A module that uses the unit begins its forward."""
        self.need(unit)
        self._inside[unit.name] = self._inside.get(unit.name, 0) + 1

    def leave(self, unit: ParamUnit, results: Sequence[Tensor]) -> None:
        """It ended, and gave `results`. Raises ConfigError if they are the parameters themselves."""
        self._inside[unit.name] = self._inside.get(unit.name, 1) - 1
        if self._inside[unit.name] == 0 and self._in_round and not self._backward:
            for tensor in results:
                if unit.on_demand_params.view_of(tensor) is not None:
                    raise ConfigError(
                        f"a module of unit {unit.name!r} returns its own parameter, which is gone when it's used",
                        where=self._tag,
                        expected="results that are computed from it",
                        hint="use sharding zero2, or name in strategy.units modules whose forwards do all that's done "
                        "with their parameters",
                    )

    @contextmanager
    def using(self, module: str) -> Iterator[None]:
        """While that module computes again, in backward."""
        units = [unit for unit in self._units if module in unit.modules]
        for unit in units:
            self.enter(unit)
        try:
            yield
        finally:
            for unit in units:
                self.leave(unit, ())

    def need(self, unit: ParamUnit) -> None:
        """Make the unit whole. Raises ConfigError outside of a step, and WorkerError."""
        whole = unit.is_whole and unit not in self._coming
        if whole and unit.name not in self._passed:
            return
        if not self._backward:
            self._needed.append(unit)
        self._passed.discard(unit.name)
        if whole:
            return
        self._check_need(unit)
        if unit in self._coming and unit.life.state is State.RESTING:  # it was let go with its gradients
            self._coming.remove(unit)
        self._release_left(unit)
        while unit not in self._coming and self._next < len(self._plan):
            self._issue(wanted=self._plan[self._next] is unit or len(self._coming) < self._ahead)
        if unit in self._coming:
            while (first := self._coming.popleft()) is not unit:
                self._arrive(first)
                self._left.append(first)
                self._passed.add(first.name)  # perhaps it comes later
            self._arrive(unit)
        else:
            self._drop()
            self._ask(unit)
        self._left.append(unit)
        while len(self._coming) < self._ahead and self._next < len(self._plan):
            self._issue()
        if self._next < len(self._plan):
            self._plan[self._next].on_demand_params.prefetch()

    def pack(self, tensor: Tensor) -> _Saved:
        """What autograd shall keep of a tensor that backward will need."""
        unit = self._at.get(tensor.untyped_storage().data_ptr())
        view = None if unit is None else unit.on_demand_params.view_of(tensor)
        values = tensor.detach()  # not the tensor itself, which may hold what keeps it
        if view is not None:
            values.data = values.new_empty(0)  # counts changes still, and holds no buffer
        return _Saved(unit, view, values, values._version)

    def unpack(self, saved: _Saved) -> Tensor:
        """What `pack` was given, when backward needs it."""
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
            raise InvariantError(f"unit {saved.unit.name!r} is not whole", where=self._tag)
        return full.as_strided(*saved.view)

    def _check_need(self, unit: ParamUnit) -> None:
        if not self._in_round:
            raise ConfigError(
                f"the parameters of {unit.name!r} are sharded, and whole only during a step",
                hint="use the model inside `with engine.evaluating():` or, if every worker has memory for all of it, "
                "`with engine.whole_model():`",
            )
        if unit.life.state is State.REDUCING:
            raise ConfigError(
                f"backward needs the parameters of {unit.name!r} again after their gradients were complete",
                where=self._tag,
                hint="use sharding zero2 for this model",
            )

    # - Gathers

    @contextmanager
    def whole(self, units: Sequence[ParamUnit] | None = None) -> Iterator[None]:
        """These units (None: all) whole, between steps; some may be so already. Collective."""
        resting = [unit for unit in (self._units if units is None else units) if not unit.is_whole]
        for unit in resting:
            unit.unshard(self._group, f"{self._tag} / {unit.name} / param")
            unit.wait_unsharded()
        try:
            yield
        finally:
            for unit in resting:
                unit.reshard()
            for unit in resting[:1]:  # they share one pool
                unit.on_demand_params.trim_pool()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A round of forwards, as many as each worker likes. Collective."""
        self.begin("evaluation", computes=True, backward=False)
        yield
        self.end()
        self._surprised = False  # steps go on as they were

    def _arrive(self, unit: ParamUnit) -> None:
        unit.wait_unsharded()
        full = unit.on_demand_params.full
        if full is not None:
            self._at[full.untyped_storage().data_ptr()] = unit

    def _issue(self, wanted: bool = True) -> None:
        """Begin the plan's next gather."""
        unit = self._plan[self._next]
        self._next += 1
        tag = f"{self._tag} / {unit.name} / param"
        if wanted and unit.life.state is State.RESTING:
            unit.unshard(self._group, tag)
            self._coming.append(unit)
        else:
            self._serve(unit, tag)

    def _serve(self, unit: ParamUnit, tag: str) -> None:
        self._serving.append(unit.serve(self._group, tag))
        while len(self._serving) > self._ahead + 1:
            self._serving.popleft()()

    def _drop(self) -> None:
        """Let go what was gathered ahead; nobody here needs it."""
        while self._coming:
            self._coming.popleft().reshard()

    def _release_left(self, needed: ParamUnit) -> None:
        """Release what was used before, unless its forward is still going on. Units of one module (a block's matrices
        and the rest of it, say) go together, since backward wants them in turn."""
        staying = []
        for unit in self._left:
            if unit is needed or self._inside.get(unit.name, 0) > 0 or set(unit.modules) & set(needed.modules):
                staying.append(unit)
            else:
                unit.reshard()
        self._left = staying

    def _ask(self, unit: ParamUnit | None) -> None:
        """At the plan's end: ask for `unit`, and take part in what others ask for; with None until nobody asks."""
        while True:
            number = NOTHING if unit is None else self._units.index(unit)
            everyone = self._group.all_gather_small(torch.tensor([number]), f"{self._tag} / ask / control")
            asked = sorted({int(wish) for wish in everyone} - {NOTHING})
            if not asked:
                break
            self._surprised = True
            for wish in asked:
                other, tag = self._units[wish], f"{self._tag} / {self._units[wish].name} / param"
                if other is unit:
                    unit.unshard(self._group, tag)
                    self._arrive(unit)
                else:
                    self._serve(other, tag)
            if unit is not None:
                return
        while self._serving:
            self._serving.popleft()()
