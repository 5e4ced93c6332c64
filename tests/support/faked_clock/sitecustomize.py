"""Loaded by Python at its start, in processes whose clock is faked: sleeps in a way that libfaketime leaves alone.

libfaketime converts the times of clock_nanosleep, which `time.sleep` calls, as if it also faked the monotonic clock.
"""

import select
import time


def sleep(seconds: float) -> None:
    """Sleep as `time.sleep` does."""
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select([], [], [], seconds)


time.sleep = sleep
