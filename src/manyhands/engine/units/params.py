"""Where a unit's parameters are: replicated, sharded or offloaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.layout import Range, UnitLayout
from manyhands.offload.allocator import Allocator, BufferPool


class Params(ABC):
    """A unit's parameters in their flat buffers. Ranges count elements of the unit. dtype: theirs."""

    def __init__(self, layout: UnitLayout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self._params: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._places: dict[str, int] = {}  # where the parameters' data begin
        self._lost: set[str] = set()

    @property
    def replicated(self) -> Tensor | None:
        """The buffer, [padded_numel], whose shards are written by their owners; None if others don't see it."""
        return None

    @abstractmethod
    def kept(self, within: Range) -> Tensor:
        """The elements `within` in the buffer that outlives a step; each worker may ask for its shard."""

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        """From now on the model's parameters are these."""
        self._params = {slot.name: params[slot.name] for slot in self.layout.slots}
        self._shapes = {name: param.shape for name, param in self._params.items()}

    def not_bound(self) -> list[str]:
        """Parameters that are not where they were put, or weren't when they were put elsewhere."""
        return [slot.name for slot in self.layout.slots if slot.name in self._lost or self._is_lost(slot.name)]

    def _is_lost(self, name: str) -> bool:
        param = self._params[name]
        return param.numel() > 0 and self._places.get(name, param.data_ptr()) != param.data_ptr()

    def _put(self, name: str, data: Tensor) -> None:
        if self._is_lost(name):
            self._lost.add(name)  # what somebody else put there is gone now
        self._params[name].data = data
        self._places[name] = data.data_ptr()

    def _point(self, full: Tensor) -> None:
        """Let the model's parameters be views of `full`, [padded_numel]."""
        for slot in self.layout.slots:
            self._put(slot.name, full[slot.range.start : slot.range.end].view(self._shapes[slot.name]))


class ReplicatedParams(Params):
    """In `full`, [padded_numel], for good."""

    def __init__(self, layout: UnitLayout, full: Tensor) -> None:
        super().__init__(layout, full.dtype)
        self.full = full

    @property
    def replicated(self) -> Tensor:
        return self.full

    def kept(self, within: Range) -> Tensor:
        return self.full[within.start : within.end]

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        super().bind(params)
        self._point(self.full)


class OnDemandParams(Params):
    """Whole only while they are gathered.

    While a unit isn't whole its parameters have their shapes, take no memory, and read as NaN: who uses one then gets a
    loss that is refused, and never a wrong result.
    """

    def __init__(self, layout: UnitLayout, kept: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, kept.dtype)
        self._kept, self._allocator, self._pool = kept, allocator, pool
        self.full: Tensor | None = None
        self._absent = torch.full((), float("nan"), dtype=kept.dtype, device=pool.device)

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        super().bind(params)
        self.reshard()

    def prefetch(self) -> None:
        """A gather will begin soon."""
        self._allocator.prefetch(self._kept)

    def unshard(self, group: Group, tag: str) -> Callable[[], None]:
        """Begin to make the parameters whole; returns what waits for them. Collective."""
        full = self._pool.take(self.layout.padded_numel, self.dtype)
        wait = self._fetch(full, group, tag)
        self.full = full

        def arrive() -> None:
            wait()
            self._point(full)

        return arrive

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        """Take part in a gather whose result isn't wanted here; returns what waits for its end. Collective."""
        full = self._pool.take(self.layout.padded_numel, self.dtype)
        wait = self._fetch(full, group, tag)

        def end() -> None:
            wait()
            self._pool.give_back(full)

        return end

    @abstractmethod
    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        """Begin to fill `full`; returns what waits for that."""

    def reshard(self) -> None:
        """The whole parameters aren't needed any more."""
        for name, shape in self._shapes.items():
            self._put(name, self._absent.expand(shape))
        if self.full is not None:
            self._pool.give_back(self.full)
            self.full = None

    def trim_pool(self) -> None:
        """More units were whole than a step has at a time: free their buffers."""
        self._pool.trim()

    def view_of(self, tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int] | None:
        """Shape, strides and offset of `tensor`, if it's a view of the whole parameters; None if it isn't."""
        if self.full is None or tensor.untyped_storage().data_ptr() != self.full.untyped_storage().data_ptr():
            return None
        return tensor.shape, tensor.stride(), int(tensor.storage_offset())


class ShardedParams(OnDemandParams):
    """Each worker keeps its shard, [shard_numel]."""

    def __init__(self, layout: UnitLayout, rank: int, shard: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, shard, allocator, pool)
        self._start = rank * layout.shard_numel

    def kept(self, within: Range) -> Tensor:
        return self._kept[within.start - self._start : within.end - self._start]

    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        full[self._start : self._start + self.layout.shard_numel].copy_(self._kept, non_blocking=True)
        self._allocator.evict(self._kept)
        return group.all_gather(full, tag)


class OffloadedParams(OnDemandParams):
    """All of them are at a home that this worker reaches alone, [padded_numel]: one copy for all that share memory."""

    def __init__(self, layout: UnitLayout, kept: Tensor, allocator: Allocator, pool: BufferPool) -> None:
        super().__init__(layout, kept, allocator, pool)
        on_gpu = pool.device.type == "cuda"
        self._stream = torch.cuda.Stream(pool.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def replicated(self) -> Tensor:
        return self._kept

    def kept(self, within: Range) -> Tensor:
        return self._kept[within.start : within.end]

    def serve(self, group: Group, tag: str) -> Callable[[], None]:
        return lambda: None  # nobody else needs this worker for it

    def _fetch(self, full: Tensor, group: Group, tag: str) -> Callable[[], None]:
        stream = self._stream
        if stream is None:
            full.copy_(self._kept)
            self._allocator.evict(self._kept)
            return lambda: None
        stream.wait_stream(torch.cuda.current_stream(full.device))  # who used the buffer before may still compute
        with torch.cuda.stream(stream):
            full.copy_(self._kept, non_blocking=True)
        return lambda: torch.cuda.current_stream(full.device).wait_stream(stream)
