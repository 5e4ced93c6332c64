"""Groups over torch.distributed (Gloo, NCCL), which moves data but never adds.

torch.distributed only moves bytes here (all-to-all, all-gather, broadcast). It must not add, because its order of
addition depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.comm.local import LocalGroup
from manyhands.comm.watched_group import WatchedGroup
from manyhands.errors import WorkerError
from manyhands.members.membership import Membership
from manyhands.offload.allocator import Allocator, BufferPool

BROKEN_SECONDS = 6.0
"""The time in which the watching thread must identify the peer whose connection broke.

It is longer than the shortened limit for lost hosts (SHORT_LOST_SECONDS) plus one interval between heartbeats.
"""

TAKE_DOWN_SECONDS = 1.0
"""The time in which a broken group must shut down before it is abandoned."""


class _DistributedAllToAll(AllToAll):
    """An all-to-all over torch.distributed. received: a buffer of `pool` for the pieces, one after another. num: their
    number.
    """

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
        self._wait()  # the work is complete only after this worker's contribution has been sent


class DistributedGroup(WatchedGroup):
    """Workers with separate memory, connected by a process group of torch.distributed. The constructor is collective.

    store: the store with which the workers find each other. No other group may use its keys. nccl: True to use NCCL
    instead of Gloo for tensors on a GPU. Buffers come from a pool and are reused.

    The process group isn't torch's default group. Libraries would find a default group and use it to exchange their own
    data: codebooks of vector quantizers, the statistics of SyncBatchNorm, the centres of self-supervised losses. The
    result would then depend on the number of workers. A script may have a default group for its own purposes.
    """

    kind = "distributed"
    shares_memory = False
    pieces_are_views = False

    def __init__(
        self,
        membership: Membership,
        store: Store,
        device: torch.device,
        *,
        nccl: bool = False,
        channel: int = 0,
        workers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(membership, device, channel, workers)
        self._store, self._nccl = store, nccl
        self._dist_group = _process_group(store, self.rank, self.size, device, nccl, _last_resort(membership))
        self._siblings: list[DistributedGroup] = []
        self._alone, self._pool = LocalGroup(device), BufferPool(device)

    @property
    def intra_host(self) -> Group:
        return self._alone

    @property
    def inter_host(self) -> Group | None:
        return self

    def sibling(self) -> DistributedGroup:
        store, channel = PrefixStore(f"sibling/{len(self._siblings)}", self._store), self.channel + 1
        other = DistributedGroup(
            self.membership, store, self.device, nccl=self._nccl, channel=channel, workers=self.workers
        )
        other.recorder = self.recorder
        self._siblings.append(other)
        return other

    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        return (allocator or Allocator(self.device)).empty(numel, dtype)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        local = self._pool.take(numel, dtype).zero_()
        return Contribution(local, free=lambda: self._pool.put_back(local))

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        contributes = self.rank in contributors
        sent = contribution.local[start : start + self.size * shard_numel] if contributes else contribution.local[:0]
        received = self._pool.take(len(contributors) * shard_numel, sent.dtype)
        piece_bytes = shard_numel * sent.dtype.itemsize
        call = self._post(tag)
        work = self._call(
            lambda: dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                output_split_sizes=[piece_bytes if rank in contributors else 0 for rank in range(self.size)],
                input_split_sizes=[piece_bytes if contributes else 0] * self.size,
                group=self._dist_group,
                async_op=True,
            )
        )
        wait = self._waiter([work], call, tag, (len(contributors) - contributes) * piece_bytes)
        return _DistributedAllToAll(received, len(contributors), work, wait, self._pool)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        as_bytes, group = full.view(torch.uint8), self._dist_group
        parts, call = as_bytes.chunk(self.size), self._post(tag)
        if full.is_cuda:
            works = [self._call(partial(dist.all_gather_single, as_bytes, parts[self.rank], group, async_op=True))]
        else:
            # Send each worker's range by a broadcast. Gloo's all-gather would need twice the memory and, with two
            # workers, would take three times as long.
            works = [
                self._call(partial(dist.broadcast, part, None, group, True, source))
                for source, part in enumerate(parts)
            ]
        return self._waiter(works, call, tag, as_bytes.numel() - parts[0].numel())

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        flat = small.detach().contiguous().view(-1).view(torch.uint8)
        copies = torch.empty(self.size * flat.numel(), dtype=torch.uint8)
        call = self._post(tag)
        work = self._call(lambda: dist.all_gather_single(copies, flat, self._dist_group, async_op=True))
        self._waiter([work], call, tag, flat.numel() * (self.size - 1), on_host=True)()
        return [copy.view(small.dtype).view(small.shape) for copy in copies.chunk(self.size)]

    def _call(self, start: Callable[[], dist.Work | None]) -> dist.Work:
        """Start an operation. Raises WorkerError if the connection is broken."""
        try:
            work = start()
        except RuntimeError as error:
            raise self._failure_behind(error) from error
        if work is None:
            raise self._failure_behind(RuntimeError("this process is not a member of the group"))
        return work

    def _waiter(
        self, works: list[dist.Work], call: int, tag: str, size: int, *, on_host: bool | None = None
    ) -> Callable[[], None]:
        """Return a function that waits for `works` and records the call. Further calls of the function do nothing.

        size: the number of bytes that this worker receives. on_host: True if the tensors are on the CPU, or None if
        they are on the group's device. On the CPU the work is complete when the wait returns. On a GPU the wait only
        orders streams.
        """
        done = False
        on_host = self.device.type == "cpu" if on_host is None else on_host

        def wait() -> None:
            nonlocal done
            if done:
                return
            started = time.monotonic()
            try:
                for work in works:
                    if on_host:  # poll, because work.wait() can't be interrupted when a peer fails
                        self._wait(work.is_completed, lambda peer: peer.posted(self.channel) < call, tag)
                    work.wait()
            except RuntimeError as error:
                raise self._failure_behind(error) from error
            done = True
            self._check_tags(call, tag)
            self.recorder.add(tag, size, time.monotonic() - started)

        return wait

    def _failure_behind(self, error: RuntimeError) -> WorkerError:
        """Return the failure that broke a connection. It names the worker that caused the failure.

        A connection breaks when a peer dies. This function waits until the watching thread identifies the peer. If that
        takes longer than BROKEN_SECONDS, the error has no rank.
        """
        self.membership.shorten_lost_limit()
        deadline = time.monotonic() + BROKEN_SECONDS
        while self.membership.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        broken = WorkerError("the connection to the other workers broke", detail=str(error), hint="see their logs")
        return self.membership.failure or broken

    def take_down(self) -> None:
        """Shut down the process group, and the process groups of siblings.

        In a broken group, Gloo waits for pending operations until its own time limit, perhaps for a host that no longer
        answers. So a broken group is abandoned after TAKE_DOWN_SECONDS and ends with the process.
        """
        ending = threading.Thread(target=self._shut_down, name="manyhands-take-down", daemon=True)
        ending.start()
        ending.join(None if self.membership.is_healthy else TAKE_DOWN_SECONDS)

    def _shut_down(self) -> None:
        for group in (*self._siblings, self):
            # Shutting down a broken group may raise, and this error is harmless.
            with contextlib.suppress(RuntimeError):
                group._dist_group.shutdown()
            del group._dist_group  # Gloo closes its connections when no reference to the group is left


def _process_group(
    store: Store, rank: int, size: int, device: torch.device, nccl: bool, time_limit: timedelta
) -> dist.ProcessGroup:
    """Return a process group that torch doesn't register, so that only the caller can use it. Collective."""
    group, kinds = dist.ProcessGroup(store, rank, size), dist.ProcessGroup.BackendType
    gloo = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, time_limit)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    group._set_default_backend(kinds.NCCL if nccl else kinds.GLOO)
    if nccl:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = time_limit
        group._register_backend(device, kinds.NCCL, ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options))
    elif device.type != "cpu":
        group._register_backend(device, kinds.GLOO, gloo)
    return group


def _last_resort(membership: Membership) -> timedelta:
    """Return the time limit for torch.

    Waits end earlier, after stall_seconds, with an error that names the worker.
    """
    return timedelta(seconds=max(60.0, 2 * membership.stall_seconds))
