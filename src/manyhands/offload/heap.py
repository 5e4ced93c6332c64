"""Memory that was freed but is still held by the C library."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h


def give_back_memory() -> None:
    """Return the heap's free pages to the system (glibc keeps them otherwise); elsewhere does nothing.

    Called after things that happen once and free much: laying out the model, the optimizer's first step.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_no_large_memory() -> None:
    """From now on the C library maps every large buffer by itself, and returns it when it is freed: for models that
    barely fit. (Its heap keeps holes as large as weights and gradients otherwise.) Costs page faults."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
