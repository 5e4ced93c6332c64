"""Memory that was freed but is still held by the C library."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_MAX = 1 << 25  # what glibc itself goes up to


def give_back_memory() -> None:
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
