"""Groups of CPU workers on one host, which read each other's buffers in shared memory.

Memory order: a worker writes data, then announces the data by writing a count on its board. A reader sees the count
first, then reads the data. Between the two operations there is always a system call (sched_yield, nanosleep) or an
acquisition of the interpreter's lock, which keeps the operations in order. Python has no other memory barrier. Do not
remove these calls, and never write the count first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyhands.comm.group import AllToAll, Contribution
from manyhands.comm.watched_group import WatchedGroup
from manyhands.members.board import Arena
from manyhands.members.membership import Membership
from manyhands.offload.allocator import Allocator

MAILBOX_BYTES = 1 << 20
"""The size of one mailbox. Larger values of `all_gather_small` are sent in several parts."""


class _SharedAllToAll(AllToAll):
    """An all-to-all whose pieces are views of the peers' contributions, so that nothing is copied.

    call: the number of the collective call. number: the number of this all-to-all in the group, from 1. The boards
    count the all-to-alls that have been read.
    """

    def __init__(
        self, group: SharedMemoryGroup, call: int, number: int, pieces: list[tuple[int, Tensor]], tag: str
    ) -> None:
        self._group, self._call, self._number, self._tag = group, call, number, tag
        self._pieces = pieces

    @property
    def is_complete(self) -> bool:
        return self._group.all_posted(self._call)

    @property
    def is_reusable(self) -> bool:
        return self._group.all_drained(self._number)

    def pieces(self) -> list[Tensor]:
        seconds = self._group.wait_posted(self._call, self._tag)
        num_bytes = sum(piece.nbytes for rank, piece in self._pieces if rank != self._group.rank)
        self._group.recorder.add(self._tag, num_bytes, seconds)
        return [piece for _, piece in self._pieces]

    def release(self) -> None:
        # The board has only the number of the last all-to-all that was read, so all-to-alls must be released in order.
        self._group.membership.board.drain(self._number)

    def wait_reusable(self) -> None:
        self._group.wait_drained(self._number, self._tag)


class SharedMemoryGroup(WatchedGroup):
    """A group of CPU workers that share memory, because they are processes of one host."""

    kind = "shared-memory"
    shares_memory = True
    pieces_are_views = True

    def __init__(self, membership: Membership, arena: Arena, workers: Sequence[int] | None = None) -> None:
        super().__init__(membership, torch.device("cpu"), workers=workers)
        self._arena = arena
        self._boards = [peer.board for peer in self._peers if peer.board is not None]
        self._num_all_to_all = 0
        self._mailboxes = self._create(2 * MAILBOX_BYTES)
        self._num_letters = 0

    def _create(self, num_bytes: int) -> list[Tensor]:
        """Create a buffer of `num_bytes` on every worker. Return all these buffers by rank. Collective."""
        mine, address = self._arena.create(num_bytes)
        addresses = self._all_gather_text(address)
        buffers = [mine if rank == self.rank else self._arena.open(other) for rank, other in enumerate(addresses)]
        # This worker may drop the address only after all workers have opened it.
        self.membership.all_gather_text("opened")
        self._arena.seal()
        return buffers

    def _all_gather_text(self, text: str) -> list[str]:
        """Return the text of every worker of this group, by rank. Collective among all members."""
        texts = self.membership.all_gather_text(text)
        return [texts[worker] for worker in self.workers]

    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        scratch = None if allocator is None else allocator.scratch
        mine, address = self._arena.create(numel * dtype.itemsize, scratch) if self.rank == 0 else (None, "")
        first = self._all_gather_text(address)[0]
        buffer = self._arena.open(first) if mine is None else mine
        self.membership.all_gather_text("opened")
        self._arena.seal()
        if allocator is not None:
            allocator.adopt(buffer)
        return buffer.view(dtype)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        buffers = [buffer.view(dtype) for buffer in self._create(numel * dtype.itemsize)]
        return Contribution(buffers[self.rank], buffers)

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        first = start + self.rank * shard_numel
        pieces = [(rank, contribution.peers[rank][first : first + shard_numel]) for rank in contributors]
        self._num_all_to_all += 1
        return _SharedAllToAll(self, self._post(tag), self._num_all_to_all, pieces, tag)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        call = self._post(tag)  # `full` is one physical copy: once all workers have posted, all ranges are written

        def wait() -> None:
            self.recorder.add(tag, 0, self.wait_posted(call, tag))

        return wait

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        flat = small.detach().contiguous().view(-1).view(torch.uint8)
        copies = [torch.empty_like(flat) for _ in range(self.size)]
        seconds = 0.0
        for chunk in range(max(1, math.ceil(flat.numel() / MAILBOX_BYTES))):
            part = slice(chunk * MAILBOX_BYTES, min((chunk + 1) * MAILBOX_BYTES, flat.numel()))
            # Each worker alternates between two mailboxes. It overwrites a mailbox only after all peers have posted the
            # next message, and a peer posts the next message only after it has read this one. With a single mailbox, a
            # slow reader could lose a message.
            self._num_letters += 1
            offset = self._num_letters % 2 * MAILBOX_BYTES
            box = slice(offset, offset + part.stop - part.start)
            self._mailboxes[self.rank][box] = flat[part]
            call = self._post(tag)
            seconds += self.wait_posted(call, tag)
            for rank in range(self.size):
                copies[rank][part] = self._mailboxes[rank][box]
        self.recorder.add(tag, flat.numel() * (self.size - 1), seconds)
        return [copy.view(small.dtype).view(small.shape) for copy in copies]

    def wait_posted(self, call: int, tag: str) -> float:
        """Wait until all workers have started collective call `call`. Return the seconds that the wait took."""
        seconds = self._wait(lambda: self.all_posted(call), lambda peer: peer.posted(self.channel) < call, tag)
        self._check_tags(call, tag)
        return seconds

    def wait_drained(self, number: int, tag: str) -> None:
        """Wait until all workers have read all-to-all `number`."""
        self.recorder.add_wait(self._wait(lambda: self.all_drained(number), lambda peer: peer.drained < number, tag))

    def all_posted(self, call: int) -> bool:
        """Return True if all peers have started collective call `call`."""
        return all(board.posted(self.channel) >= call for board in self._boards)

    def all_drained(self, number: int) -> bool:
        """Return True if all peers have read all-to-all `number`."""
        return all(board.drained >= number for board in self._boards)
