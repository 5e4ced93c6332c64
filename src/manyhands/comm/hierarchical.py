"""Groups over several hosts: shared memory inside a host, torch.distributed between hosts.

A host receives one copy of the data that all its workers need, and its workers share the transfer: worker l of every
host transfers the l-th part of a buffer. Gradients are added inside a host first, so that only sums are sent between
hosts.

Ranks are ordered so that the part of a buffer that worker l transfers is contiguous: the shards of the l-th workers of
all hosts are adjacent.

    rank of worker l on host h = l * hosts + h         2 hosts with 2 workers each, a buffer of 4 shards:

    shards of the buffer      |  0: worker 0 of host 0  |  1: worker 0 of host 1  |  2: worker 1 of host 0  |  3  ...
    parts, inside a host      |  worker 0 of each host                            |  worker 1 of each host
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.comm.watched_group import WatchedGroup
from manyhands.errors import InvariantError
from manyhands.offload.allocator import Allocator


def workers_by_host(hosts: Sequence[str]) -> list[list[int]] | None:
    """Return the workers of each host, by the launcher's numbers, or None. hosts: the host of each worker. Pure.

    Returns None if there is one host, if hosts have different numbers of workers, or if each host has only one worker.
    """
    found: dict[str, list[int]] = {}
    for worker, host in enumerate(hosts):
        found.setdefault(host, []).append(worker)
    sizes = {len(workers) for workers in found.values()}
    return list(found.values()) if len(found) > 1 and len(sizes) == 1 and sizes != {1} else None


class HierarchicalGroup(WatchedGroup):
    """A group of workers on several hosts, as the module's docstring describes.

    Gradients are exchanged in `intra_host`, and their sums in `inter_host`, so this group itself has no `all_to_all`.
    by_host: the workers of each host, by the launcher's numbers.
    """

    kind = "hierarchical"
    shares_memory = True
    pieces_are_views = True

    def __init__(
        self, intra_host: SharedMemoryGroup, inter_host: DistributedGroup, by_host: Sequence[Sequence[int]]
    ) -> None:
        # The ranks begin with the first worker of each host, continue with the second worker of each host, and so on.
        workers = [worker for position in zip(*by_host, strict=True) for worker in position]
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
        raise InvariantError("a hierarchical group has no all_to_all: use intra_host and inter_host", where=tag)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        my_part = full.chunk(self._intra_host.size)[self._intra_host.rank]
        wait_inter_host = self._inter_host.all_gather(my_part, tag)

        def wait() -> None:
            wait_inter_host()
            # `full` is one copy on this host. Another worker's part of it is complete once that worker has waited for
            # its own inter-host transfer and started this call.
            self._intra_host.all_gather(full, tag)()

        return wait

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        of_position = torch.stack(self._inter_host.all_gather_small(small, tag))
        of_all_positions = self._intra_host.all_gather_small(of_position, tag)
        return [each for values in of_all_positions for each in values.unbind()]

    def take_down(self) -> None:
        self._inter_host.take_down()
