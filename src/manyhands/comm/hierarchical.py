"""Several hosts: shared memory inside a host, torch.distributed between hosts.

Of what every worker wants a host receives one copy, each part of it over the link of another worker: worker l of every
host looks after the l-th part of a buffer. So does it with gradients, which are added inside a host first: sums travel.

    rank of worker l on host h = l * hosts + h         2 hosts with 2 workers each, a buffer of 4 shards:

    shards of the buffer      |  0: worker 0 of host 0  |  1: worker 0 of host 1  |  2: worker 1 of host 0  |  3  ...
    parts, inside a host      |  worker 0 of each host                            |  worker 1 of each host
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.comm.watched_group import WatchedGroup
from manyhands.errors import InvariantError
from manyhands.offload.allocator import Allocator


def places(hosts: Sequence[str]) -> list[list[int]] | None:
    """The workers of each host, by the launcher's numbers, given each worker's host; None, if these don't have equally
    many, or only one each, or there is only one host. Pure."""
    found: dict[str, list[int]] = {}
    for worker, host in enumerate(hosts):
        found.setdefault(host, []).append(worker)
    sizes = {len(workers) for workers in found.values()}
    return list(found.values()) if len(found) > 1 and len(sizes) == 1 and sizes != {1} else None


class HierarchicalGroup(WatchedGroup):
    """See the module. Gradients are exchanged in `near` and, as sums, in `far`, not in the group as a whole."""

    kind = "hierarchical"
    shares_memory = True
    pieces_are_views = True

    def __init__(
        self, intra_host: SharedMemoryGroup, inter_host: DistributedGroup, by_host: Sequence[Sequence[int]]
    ) -> None:
        workers = [worker for place in zip(*by_host, strict=True) for worker in place]
        super().__init__(intra_host.membership, intra_host.device, workers=workers)
        self._intra_host, self._inter_host = intra_host, inter_host
        intra_host.recorder = inter_host.recorder = self.recorder

    @property
    def intra_host(self) -> Group:
        return self._intra_host

    @property
    def inter_host(self) -> Group | None:
        return self._inter_host

    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        return self._intra_host.empty_replicated(numel, dtype, allocator)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        return self._intra_host.empty_contribution(numel, dtype)

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        raise InvariantError("a group of hosts exchanges inside these and between them, not as a whole", where=tag)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        arrived = self._inter_host.all_gather(full.chunk(self._intra_host.size)[self._intra_host.rank], tag)

        def wait() -> None:
            arrived()
            self._intra_host.all_gather(full, tag)()

        return wait

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        mine = torch.stack(self._inter_host.all_gather_small(small, tag))
        return [each for place in self._intra_host.all_gather_small(mine, tag) for each in place.unbind()]

    def exclusive(self) -> AbstractContextManager[object]:
        return self._intra_host.exclusive()

    def take_down(self) -> None:
        self._inter_host.take_down()
