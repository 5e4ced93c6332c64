"""CPU workers on one host: views of each other's buffers in shared memory.

Order of memory accesses: data are written before the count on the board that announces them, and read after that count
was seen. Between the two lie system calls (sched_yield, nanosleep) or the interpreter's lock, which order them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from manyhands.comm.group import AllToAll, Contribution
from manyhands.comm.watched_group import WatchedGroup
from manyhands.members.board import Arena
from manyhands.members.membership import Membership, Peer
from manyhands.numerics.seeds import generators_state, restore_generators
from manyhands.offload.allocator import Allocator

MAILBOX_BYTES = 1 << 20


class _SharedAllToAll(AllToAll):
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
        self._group.membership.board.drain(self._number)

    def wait_reusable(self) -> None:
        self._group.wait_drained(self._number, self._tag)


class SharedMemoryGroup(WatchedGroup):
    """CPU workers that share memory: processes of one host, or (in tests) threads of one process."""

    kind = "shared-memory"
    shares_memory = True
    pieces_are_views = True

    def __init__(
        self,
        membership: Membership,
        arena: Arena,
        compute_lock: threading.RLock | None = None,
        workers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(membership, torch.device("cpu"), workers=workers)
        self._arena, self._lock, self._held = arena, compute_lock, 0
        self._boards = [peer.board for peer in self._peers if peer.board is not None]
        self._num_all_to_all = 0
        self._mailboxes = self._create(2 * MAILBOX_BYTES)
        self._letters = 0

    def _create(self, num_bytes: int) -> list[Tensor]:
        """Everyone's new buffer of that size, by rank."""
        mine, address = self._arena.create(num_bytes)
        addresses = self._all_gather_text(address)
        buffers = [mine if rank == self.rank else self._arena.open(other) for rank, other in enumerate(addresses)]
        self.membership.all_gather_text("opened")
        self._arena.seal()
        return buffers

    def _all_gather_text(self, text: str) -> list[str]:
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
        everyone = [buffer.view(dtype) for buffer in self._create(numel * dtype.itemsize)]
        return Contribution(everyone[self.rank], everyone)

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        begin = start + self.rank * shard_numel
        pieces = [(rank, contribution.peers[rank][begin : begin + shard_numel]) for rank in contributors]
        self._num_all_to_all += 1
        return _SharedAllToAll(self, self._post(tag), self._num_all_to_all, pieces, tag)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        call = self._post(tag)

        def wait() -> None:
            self.recorder.add(tag, 0, self.wait_posted(call, tag))

        return wait

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        flat = small.detach().contiguous().view(-1).view(torch.uint8)
        copies = [torch.empty_like(flat) for _ in range(self.size)]
        seconds = 0.0
        for chunk in range(max(1, math.ceil(flat.numel() / MAILBOX_BYTES))):
            part = slice(chunk * MAILBOX_BYTES, min((chunk + 1) * MAILBOX_BYTES, flat.numel()))
            # Two boxes in turn: one is written again only after everyone has posted the next letter, having read it.
            self._letters += 1
            box = slice(self._letters % 2 * MAILBOX_BYTES, self._letters % 2 * MAILBOX_BYTES + part.stop - part.start)
            self._mailboxes[self.rank][box] = flat[part]
            call = self._post(tag)
            seconds += self.wait_posted(call, tag)
            for rank in range(self.size):
                copies[rank][part] = self._mailboxes[rank][box]
        self.recorder.add(tag, flat.numel() * (self.size - 1), seconds)
        return [copy.view(small.dtype).view(small.shape) for copy in copies]

    def wait_posted(self, call: int, tag: str) -> float:
        """Wait until everyone has begun collective call `call`; the seconds it took."""
        seconds = self._wait(lambda: self.all_posted(call), lambda peer: peer.posted(self.channel) < call, tag)
        self._check_tags(call, tag)
        return seconds

    def wait_drained(self, number: int, tag: str) -> None:
        """Wait until everyone has read exchange `number`."""
        self.recorder.waited(self._wait(lambda: self.all_drained(number), lambda peer: peer.drained < number, tag))

    def all_posted(self, call: int) -> bool:
        """Whether everyone has begun collective call `call`."""
        return all(board.posted(self.channel) >= call for board in self._boards)

    def all_drained(self, number: int) -> bool:
        """Whether everyone has read exchange `number`."""
        return all(board.drained >= number for board in self._boards)

    def exclusive(self) -> AbstractContextManager[object]:
        return self._holding(self._lock) if self._lock is not None else nullcontext()

    @contextmanager
    def _holding(self, lock: threading.RLock) -> Iterator[None]:
        with lock:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1

    def _wait(self, ready: Callable[[], bool], is_behind: Callable[[Peer], bool], tag: str) -> float:
        """Others must be able to compute meanwhile, where they are threads; the random generators are theirs, too."""
        if self._lock is None or not self._held or ready():
            return super()._wait(ready, is_behind, tag)
        held, generators = self._held, generators_state()
        for _ in range(held):
            self._lock.release()
        try:
            return super()._wait(ready, is_behind, tag)
        finally:
            for _ in range(held):
                self._lock.acquire()
            restore_generators(generators)
