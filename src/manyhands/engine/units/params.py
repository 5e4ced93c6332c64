"""A unit's parameters: replicated, sharded or offloaded.

- `ReplicatedParams`: unsharded permanently, in one buffer.
- `ShardedParams`: each worker stores its shard; unsharding is an all-gather.
- `OffloadedParams`: workers that share memory store one offloaded copy; unsharding copies it to the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.errors import InvariantError
from manyhands.models.writes import Sample
from manyhands.numerics.alignment import is_aligned
from manyhands.offload.allocator import Allocator, BufferPool
from manyhands.shard_layout import Range, UnitLayout

_WATCHED = 4
"""Writes to a unit's parameters are detected until the unit has been unsharded this many times."""


class ParamView(NamedTuple):
    """Describes a view of a unit's parameters. Its dtype may differ from theirs: it may be complex, for example.

    strides, offset: in elements of the view. conjugated, negated: True if torch conjugates or negates the values when
    the view is read.
    """

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    def of(self, full: Tensor) -> Tensor:
        """Return this view of the unit's unsharded parameters."""
        view = torch.empty(0, dtype=self.dtype, device=full.device)
        view.set_(full.untyped_storage(), self.offset, self.shape, self.strides)
        view = view.conj() if self.conjugated else view
        return torch._neg_view(view) if self.negated else view


class Params(ABC):
    """The abstract base class for a unit's parameters in flat buffers. All ranges are ranges of the unit's elements."""

    def __init__(self, layout: UnitLayout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self._params: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, torch.Size] = {}
        # The address of the data that `_put` assigned to each parameter. If a parameter's data is at another address,
        # the model or its user has replaced the data. The parameter then stays in `_lost`, even if `_put` is called
        # again.
        self._addresses: dict[str, int] = {}
        self._lost: set[str] = set()

    @property
    def replicated(self) -> Tensor | None:
        """Return the replicated buffer, [padded_numel], or None. Each worker writes its shard to this buffer."""
        return None

    @abstractmethod
    def stored(self, within: Range) -> Tensor:
        """Return the range `within` of the buffer that persists between steps.

        Every worker stores at least its own shard.
        """

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        """Let the model's parameters refer to these buffers from now on."""
        self._params = {slot.name: params[slot.name] for slot in self.layout.slots}
        self._shapes = {name: param.shape for name, param in self._params.items()}

    def not_bound(self) -> list[str]:
        """Return the names of the parameters whose data the model or its user has ever replaced."""
        return [slot.name for slot in self.layout.slots if slot.name in self._lost or self._is_lost(slot.name)]

    def _is_lost(self, name: str) -> bool:
        param = self._params[name]
        return param.numel() > 0 and self._addresses.get(name, param.data_ptr()) != param.data_ptr()

    def _put(self, name: str, data: Tensor) -> None:
        if self._is_lost(name):
            self._lost.add(name)  # the old address, which shows that the data was replaced, is overwritten below
        self._params[name].data = data
        self._addresses[name] = data.data_ptr()

    def _point(self, full: Tensor) -> None:
        """Make the model's parameters views of `full`, [padded_numel]."""
        if not is_aligned(full):
            raise InvariantError(f"the buffer of unit {self.layout.name!r} is not aligned")
        for slot in self.layout.slots:
            self._put(slot.name, full[slot.range.start : slot.range.end].view(self._shapes[slot.name]))


class ReplicatedParams(Params):
    """Parameters that are permanently unsharded, in `full`, [padded_numel]."""

    def __init__(self, layout: UnitLayout, full: Tensor) -> None:
        super().__init__(layout, full.dtype)
        self.full = full

    @property
    def replicated(self) -> Tensor:
        return self.full

    def stored(self, within: Range) -> Tensor:
        return self.full[within.start : within.end]

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        super().bind(params)
        self._point(self.full)


class OnDemandParams(Params):
    """The abstract base class for parameters that are unsharded only while they are needed.

    While a unit is resharded, its parameters retain their shapes, take no memory, and read as NaN. If a model uses a
    resharded parameter, the loss is NaN and the step is refused, so the result is never silently wrong.
    stored: the buffer that outlives a step. pool: provides the buffers, [padded_numel], for unsharded parameters.
    """

    def __init__(self, layout: UnitLayout, stored: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, stored.dtype)
        self._stored, self._allocator, self._pool = stored, allocator, pool
        self.full: Tensor | None = None
        self._unsharded = 0  # number of times
        self._sample: Sample | None = None
        # One element, expanded to the shape of every resharded parameter.
        self._absent = torch.full((), float("nan"), dtype=stored.dtype, device=pool.device)

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        super().bind(params)
        self.reshard()

    def prefetch(self) -> None:
        """Start to read offloaded parameters, since they will be unsharded soon."""
        self._allocator.prefetch(self._stored)

    def unshard(self, group: Group, tag: str) -> Callable[[], None]:
        """Start to unshard the parameters. Return a function that waits for them. Collective."""
        full = self._pool.take(self.layout.padded_numel, self.dtype)
        wait = self._fetch(full, group, tag)
        self.full = full

        def arrive() -> None:
            wait()
            self._point(full)
            self._unsharded += 1
            if self._unsharded <= _WATCHED:
                ranges = {slot.name: slot.range for slot in self.layout.slots}
                self._sample = Sample({name: full[part.start : part.end] for name, part in ranges.items()})

        return arrive

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        """Take part in an unshard that only peers need.

        Return a function that waits until it is complete. Collective.
        """
        full = self._pool.take(self.layout.padded_numel, self.dtype)
        wait = self._fetch(full, group, tag)

        def end() -> None:
            wait()
            self._pool.give_back(full)

        return end

    @abstractmethod
    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        """Start to fill `full`. Return a function that waits until it is complete."""

    def reshard(self) -> None:
        """Release the unsharded parameters' buffer; the model's parameters read as NaN from now on.

        Raises ConfigError if the model has written to the parameters, because the write would be lost.
        """
        sample, self._sample = self._sample, None
        for name, shape in self._shapes.items():
            self._put(name, self._absent.expand(shape))
        if self.full is not None:
            if sample is not None:
                sample.refuse_writes()
            self._pool.give_back(self.full)
            self.full = None

    def trim_pool(self) -> None:
        """Free the pool's buffers. Called after more units were unsharded at a time than a step requires."""
        self._pool.trim()

    def view_of(self, tensor: Tensor) -> ParamView | None:
        """Return the description of `tensor` if it is a view of the unsharded parameters, else None."""
        if self.full is None or tensor.untyped_storage().data_ptr() != self.full.untyped_storage().data_ptr():
            return None
        offset = int(tensor.storage_offset())
        return ParamView(
            tensor.dtype, tensor.shape, tensor.stride(), offset, conjugated=tensor.is_conj(), negated=tensor.is_neg()
        )


class ShardedParams(OnDemandParams):
    """Sharded parameters: each worker stores only its shard, [shard_numel]."""

    def __init__(self, layout: UnitLayout, rank: int, shard: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, shard, allocator, pool)
        self._start = rank * layout.shard_numel

    def stored(self, within: Range) -> Tensor:
        return self._stored[within.start - self._start : within.end - self._start]

    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        full[self._start : self._start + self.layout.shard_numel].copy_(self._stored, non_blocking=True)
        self._allocator.evict(self._stored)
        return group.all_gather(full, tag)


class OffloadedParams(OnDemandParams):
    """Offloaded parameters: the workers of a host share one copy, [padded_numel]. Each worker reads it on its own."""

    def __init__(self, layout: UnitLayout, stored: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, stored, allocator, pool)
        on_gpu = pool.device.type == "cuda"
        self._stream = torch.cuda.Stream(pool.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def replicated(self) -> Tensor:
        return self._stored

    def stored(self, within: Range) -> Tensor:
        return self._stored[within.start : within.end]

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        return lambda: None  # peers read the parameters without this worker

    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        stream = self._stream
        if stream is None:
            full.copy_(self._stored)
            self._allocator.evict(self._stored)
            return lambda: None
        # Wait before the copy: kernels that use the buffer may still be queued on the compute stream.
        stream.wait_stream(torch.cuda.current_stream(full.device))
        with torch.cuda.stream(stream):
            full.copy_(self._stored, non_blocking=True)
        # Wait after the copy: the compute stream must not read the buffer before the copy is complete.
        return lambda: torch.cuda.current_stream(full.device).wait_stream(stream)
