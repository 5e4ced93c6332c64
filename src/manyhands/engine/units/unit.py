"""A unit: its parameters, its states and their transitions.

A unit's life: four states and a literal table of what may follow what. Anything else raises with the unit's story.
state       meaning                                         its parameters       its gradients
RESTING     between uses                                    as the sharding keeps   none, or summed
UNSHARDING  parameters on their way                         arriving             none
READY       a micro-batch computes with it                  full                 arriving, one by one
REDUCING    gradients complete, on their way to the owners  as the sharding keeps   leaving

A unit: parameters that travel together, with the buffers that they live in.
`params` and `master` live as long as the engine. Where gradients live is `gradients`' concern (gradients.py), where
parameters are whole and where not, `params`' (params.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum

import torch
from torch import Tensor, nn

from manyhands.comm.group import AllToAll, Group
from manyhands.engine.units.gradients import Gradients
from manyhands.engine.units.params import OnDemandParams, Params
from manyhands.errors import ConfigError, InvariantError
from manyhands.layout import ParamSlot, Range, UnitLayout


class State(Enum):
    """See the module."""

    RESTING = "resting"
    UNSHARDING = "unsharding"
    READY = "ready"
    REDUCING = "reducing"


class Event(Enum):
    """What can happen to a unit."""

    UNSHARD = "unshard"  # its parameters are wanted
    UNSHARDED = "unsharded"  # they are there
    RESHARD = "reshard"  # they aren't wanted for now
    REDUCE = "reduce"  # all its gradients of a micro-batch are there, and leave
    REDUCED = "reduced"  # its owners have added them
    ABORT = "abort"  # the step failed


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RESTING, Event.UNSHARD): State.UNSHARDING,
    (State.UNSHARDING, Event.UNSHARDED): State.READY,
    (State.READY, Event.RESHARD): State.RESTING,
    (State.READY, Event.REDUCE): State.REDUCING,
    (State.REDUCING, Event.REDUCED): State.RESTING,
    # A worker that has no micro-batch in a round reduces without having computed; so does one that sends its sums, and
    # one whose model has left the unit before every gradient was there.
    (State.RESTING, Event.REDUCE): State.REDUCING,
    **{(state, Event.ABORT): State.RESTING for state in State},
}


class Lifecycle:
    """The state of one unit, and how it came to it."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, State.RESTING
        self.story: deque[str] = deque(maxlen=32)

    def on(self, event: Event) -> None:
        """Make the transition. Raises InvariantError if the table has none."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise InvariantError(
                f"unit {self.name!r} can't {event.value} while it is {self.state.value}",
                detail="its story: " + (" ".join(self.story) or "none yet"),
            )
        self.story.append(f"{self.state.value}--{event.value}-->{following.value}")
        self.state = following


class ParamUnit:
    """The parameters of a unit, trainable or frozen, and the unit's life.

    modules: the names of the modules in whose forwards the parameters are used; () if that isn't known, and they must
    be whole as long as a micro-batch goes on.
    """

    def __init__(self, layout: UnitLayout, params: Params, modules: tuple[str, ...] = ()) -> None:
        self.name, self.layout, self.params, self.modules = layout.name, layout, params, modules
        self.life = Lifecycle(layout.name)
        self._arrive: Callable[[], None] | None = None

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        """Let the model's parameters be those of this unit."""
        self.params.bind(params)

    def not_bound(self) -> list[str]:
        """Parameters that somebody else gave other data."""
        return self.params.not_bound()

    @property
    def is_whole(self) -> bool:
        """Whether the model can compute with it."""
        return self.life.state is State.READY

    def unshard(self, group: Group, tag: str) -> None:
        """Begin to make its parameters whole. Collective, of sharded parameters."""
        self.life.on(Event.UNSHARD)
        self._arrive = self.on_demand_params.unshard(group, tag)

    def wait_unsharded(self) -> None:
        """Wait until they are, if that was begun."""
        if self._arrive is not None:
            self._arrive()
            self._arrive = None
            self.life.on(Event.UNSHARDED)

    def reshard(self) -> None:
        """They aren't wanted for now."""
        self.wait_unsharded()
        if self.is_whole:
            self.life.on(Event.RESHARD)
            self.on_demand_params.reshard()

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        """Take part in a gather that only others want. Collective; returns what waits for its end."""
        return self.on_demand_params.serve(group, tag)

    @property
    def on_demand_params(self) -> OnDemandParams:
        """Its parameters. Raises InvariantError if they are always whole."""
        if not isinstance(self.params, OnDemandParams):
            raise InvariantError(f"unit {self.name!r} is always whole")
        return self.params


class Unit(ParamUnit):
    """Trainable parameters. Ranges count elements of the unit.

    held: what this worker keeps master weights and optimizer state of; shard: what it adds gradients for.
    master: [held.numel] fp32; a view of the parameters where that is possible.
    """

    def __init__(
        self,
        layout: UnitLayout,
        rank: int,
        params: Params,
        held: Range,
        master: Tensor,
        gradients: Gradients,
        modules: tuple[str, ...] = (),
    ) -> None:
        super().__init__(layout, params, modules)
        self.held, self.master, self.gradients = held, master, gradients
        self.shard = layout.shard(rank)
        self.finite_sums: list[tuple[ParamSlot, Tensor]] = []
        self._missing: set[str] = set()
        self._slots = {slot.name: slot for slot in layout.slots}
        # Made once: small things made beside each gradient keep the C library from using its memory again.
        sums = torch.zeros(len(layout.slots), dtype=params.dtype, device=gradients.device)
        self._sums = dict(zip(self._slots, sums.unbind(), strict=True))

    def begin(self) -> None:
        """A micro-batch begins on this worker: gradients will come."""
        if not isinstance(self.params, OnDemandParams):  # nothing moves
            self.life.on(Event.UNSHARD)
            self.life.on(Event.UNSHARDED)
        self.gradients.begin()
        self._missing = set(self._slots)
        self.finite_sums.clear()

    def take(self, name: str, grad: Tensor) -> bool:
        """Keep a parameter's gradient of this micro-batch; whether it was the last one missing."""
        if grad.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {name!r} is sparse",
                expected="a dense gradient",
                got=str(grad.layout),
                hint="use Embedding(sparse=False)",
            )
        if name not in self._missing:
            raise InvariantError(
                f"parameter {name!r} got two gradients in one micro-batch",
                where=f"unit {self.name}",
                hint="call no backward in the loss function or outside a step, and checkpoint with use_reentrant=False",
            )
        slot = self._slots[name]
        place = self._place(slot)
        place.view(grad.shape).copy_(grad)
        # The sum of finite numbers is finite (or overflows, and is then looked at closely): one pass over what is in
        # cache, and the offender is known by name before anything of this step is updated.
        self.finite_sums.append((slot, torch.sum(place, 0, out=self._sums[name])))
        self._missing.discard(name)
        return not self._missing

    def complete(self) -> list[str]:
        """Parameters that got no gradient contribute zeros; their names."""
        missing = [name for name in self._slots if name in self._missing]
        for name in missing:
            self._place(self._slots[name]).zero_()
        self._missing.clear()
        return missing

    def send(self, contributors: range, tag: str) -> AllToAll:
        """Begin to exchange this micro-batch's gradients. Collective."""
        self.wait_unsharded()  # it may be on its way again, for a use that isn't going to be
        self.life.on(Event.REDUCE)
        if isinstance(self.params, OnDemandParams):
            self.params.reshard()
        return self.gradients.send(contributors, tag)

    def sent(self) -> None:
        """The exchange is over on this worker."""
        self.life.on(Event.REDUCED)
        self.gradients.sent()

    def first_not_finite(self) -> str | None:
        """The first parameter, in the order they came, whose gradient has an element that is not finite."""
        if not self.finite_sums or bool(torch.stack([total.float() for _, total in self.finite_sums]).isfinite().all()):
            return None
        for slot, total in self.finite_sums:
            if not bool(total.isfinite()) and not bool(self._place(slot).isfinite().all()):
                return slot.name
        return None

    def abort(self) -> None:
        """The step failed: forget what this micro-batch gave."""
        self.life.on(Event.ABORT)
        self._missing.clear()
        self.finite_sums.clear()

    def _place(self, slot: ParamSlot) -> Tensor:
        """Where a parameter's gradient goes, [numel]."""
        return self.gradients.place()[slot.range.start : slot.range.end]
