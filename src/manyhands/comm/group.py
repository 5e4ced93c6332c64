"""The collective operations of a group of workers, and a record of its traffic.

A group is a set of workers with ranks 0 to size - 1 and a few collective operations on which the engine is built:

- `all_to_all(contribution)`: receive this worker's range of a buffer from every contributor, in rank order.
- `all_gather(full)`: send every worker's range of a buffer to all workers, in place.
- `all_gather_small(small)`, `barrier()`: exchange control values of a step, and wait for all workers.

None of them adds anything: the engine adds the pieces itself, in a fixed order.

A group has two levels. `intra_host` has the workers that share memory with this one (only this one if no other does).
`inter_host` has the workers at the same position on every host. It has all workers if no workers share memory, and is
None if all workers share memory.

The group creates the buffers, so that it can place them where transfers are cheapest. All operations are collective:
every worker makes the same calls with the same tags in the same order. Calls are counted, and each has a tag such as
`step 12 / layers.3 / grad`, whose last part is its kind. If a peer raised an error, died or stalled, a call raises
WorkerError, which names that worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.offload.allocator import Allocator


class Recorder:
    """The traffic of a group on this worker: bytes received by kind, and seconds spent waiting.

    The kind of a message is the last part of its tag: grad, param or control.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._seconds = 0.0

    def add(self, tag: str, num_bytes: int, seconds: float) -> None:
        """Record a message. num_bytes: bytes received from other workers. seconds: time spent waiting for them."""
        kind = tag.rsplit(" / ", 1)[-1]
        self._bytes[kind] = self._bytes.get(kind, 0) + num_bytes
        self._seconds += seconds

    def add_wait(self, seconds: float) -> None:
        """Record seconds spent waiting for other workers outside of `add`."""
        self._seconds += seconds

    def take(self) -> tuple[dict[str, int], float]:
        """Return the bytes by kind and the seconds since the last call, and reset both."""
        taken = (self._bytes, self._seconds)
        self._bytes, self._seconds = {}, 0.0
        return taken


class Contribution:
    """A set of buffers, one per worker. Every worker reads its own range from the buffers of all workers.

    local: this worker's buffer, [numel]. peers: the buffers of all workers by rank if the group can map them; otherwise
    empty. free: a function that releases the buffer. Call it after the data has been sent.
    """

    def __init__(self, local: Tensor, peers: Sequence[Tensor] = (), free: Callable[[], None] = lambda: None) -> None:
        self.local, self.peers, self.free = local, tuple(peers), free


class AllToAll(ABC):
    """An all-to-all in progress. Call `pieces` once, then `release` once. Release all-to-alls in the order of their
    creation.

    Some groups only count releases: a release out of order would tell peers that an earlier all-to-all has been read.
    """

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Return True if `pieces` would return immediately."""

    @abstractmethod
    def pieces(self) -> list[Tensor]:
        """Wait for the contributors' pieces of this worker's range. Return them in rank order, each [shard_numel].

        Do not overwrite the pieces, and do not use them after `release`.
        """

    @abstractmethod
    def release(self) -> None:
        """Declare that this worker has read the pieces, so that their owners may overwrite them."""

    @property
    def is_reusable(self) -> bool:
        """Return True if `wait_reusable` would return immediately."""
        return self.is_complete

    @abstractmethod
    def wait_reusable(self) -> None:
        """Wait until all workers have read this worker's contribution. Only then may it be overwritten."""


class Group(ABC):
    """The abstract base class of all groups, which the module's docstring describes.

    kind: "local", "shared-memory", "distributed" or "hierarchical".
    rank, device, recorder: the rank, device and recorder of this worker. size: the number of workers.
    workers: the numbers that the launcher gave the workers, by rank.
    shares_memory: True if the workers of `intra_host` share one physical copy of a replicated buffer.
    pieces_are_views: True if pieces exchanged in `intra_host` are views of the contributors' buffers, so that holding
    them takes no memory.
    """

    kind: str
    shares_memory: bool
    pieces_are_views: bool

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.recorder = Recorder()
        self.workers: Sequence[int] = range(size)

    @property
    def intra_host(self) -> Group:
        """Return the group of the workers on this host. rank = intra_host.rank * inter_host.size + inter_host.rank."""
        return self

    @property
    def inter_host(self) -> Group | None:
        """Return the group of the workers with this worker's intra-host rank, one per host; None if all workers share
        memory.
        """
        return None

    @abstractmethod
    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        """Create a zeroed buffer [numel] that holds the same values on all workers, one copy per `intra_host` group.

        allocator: if given, it decides where the buffer is stored. Collective if memory is shared.
        """

    @abstractmethod
    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        """Create a zeroed buffer [numel] for `all_to_all`. Collective if memory is shared."""

    @abstractmethod
    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        """Start to send every worker its piece of `contribution[start : start + size * shard_numel]`. Collective.

        The piece of worker r is the r-th run of `shard_numel` elements. Only `contributors` (ranks, ascending) send.
        """

    @abstractmethod
    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        """Start to send this worker's range of `full` to all workers, in place.

        full: a replicated buffer, [size * shard_numel]. Returns a function that waits until all ranges have arrived.
        Collective.
        """

    @abstractmethod
    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        """Return copies of all workers' `small` (same shape and dtype, on the CPU), by rank. Collective. Blocks."""

    def sibling(self) -> Group:
        """Create a group of the same workers with an independent sequence of collective calls. Collective.

        Calls of the two groups may interleave differently on different workers. A group whose workers share
        no memory can have one sibling; other groups raise InvariantError. Closing this group closes the sibling.
        """
        raise InvariantError(f"a {self.kind} group can have only one sequence of calls")

    def barrier(self, tag: str) -> None:
        """Wait until all workers have called `barrier`. Collective. Blocks."""
        self.all_gather_small(torch.zeros(1, dtype=torch.uint8), tag)

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Report to the peers that this worker has failed with `error`."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group: wait until all workers have finished, then free all resources.

        Collective unless a worker failed.
        """

    def status(self, activity: str, step: int | None = None, micro_batch: int | None = None) -> None:  # noqa: B027
        """Publish this worker's activity, step and micro-batch for error messages. By default, do nothing."""
