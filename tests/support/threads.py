"""Workers that are threads of this process.

The random generators of Python, numpy and torch belong to the process. Production code uses them inside of
`preserved_generators`; here this takes a lock, too, so that one worker at a time draws from them. A worker that waits
for its peers releases the lock meanwhile, since these may have to compute first.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import Group
from manyhands.comm.hierarchical import HierarchicalGroup
from manyhands.comm.local import LocalGroup
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.members.membership import Membership, Peer
from manyhands.numerics import seeds
from manyhands.offload.scratch import map_file

T = TypeVar("T")


class _Worker(threading.local):
    """What a thread knows about itself. depth: how often it holds _GENERATORS; None in threads that are no worker."""

    depth: int | None = None


_GENERATORS = threading.RLock()
"""Held by the worker that uses the process's random generators."""

_worker = _Worker()


@contextmanager
def _generators_of_worker() -> Iterator[None]:
    """In place of `preserved_generators`."""
    if _worker.depth is None:
        with _preserved_generators():
            yield
        return
    with _GENERATORS:
        _worker.depth += 1
        try:
            with _preserved_generators():
                yield
        finally:
            _worker.depth -= 1


@contextmanager
def _generators_lent() -> Iterator[None]:
    """Let the other workers use the generators inside the block, and restore the generators' state after it."""
    if not _worker.depth:
        yield
        return
    depth, state = _worker.depth, seeds.generators_state()
    for _ in range(depth):
        _GENERATORS.release()
    try:
        yield
    finally:
        for _ in range(depth):
            _GENERATORS.acquire()
        seeds.restore_generators(state)


def _replace_everywhere() -> None:
    """Put `_generators_of_worker` into every module that has imported the function, or imports it later."""
    for module in list(sys.modules.values()):
        if getattr(module, "preserved_generators", None) is _preserved_generators:
            module.preserved_generators = _generators_of_worker  # type: ignore[attr-defined]


_preserved_generators = seeds.preserved_generators
_replace_everywhere()


class ThreadArena:
    """Memory that all threads of one process see; one instance for all of them."""

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
        pass  # all threads use the same addresses; they are valid as long as the arena lives


class ThreadGroup(SharedMemoryGroup):
    """Workers that are threads: one that waits lets the others compute."""

    def _wait(self, ready: Callable[[], bool], is_behind: Callable[[Peer], bool], tag: str) -> float:
        if ready():
            return super()._wait(ready, is_behind, tag)
        with _generators_lent():
            return super()._wait(ready, is_behind, tag)


def thread_groups(size: int, *, stall_seconds: float = 240.0) -> list[Callable[[], Group]]:
    """Return functions that create the groups of `size` workers that are threads; each thread must call its own."""
    store, arena = HashStore(), ThreadArena()

    def maker(rank: int) -> Callable[[], Group]:
        def make() -> Group:
            _worker.depth = 0
            if size == 1:
                return LocalGroup(torch.device("cpu"))
            membership = Membership(store, rank, size, arena, stall_seconds=stall_seconds, abandon=lambda error: None)
            return ThreadGroup(membership, arena)

        return make

    return [maker(rank) for rank in range(size)]


def host_groups(hosts: int, workers: int) -> list[Callable[[], Group]]:
    """Return functions that create the groups of simulated hosts with `workers` threads each."""
    store, arena = HashStore(), ThreadArena()
    by_host = [list(range(host * workers, (host + 1) * workers)) for host in range(hosts)]

    def maker(host: int, position: int) -> Callable[[], Group]:
        def make() -> Group:
            _worker.depth = 0
            mine = by_host[host]
            membership = Membership(
                store, mine[position], hosts * workers, arena, stall_seconds=240, abandon=lambda error: None
            )
            intra_host = ThreadGroup(membership, arena, mine)
            links, peers = PrefixStore(f"position/{position}", store), [each[position] for each in by_host]
            inter_host = DistributedGroup(membership, links, torch.device("cpu"), channel=1, workers=peers)
            return HierarchicalGroup(intra_host, inter_host, by_host)

        return make

    return [maker(host, position) for host in range(hosts) for position in range(workers)]


def run_threads(
    size: int, work: Callable[[Group], T], *, timeout: float = 240.0, makers: list[Callable[[], Group]] | None = None
) -> list[T]:
    """Call `work(group)` in each of `size` threads with a group of its own; return the results by rank.

    makers: the functions that create the groups, by worker. Raises the first error of any thread, or TimeoutError with
    the stacks of the threads that have not ended in time.
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
    lines = traceback.format_stack(frame) if frame is not None else ["(no stack)\n"]
    return f"{thread.name} did not end:\n{''.join(lines)}"
