"""A unit: its parameters, its states and their transitions.

A unit has four states. A table lists the allowed transitions, and any other transition raises InvariantError with the
unit's history.

    state       meaning                                  parameters          gradients
    RESTING     between uses                             as stored           none, or already summed
    UNSHARDING  parameters are in transit                incomplete          none
    READY       a micro-batch computes with the unit     unsharded           arriving one by one
    REDUCING    gradients are complete and in transit    as stored           being sent to their owners

A unit consists of parameters that travel together, and of their buffers. `params` and `master` exist as long as the
engine. gradient_buffers.py decides where gradients are stored, and params.py where parameters are stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum

import torch
from torch import Tensor, nn

from manyhands.comm.group import AllToAll, Group
from manyhands.engine.units.gradient_buffers import Gradients
from manyhands.engine.units.params import OnDemandParams, Params
from manyhands.errors import ConfigError, InvariantError
from manyhands.shard_layout import ParamSlot, Range, UnitLayout


class State(Enum):
    """The states of a unit, described in the module's docstring."""

    RESTING = "resting"
    UNSHARDING = "unsharding"
    READY = "ready"
    REDUCING = "reducing"


class Event(Enum):
    """The events that change a unit's state."""

    UNSHARD = "unshard"  # its parameters are needed
    UNSHARDED = "unsharded"  # its parameters are complete
    RESHARD = "reshard"  # its parameters aren't needed for now
    REDUCE = "reduce"  # its gradients of a micro-batch are complete and will be sent
    REDUCED = "reduced"  # this worker has added the pieces that it owns
    ABORT = "abort"  # the step failed


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RESTING, Event.UNSHARD): State.UNSHARDING,
    (State.UNSHARDING, Event.UNSHARDED): State.READY,
    (State.READY, Event.RESHARD): State.RESTING,
    (State.READY, Event.REDUCE): State.REDUCING,
    (State.REDUCING, Event.REDUCED): State.RESTING,
    # A unit changes from RESTING to REDUCING if this worker has no micro-batch in the round or sends its local sums, or
    # if the model left the unit before all of the unit's gradients had arrived.
    (State.RESTING, Event.REDUCE): State.REDUCING,
    **{(state, Event.ABORT): State.RESTING for state in State},
}


class Lifecycle:
    """The state of one unit, and its most recent transitions."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, State.RESTING
        self.history: deque[str] = deque(maxlen=32)

    def on(self, event: Event) -> None:
        """Apply an event. Raises InvariantError if the table has no transition for it."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise InvariantError(
                f"unit {self.name!r} can't process event '{event.value}' in state '{self.state.value}'",
                detail="its history: " + (" ".join(self.history) or "none yet"),
            )
        self.history.append(f"{self.state.value}--{event.value}-->{following.value}")
        self.state = following


class ParamUnit:
    """The parameters of a unit, trainable or frozen, and the unit's state.

    modules: the names of the modules whose forwards use the parameters. The tuple is empty if these are unknown. In
    that case the parameters must be unsharded throughout each micro-batch.
    """

    def __init__(self, layout: UnitLayout, params: Params, modules: tuple[str, ...] = ()) -> None:
        self.name, self.layout, self.params, self.modules = layout.name, layout, params, modules
        self.life = Lifecycle(layout.name)
        self._arrive: Callable[[], None] | None = None

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        """Make the model's parameters refer to this unit's buffers."""
        self.params.bind(params)

    def held_names(self) -> list[str]:
        """Return the names of its parameters."""
        return [slot.name for slot in self.layout.slots]

    def not_bound(self) -> list[str]:
        """Return the names of the parameters whose data the model or its user has ever replaced."""
        return self.params.not_bound()

    @property
    def is_unsharded(self) -> bool:
        """Return True if the model can compute with the unit."""
        return self.life.state is State.READY

    def unshard(self, group: Group, tag: str) -> None:
        """Start to unshard the parameters. Collective if they are sharded."""
        self.life.on(Event.UNSHARD)
        self._arrive = self.on_demand_params.unshard(group, tag)

    def wait_unsharded(self) -> None:
        """Wait until the parameters are unsharded, if `unshard` was called."""
        if self._arrive is not None:
            self._arrive()
            self._arrive = None
            self.life.on(Event.UNSHARDED)

    def reshard(self) -> None:
        """Release the unsharded parameters, since they aren't needed for now."""
        self.wait_unsharded()  # data may still be arriving in the buffer
        if self.is_unsharded:
            self.life.on(Event.RESHARD)
            self.on_demand_params.reshard()

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        """Take part in an unshard that only peers need.

        Return a function that waits until it is complete. Collective.
        """
        return self.on_demand_params.serve(group, tag)

    @property
    def on_demand_params(self) -> OnDemandParams:
        """Return the unit's parameters. Raises InvariantError if they are permanently unsharded."""
        if not isinstance(self.params, OnDemandParams):
            raise InvariantError(f"unit {self.name!r} is permanently unsharded")
        return self.params


class Unit(ParamUnit):
    """A unit of trainable parameters. Ranges are ranges of the unit's elements.

    held: the elements whose master weights and optimizer state this worker holds.
    shard: the elements whose gradients this worker adds.
    master: the master weights of `held`, [held.numel] fp32; an alias of the parameters where possible.
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
        # Allocate these tensors only once: small tensors allocated next to the gradients would fragment the C library's
        # heap, and the memory of the gradients could not be reused.
        sums = torch.zeros(len(layout.slots), dtype=params.dtype, device=gradients.device)
        self._sums = dict(zip(self._slots, sums.unbind(), strict=True))

    def begin(self) -> None:
        """Prepare for the gradients of a micro-batch that this worker computes."""
        if not isinstance(self.params, OnDemandParams):  # permanently unsharded: only the state changes
            self.life.on(Event.UNSHARD)
            self.life.on(Event.UNSHARDED)
        self.gradients.begin()
        self._missing = set(self._slots)
        self.finite_sums.clear()

    def take(self, name: str, grad: Tensor) -> bool:
        """Store a parameter's gradient of this micro-batch. Return True if the unit's gradients are now complete.

        Raises ConfigError for a sparse gradient, and for a parameter's second gradient.
        """
        if grad.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {name!r} is sparse",
                expected="a dense gradient",
                got=str(grad.layout),
                hint="use Embedding(sparse=False)",
            )
        if name not in self._missing:
            raise ConfigError(
                f"parameter {name!r} got two gradients in one micro-batch",
                where=f"unit {self.name}",
                hint="do not call backward in the loss function or outside a step; checkpoint with use_reentrant=False",
            )
        slot = self._slots[name]
        stored = self._gradient(slot)
        stored.view(grad.shape).copy_(grad)
        # If the sum of a gradient's elements is finite, so are the elements. If the sum is not finite, it may just have
        # overflowed, so `first_not_finite` inspects the elements. The sum costs one pass over data in cache. With these
        # sums, an error can name the parameter before the step updates anything.
        self.finite_sums.append((slot, torch.sum(stored, 0, out=self._sums[name])))
        self._missing.discard(name)
        return not self._missing

    def complete(self) -> list[str]:
        """Set missing gradients to zero. Return the names of their parameters."""
        missing = [name for name in self._slots if name in self._missing]
        for name in missing:
            self._gradient(self._slots[name]).zero_()
        self._missing.clear()
        return missing

    def send(self, contributors: range, tag: str) -> AllToAll:
        """Start the all-to-all of this micro-batch's gradients. Collective."""
        self.wait_unsharded()  # the unit may have been unsharded ahead, but not used
        self.life.on(Event.REDUCE)
        if isinstance(self.params, OnDemandParams):
            self.params.reshard()
        return self.gradients.send(contributors, tag)

    def mark_reduced(self) -> None:
        """Record that this worker has added all pieces that it received in the all-to-all, and has released them."""
        self.life.on(Event.REDUCED)
        self.gradients.mark_read()

    def first_not_finite(self) -> str | None:
        """Return the first parameter, in order of arrival, whose gradient has an element that is not finite."""
        # Test the sums together, because on a GPU each test waits for the device.
        if not self.finite_sums or bool(torch.stack([total.float() for _, total in self.finite_sums]).isfinite().all()):
            return None
        for slot, total in self.finite_sums:
            if not bool(total.isfinite()) and not bool(self._gradient(slot).isfinite().all()):
                return slot.name
        return None

    def abort(self) -> None:
        """Discard this micro-batch's gradients after a failure in the step."""
        self.life.on(Event.ABORT)
        self._missing.clear()
        self.finite_sums.clear()

    def _gradient(self, slot: ParamSlot) -> Tensor:
        """Return the part of the gradient buffer for one parameter, [numel]."""
        return self.gradients.buffer()[slot.range.start : slot.range.end]
