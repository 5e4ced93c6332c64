"""A unit: parameters that travel together, with the buffers that they live in.

A unit owns views of the model's flat buffers. Lifetimes: `params` and `master` as long as the engine; `grads` too,
unless the stage shards gradients and others get copies of them: then only from a micro-batch's first gradient until
they have left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyhands.comm.group import Contribution, Exchange, Group
from manyhands.engine.lifecycle import Event, Lifecycle
from manyhands.errors import ConfigError, InvariantError
from manyhands.layout import Range, Slot, UnitLayout


class Unit:
    """See the module. Ranges count elements of the unit.

    params: [padded_numel], parameter dtype; what the model computes with.
    grads: [padded_numel], parameter dtype; of one micro-batch.
    held: what this worker keeps master weights and optimizer state of; shard: what it adds gradients for.
    master: [held.numel] fp32; a view of params where that is possible.
    """

    def __init__(self, layout: UnitLayout, rank: int, params: Tensor, held: Range, master: Tensor) -> None:
        self.name, self.layout = layout.name, layout
        self.life = Lifecycle(layout.name)
        self.params, self.held, self.master = params, held, master
        self.shard = layout.shard(rank)
        self.finite_sums: list[tuple[Slot, Tensor]] = []
        self.exchange: Exchange | None = None  # the last one of my gradients
        self._grads: Contribution | None = None
        self._grads_start = 0
        self._transient = False
        self._missing: set[str] = set()
        self._slots = {slot.name: slot for slot in layout.slots}

    def give_grads(self, grads: Contribution | None, start: int) -> None:
        """Use `grads` from `start` on for good; None: make a buffer when the first gradient comes."""
        self._transient = grads is None
        self._grads, self._grads_start = grads, 0 if self._transient else start  # a buffer of its own has no others

    def bind(self, params: dict[str, nn.Parameter]) -> None:
        """Let the model's parameters be views of `params`."""
        for slot in self.layout.slots:
            param = params[slot.name]
            param.data = self.params[slot.range.start : slot.range.end].view(param.shape)

    def not_bound(self, params: Mapping[str, nn.Parameter]) -> list[str]:
        """Parameters that are no longer views of `params`: somebody gave them other data."""
        start, itemsize = self.params.data_ptr(), self.params.itemsize
        return [
            slot.name
            for slot in self.layout.slots
            if slot.numel and params[slot.name].data_ptr() != start + slot.range.start * itemsize
        ]

    def begin(self) -> None:
        """A micro-batch begins on this worker: parameters are wanted, gradients will come."""
        self.life.on(Event.GATHER)  # nothing moves: every stage so far keeps parameters whole
        self.life.on(Event.GATHERED)
        self.wait_reusable()
        self._missing = set(self._slots)
        self.finite_sums.clear()

    def wait_reusable(self) -> None:
        """Wait until the others have read the gradients that I gave last."""
        if self.exchange is not None:
            self.exchange.wait_reusable()
            self.exchange = None

    def take(self, name: str, grad: Tensor, group: Group) -> bool:
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
        self.grads_of(group).local[self._at(slot)].view(grad.shape).copy_(grad)
        # The sum of finite numbers is finite (or overflows, and is then looked at closely): one pass over what is in
        # cache, and the offender is known by name before anything of this step is updated.
        self.finite_sums.append((slot, grad.sum()))
        self._missing.discard(name)
        return not self._missing

    def complete(self, group: Group) -> list[str]:
        """Parameters that got no gradient contribute zeros; their names."""
        missing = [name for name in self._slots if name in self._missing]
        for name in missing:
            self.grads_of(group).local[self._at(self._slots[name])].zero_()
        self._missing.clear()
        return missing

    def grads_of(self, group: Group) -> Contribution:
        """The buffer for this micro-batch's gradients."""
        if self._grads is None:
            self._grads = group.empty_contribution(self.layout.padded_numel, self.params.dtype)
        return self._grads

    def local_grads(self, group: Group) -> Tensor:
        """This worker's gradients of the micro-batch, [padded_numel]."""
        return self.grads_of(group).local[self._grads_start : self._grads_start + self.layout.padded_numel]

    def send(self, group: Group, contributors: range, tag: str) -> Exchange:
        """Begin to exchange this micro-batch's gradients."""
        self.life.on(Event.REDUCE)
        self.exchange = group.exchange(
            self.grads_of(group), self._grads_start, self.layout.shard_numel, contributors, tag
        )
        return self.exchange

    def sent(self) -> None:
        """The exchange is over on this worker."""
        self.life.on(Event.REDUCED)
        if self._transient:
            self.wait_reusable()
            self._grads = None

    def first_not_finite(self, group: Group) -> str | None:
        """The first parameter, in the order they came, whose gradient has an element that is not finite."""
        if not self.finite_sums or bool(torch.stack([total.float() for _, total in self.finite_sums]).isfinite().all()):
            return None
        for slot, total in self.finite_sums:
            if not bool(total.isfinite()) and not bool(self.grads_of(group).local[self._at(slot)].isfinite().all()):
                return slot.name
        return None

    def abort(self) -> None:
        """The step failed: forget what this micro-batch gave."""
        self.life.on(Event.ABORT)
        self._missing.clear()
        self.finite_sums.clear()
        if self._transient:
            self._grads = None

    def _at(self, slot: Slot) -> slice:
        return slice(self._grads_start + slot.range.start, self._grads_start + slot.range.end)
