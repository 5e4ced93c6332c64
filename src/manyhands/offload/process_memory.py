"""The memory this process uses, can still get, and returns to the system.

Memory that was freed but is still held by the C library.

How much memory a process could still have.

How much memory this process takes at its peak, shared pages divided among those who map them (PSS).
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_MMAP_THRESHOLD_MAX = 1 << 25  # what glibc itself goes up to


def return_freed_memory() -> None:
    """Return the heap's free pages to the system (glibc keeps them otherwise); elsewhere does nothing.

    Called after things that happen once and free much: laying out the model, the optimizer's first step.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(large: bool) -> None:
    """What the C library does from now on with memory that is freed; elsewhere than with glibc nothing.

    large: it keeps what a step frees for the next one. (Left to itself glibc returns an activation's pages at one
    time and not at another, and then the next step pays for tens of thousands of page faults, some 4 % of it.)
    Else it maps every large buffer by itself, and returns it when it is freed: for models that barely fit, as the heap
    keeps holes as large as weights and gradients otherwise. Costs page faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX if large else 1 << 17)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1 if large else 1 << 17)


_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Of control groups, second and first version: what may be used, and what is."""


def free_memory_bytes() -> int:
    """Of the machine's memory, and of what the process's control group may use, as far as the system tells."""
    free = []
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        free.append(next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")))
    for most, now in _LIMITS:
        with (
            suppress(OSError, ValueError),
            open(f"/sys/fs/cgroup/{most}") as limit,
            open(f"/sys/fs/cgroup/{now}") as used,
        ):
            free.append(int(limit.read()) - int(used.read()))
    return max(0, min(free, default=0))


_SMAPS = Path("/proc/self/smaps_rollup")

_SAMPLE_SECONDS = 0.02


def memory_bytes() -> int:
    """The process's proportional set size now; where the system doesn't tell it, its largest resident size so far."""
    try:
        with _SMAPS.open() as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class PeakMemory:
    """The largest `memory_bytes` seen while active (a context manager; it may be entered again and again)."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="manyhands-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_bytes())
            if self._done.wait(_SAMPLE_SECONDS):
                return
