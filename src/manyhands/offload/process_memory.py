"""The memory that this process uses, can still get, and returns to the system.

Memory is measured as the proportional set size (PSS): shared pages are divided among the processes that map them.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_MMAP_THRESHOLD_MAX = 1 << 25  # glibc's own maximum for the dynamic threshold


def return_freed_memory() -> None:
    """Return the heap's free pages to the system, because glibc would retain them. Does nothing with other C libraries.

    Call it after one-time operations that free much memory, such as laying out the model or the optimizer's first step.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(large: bool) -> None:
    """Control what glibc does with freed memory from now on. Does nothing with other C libraries.

    large: if True, glibc retains the memory that a step frees, for the next step. By default glibc sometimes returns
    the pages of activations, and the page faults of the next step then take about 4 % of its time. If False, glibc maps
    every large buffer separately, and returns it when it is freed. This costs page faults, and is for models that
    barely fit, because the heap would otherwise retain holes as large as weights and gradients.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX if large else 1 << 17)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1 if large else 1 << 17)


_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""The files with limit and usage in the file systems of control groups, versions 2 and 1."""


def free_memory_bytes() -> int:
    """Return the free memory of the machine, or of this process's control group if that is less; 0 if both are
    unknown.
    """
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
    """Return the current PSS of this process, or its largest resident size so far if the system does not report the
    PSS.
    """
    try:
        with _SMAPS.open() as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


_PAGE_BYTES = resource.getpagesize()


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM, or its largest size so far if the system doesn't report it.

    Unlike `memory_bytes`, which takes milliseconds in a large process, this takes microseconds.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


MEASURED_STEPS = 3
"""The number of steps at the start in which memory is measured. Measuring takes time, so later steps are not measured.

The first step allocates the optimizer's state, so the peak is in these steps.
"""


class PeakMemory:
    """A context manager that measures the largest `memory_bytes` while it is active. It may be entered repeatedly."""

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
