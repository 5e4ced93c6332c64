"""Workers as threads of this process."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import Group
from manyhands.comm.hierarchical import HierarchicalGroup
from manyhands.comm.local import LocalGroup
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.members.membership import Membership
from manyhands.offload.scratch import map_file

T = TypeVar("T")


class ThreadArena:
    """Memory that threads of one process see: one instance for all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, Tensor] = {}

    def create(self, num_bytes: int, scratch: Path | None = None) -> tuple[Tensor, str]:
        with self._lock:
            address = str(len(self._buffers))
            self._buffers[address] = (
                torch.zeros(num_bytes, dtype=torch.uint8) if scratch is None else map_file(scratch, num_bytes)
            )
            return self._buffers[address], address

    def open(self, address: str) -> Tensor:
        return self._buffers[address]

    def seal(self) -> None:
        pass  # addresses are shared by all threads; they go with the arena


def thread_groups(size: int, *, stall_seconds: float = 60.0) -> list[Callable[[], Group]]:
    """Makers of the groups of `size` workers that are threads of this process; each thread calls its own."""
    store, arena, lock = HashStore(), ThreadArena(), threading.RLock()

    def maker(rank: int) -> Callable[[], Group]:
        def make() -> Group:
            if size == 1:
                return LocalGroup(torch.device("cpu"))
            membership = Membership(store, rank, size, arena, stall_seconds=stall_seconds, abandon=lambda error: None)
            return SharedMemoryGroup(membership, arena, lock)

        return make

    return [maker(rank) for rank in range(size)]


class _Links(DistributedGroup):
    """Of threads: not torch's default group, which a process has one of."""

    def take_down(self) -> None:
        pass


def host_groups(hosts: int, workers: int) -> list[Callable[[], Group]]:
    """Makers of the groups of so many pretended hosts with so many workers each, which are threads."""
    store, arena, lock = HashStore(), ThreadArena(), threading.RLock()
    by_host = [list(range(host * workers, (host + 1) * workers)) for host in range(hosts)]

    def maker(host: int, place: int) -> Callable[[], Group]:
        def make() -> Group:
            mine = by_host[host]
            membership = Membership(
                store, mine[place], hosts * workers, arena, stall_seconds=60, abandon=lambda error: None
            )
            intra_host = SharedMemoryGroup(membership, arena, lock, mine)
            links = ProcessGroupGloo(PrefixStore(f"place/{place}", store), host, hosts, timedelta(seconds=60))
            alike = [each[place] for each in by_host]
            return HierarchicalGroup(intra_host, _Links(membership, torch.device("cpu"), links, 1, alike), by_host)

        return make

    return [maker(host, place) for host in range(hosts) for place in range(workers)]


def run_threads(
    size: int, work: Callable[[Group], T], *, timeout: float = 60.0, makers: list[Callable[[], Group]] | None = None
) -> list[T]:
    """Call `work(group)` in each of `size` threads, every one with its own group; what they return, by rank.

    makers: of those groups, by worker. The first error of any thread is raised here. TimeoutError, with everyone's
    stack, if they don't end in time.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def worker(rank: int, make: Callable[[], Group]) -> None:
        try:
            results[rank] = work(make())
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=worker, args=(rank, make), name=f"worker {rank}", daemon=True)
        for rank, make in enumerate(makers or thread_groups(size))
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [thread for thread in threads if thread.is_alive()]
    if late and not errors:
        raise TimeoutError("\n".join(_stack_of(thread) for thread in late))
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def _stack_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    lines = traceback.format_stack(frame) if frame is not None else ["(gone)\n"]
    return f"{thread.name} didn't end:\n{''.join(lines)}"
