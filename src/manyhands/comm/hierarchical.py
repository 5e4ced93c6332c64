"""Hosts with several workers each: shared memory inside a host, one process group between hosts for each place on them.

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

from manyhands.comm.distributed import ProcessGroup
from manyhands.comm.group import Contribution, Exchange, Group
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.comm.watched_group import MembersGroup
from manyhands.errors import InvariantError
from manyhands.offload.allocator import Home


def places(hosts: Sequence[str]) -> list[list[int]] | None:
    """The workers of each host, by the launcher's numbers, given each worker's host; None, if these don't have equally
    many, or only one each, or there is only one host. Pure."""
    found: dict[str, list[int]] = {}
    for worker, host in enumerate(hosts):
        found.setdefault(host, []).append(worker)
    sizes = {len(workers) for workers in found.values()}
    return list(found.values()) if len(found) > 1 and len(sizes) == 1 and sizes != {1} else None


class HierarchicalGroup(MembersGroup):
    """See the module. Gradients are exchanged in `near` and, as sums, in `far`, not in the group as a whole."""

    kind = "hierarchical"
    shares_memory = True
    pieces_are_views = True

    def __init__(self, near: SharedMemoryGroup, far: ProcessGroup, by_host: Sequence[Sequence[int]]) -> None:
        workers = [worker for place in zip(*by_host, strict=True) for worker in place]
        super().__init__(near.membership, near.device, workers=workers)
        self._near, self._far = near, far
        near.recorder = far.recorder = self.recorder

    @property
    def near(self) -> Group:
        return self._near

    @property
    def far(self) -> Group | None:
        return self._far

    def empty_replicated(self, numel: int, dtype: torch.dtype, home: Home | None = None) -> Tensor:
        return self._near.empty_replicated(numel, dtype, home)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        return self._near.empty_contribution(numel, dtype)

    def exchange(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> Exchange:
        raise InvariantError("a group of hosts exchanges inside these and between them, not as a whole", where=tag)

    def publish(self, full: Tensor, tag: str) -> Callable[[], None]:
        arrived = self._far.publish(full.chunk(self._near.size)[self._near.rank], tag)

        def wait() -> None:
            arrived()
            self._near.publish(full, tag)()

        return wait

    def gather(self, small: Tensor, tag: str) -> list[Tensor]:
        mine = torch.stack(self._far.gather(small, tag))
        return [each for place in self._near.gather(mine, tag) for each in place.unbind()]

    def exclusive(self) -> AbstractContextManager[object]:
        return self._near.exclusive()

    def take_down(self) -> None:
        self._far.take_down()
