"""The pool of one job, kept for the next one of this process: starting workers is most of what a small job costs."""

from __future__ import annotations

import atexit
import os
import threading
from typing import NamedTuple

from manyhands.prepare.pool import Place, Pool

_lock = threading.Lock()
_resting: list[tuple[_Basis, KeptPool]] = []  # of this process: at most one, and nobody uses it


class _Basis(NamedTuple):
    """What workers have taken over from this process when they were started. A pool with another one is of no use."""

    process: int
    workers: int
    memory_bytes: int
    place: Place
    environment: dict[str, str]


class KeptPool(Pool):
    """A pool that `close` lays aside, workers and all, if it has come to the end of its tasks."""

    def __init__(self, basis: _Basis) -> None:
        super().__init__(basis.workers, basis.memory_bytes)
        self._basis = basis

    def close(self) -> None:
        """Lay it aside for the next job; end it if tasks are still running."""
        if not self.idle:
            self.end()
            return
        with _lock:
            _resting.append((self._basis, self))
            others = [pool for _, pool in _resting[:-1]]
            del _resting[:-1]
        for pool in others:
            pool.end()

    def end(self) -> None:
        """End all workers."""
        super().close()


def kept_pool(workers: int, memory_bytes: int) -> Pool:
    """The pool that was laid aside, if it is as wanted; or a new one."""
    basis = _Basis(os.getpid(), workers, memory_bytes, Place.here(), dict(os.environ))
    with _lock:
        found = [pool for its, pool in _resting if its == basis]
        others = [pool for its, pool in _resting if its != basis and its.process == basis.process]
        _resting.clear()
    for pool in others:
        pool.end()
    if found:
        found[0].retries = 0
        return found[0]
    atexit.unregister(end_kept_pools)
    atexit.register(end_kept_pools)
    return KeptPool(basis)


def end_kept_pools() -> None:
    """End the workers that wait for another job."""
    with _lock:
        pools = [pool for its, pool in _resting if its.process == os.getpid()]
        _resting.clear()
    for pool in pools:
        pool.end()
