"""Groups over torch.distributed (Gloo, NCCL): data movement only, never a sum.

Only data movement is asked of it (all-to-all, all-gather), as bytes: never a sum, whose order would be the library's.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.comm.local import LocalGroup
from manyhands.comm.watched_group import WatchedGroup
from manyhands.errors import ConfigError, InvariantError, WorkerError
from manyhands.members.membership import Membership
from manyhands.offload.allocator import Allocator, BufferPool

BROKEN_SECONDS = 6.0
"""So long it may take until it's known whose connection broke."""

TAKE_DOWN_SECONDS = 1.0
"""So long a broken group may take to be freed."""


class _DistributedAllToAll(AllToAll):
    def __init__(self, received: Tensor, num: int, work: dist.Work, wait: Callable[[], None], pool: BufferPool) -> None:
        self._received, self._num_pieces, self._work, self._wait, self._pool = received, num, work, wait, pool

    @property
    def is_complete(self) -> bool:
        return bool(self._work.is_completed())

    def pieces(self) -> list[Tensor]:
        self._wait()
        return list(self._received.chunk(self._num_pieces)) if self._num_pieces else []

    def release(self) -> None:
        self._pool.put_back(self._received)
        del self._received

    def wait_reusable(self) -> None:
        self._wait()  # what I gave has left


class DistributedGroup(WatchedGroup):
    """Every worker has memory of its own."""

    kind = "distributed"
    shares_memory = False
    pieces_are_views = False

    def __init__(
        self,
        membership: Membership,
        device: torch.device,
        dist_group: dist.ProcessGroup | None = None,
        channel: int = 0,
        workers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(membership, device, channel, workers)
        self._dist_group = dist_group  # None: torch's default group
        self._alone, self._pool = LocalGroup(device), BufferPool(device)

    @classmethod
    def begin(
        cls,
        membership: Membership,
        store: Store,
        device: torch.device,
        backend: str,
        channel: int = 0,
        workers: Sequence[int] | None = None,
    ) -> DistributedGroup:
        """Make torch's default process group, of these workers. Collective among them; raises ConfigError."""
        new = cls(membership, device, None, channel, workers)
        if dist.is_initialized():
            raise ConfigError(
                "torch.distributed's default process group is taken",
                hint="close the other engine first; a script must not call init_process_group itself",
            )
        hook, limit = sys.excepthook, _last_resort(membership)
        dist.init_process_group(backend, store=store, rank=new.rank, world_size=new.size, timeout=limit)
        if workers is not None:
            sys.excepthook = hook  # torch's would give the lines of errors a rank that isn't the launcher's
        return new

    @property
    def intra_host(self) -> Group:
        return self._alone

    @property
    def inter_host(self) -> Group | None:
        return self

    def sibling(self) -> DistributedGroup:
        new = dist.new_group(timeout=_last_resort(self.membership))
        if not isinstance(new, dist.ProcessGroup):
            raise InvariantError("this process is not part of its own group")
        other = DistributedGroup(self.membership, self.device, new, self.channel + 1)
        other.recorder = self.recorder
        return other

    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        return (allocator or Allocator(self.device)).empty(numel, dtype)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        local = self._pool.take(numel, dtype).zero_()
        return Contribution(local, free=lambda: self._pool.put_back(local))

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        gives = self.rank in contributors
        sent = contribution.local[start : start + self.size * shard_numel] if gives else contribution.local[:0]
        received = self._pool.take(len(contributors) * shard_numel, sent.dtype)
        item = shard_numel * sent.dtype.itemsize
        call = self._post(tag)
        work = self._call(
            lambda: dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                output_split_sizes=[item if rank in contributors else 0 for rank in range(self.size)],
                input_split_sizes=[item if gives else 0] * self.size,
                group=self._dist_group,
                async_op=True,
            )
        )
        wait = self._waiter([work], call, tag, (len(contributors) - gives) * item)
        return _DistributedAllToAll(received, len(contributors), work, wait, self._pool)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        as_bytes, group = full.view(torch.uint8), self._dist_group
        parts, call = as_bytes.chunk(self.size), self._post(tag)
        if full.is_cuda:
            works = [self._call(partial(dist.all_gather_single, as_bytes, parts[self.rank], group, async_op=True))]
        else:  # Gloo's all-gather takes as much memory again, and three times as long
            works = [self._call(partial(dist.broadcast, one, None, group, True, src)) for src, one in enumerate(parts)]
        return self._waiter(works, call, tag, as_bytes.numel() - parts[0].numel())

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        flat = small.detach().contiguous().view(-1).view(torch.uint8)
        copies = torch.empty(self.size * flat.numel(), dtype=torch.uint8)
        call = self._post(tag)
        work = self._call(lambda: dist.all_gather_single(copies, flat, self._dist_group, async_op=True))
        self._waiter([work], call, tag, flat.numel() * (self.size - 1), on_host=True)()
        return [copy.view(small.dtype).view(small.shape) for copy in copies.chunk(self.size)]

    def _call(self, begin: Callable[[], dist.Work | None]) -> dist.Work:
        try:
            work = begin()
        except RuntimeError as error:
            raise self._failure_behind(error) from error
        if work is None:
            raise self._failure_behind(RuntimeError("this process is not part of the group"))
        return work

    def _waiter(
        self, works: list[dist.Work], call: int, tag: str, size: int, *, on_host: bool | None = None
    ) -> Callable[[], None]:
        """size: bytes that this worker gets. on_host: the tensors are the CPU's, so that waiting for the works is
        waiting here (None: as the group's)."""
        done = False
        on_host = self.device.type == "cpu" if on_host is None else on_host

        def wait() -> None:
            nonlocal done
            if done:
                return
            began = time.monotonic()
            try:
                for work in works:
                    if on_host:
                        self._wait(work.is_completed, lambda peer: peer.posted(self.channel) < call, tag)
                    work.wait()
            except RuntimeError as error:
                raise self._failure_behind(error) from error
            done = True
            self._check_tags(call, tag)
            self.recorder.add(tag, size, time.monotonic() - began)

        return wait

    def _failure_behind(self, error: RuntimeError) -> WorkerError:
        """A broken connection is what a peer's death looks like from here: wait for the watcher to name the peer."""
        self.membership.hurry()
        deadline = time.monotonic() + BROKEN_SECONDS
        while self.membership.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        broken = WorkerError("the connection to the other workers broke", detail=str(error), hint="see their logs")
        return self.membership.failure or broken

    def take_down(self) -> None:
        """Gloo waits for what is under way until its own time limit, in a broken group perhaps for a host that doesn't
        answer any more: then the group is left to itself, and goes with the process."""
        ending = threading.Thread(target=_destroy, name="manyhands-take-down", daemon=True)
        ending.start()
        ending.join(None if self.membership.is_well else TAKE_DOWN_SECONDS)


def _destroy() -> None:
    with contextlib.suppress(RuntimeError):  # a broken group can't be taken down in order, and needn't be
        dist.destroy_process_group()


def _last_resort(membership: Membership) -> timedelta:
    """The library's own limit: ours ends waits itself, earlier and with a name."""
    return timedelta(seconds=max(60.0, 2 * membership.stall_seconds))
