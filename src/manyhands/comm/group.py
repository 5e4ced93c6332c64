"""The verbs of a group, and a record of its traffic.

What a step's messages came to: bytes by kind, and the seconds that were waited for others.

A group of workers: a rank, a size and two verbs on which all else is built, plus small ones.
- `exchange(full)`: everyone's piece of *my* range of a buffer, in rank order (an all-to-all).
- `publish(full)`: everyone's range to everyone (an all-gather, in place).
- `gather(small)`, `barrier()`: for a step's control values.

A group has two levels: `near`, the workers that share memory with this one (which is alone there, if none does), and
`far`, the workers at this one's place on every host (all workers, if none share memory; None, if all do).

Buffers come from the group, so that it can put them where moving them is cheapest. All verbs are collective: every
worker calls the same ones with the same tags in the same order. Every call carries a tag (`step 12 / layers.3 / grad`;
its last word is its kind) and is counted. A call that can't complete because another worker raised, died or is late
raises WorkerError, which names that worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.offload.allocator import Allocator


class Recorder:
    """Sums over a group's calls on this worker. A message's kind is its tag's last word: grad, param, control."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._seconds = 0.0

    def add(self, tag: str, num_bytes: int, seconds: float) -> None:
        """Record a message. num_bytes: received from the others; seconds: waited for it."""
        kind = tag.rsplit(" / ", 1)[-1]
        self._bytes[kind] = self._bytes.get(kind, 0) + num_bytes
        self._seconds += seconds

    def waited(self, seconds: float) -> None:
        """Record that others were waited for, besides what a message took."""
        self._seconds += seconds

    def take(self) -> tuple[dict[str, int], float]:
        """Bytes by kind and seconds waited since the last call."""
        taken = (self._bytes, self._seconds)
        self._bytes, self._seconds = {}, 0.0
        return taken


class Contribution:
    """A buffer that each worker has for itself, of which others read the ranges that they own.

    local: this worker's, [numel]; peers: everyone's, by rank, where the group can see them (else empty).
    free: gives it back; to be called once it has left.
    """

    def __init__(self, local: Tensor, peers: Sequence[Tensor] = (), free: Callable[[], None] = lambda: None) -> None:
        self.local, self.peers, self.free = local, tuple(peers), free


class AllToAll(ABC):
    """An exchange under way. `pieces`, then `release`, each once; exchanges are released in the order they began."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether `pieces` would return at once."""

    @abstractmethod
    def pieces(self) -> list[Tensor]:
        """Wait for the contributors' pieces of my range, in rank order: each [shard_numel], borrowed."""

    @abstractmethod
    def release(self) -> None:
        """I've read the pieces: their owners may overwrite them."""

    @property
    def is_reusable(self) -> bool:
        """Whether `wait_reusable` would return at once."""
        return self.is_complete

    @abstractmethod
    def wait_reusable(self) -> None:
        """Wait until everyone has read what I contributed; only then may I overwrite it."""


class Group(ABC):
    """See the module. Attributes: `kind` ("local", "shared-memory", "distributed", "hierarchical"), `rank`, `size`,
    `device`, `recorder`; `workers`: the launcher's number of each rank; `shares_memory`: whether a replicated buffer is
    one physical copy for `near`; `pieces_are_views`: whether pieces exchanged there are views of what the others gave,
    so that keeping them costs nothing."""

    kind: str
    shares_memory: bool
    pieces_are_views: bool

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.recorder = Recorder()
        self.workers: Sequence[int] = range(size)

    @property
    def intra_host(self) -> Group:
        """See the module. rank = near.rank * far.size + far.rank."""
        return self

    @property
    def inter_host(self) -> Group | None:
        """See the module."""
        return None

    @abstractmethod
    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        """A zeroed buffer [numel] that all workers hold alike, one copy for `near`; at `home`, if one is given.
        Collective where memory is shared."""

    @abstractmethod
    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        """A zeroed buffer [numel] to exchange from. Collective where memory is shared."""

    @abstractmethod
    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        """Begin to give everyone their piece of `contribution[start : start + size * shard_numel]`. Collective.

        Worker r's piece is the r-th run of `shard_numel` elements. Only `contributors` (ranks, rising) give anything.
        """

    @abstractmethod
    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        """Begin to give everyone my range of the replicated `full`, [size * shard_numel], in place. Collective.

        Returns a function that waits until all ranges are there.
        """

    @abstractmethod
    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        """Everyone's `small` (same shape and dtype, CPU), by rank: copies. Collective, blocks."""

    def sibling(self) -> Group:
        """The same workers with another sequence of collective calls: the two keep no order between them. Collective.

        Only where workers have memory of their own, and at most one; it ends with this group.
        """
        raise InvariantError(f"a {self.kind} group has one sequence of calls")

    def barrier(self, tag: str) -> None:
        """Wait until everyone is here. Collective, blocks."""
        self.all_gather_small(torch.zeros(1, dtype=torch.uint8), tag)

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell the others that this worker goes down with `error`."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group: wait for the others to have finished, then free everything. Collective unless failed."""

    def status(self, words: str, step: int | None = None, micro_batch: int | None = None) -> None:  # noqa: B027
        """Say what this worker is doing, and in which step and micro-batch, for errors about it; alone it needn't."""

    def exclusive(self) -> AbstractContextManager[object]:
        """Held while computing with process-wide state (the random generators), where workers are threads."""
        return nullcontext()
