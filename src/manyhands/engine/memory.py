"""Memory that was freed but is still held by the C library."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_memory() -> None:
    """Return the heap's free pages to the system (glibc keeps them otherwise); elsewhere does nothing.

    Called after things that happen once and free much: laying out the model, the optimizer's first step.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
