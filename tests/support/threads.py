"""Workers as threads of this process."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from manyhands.comm.connect import thread_groups
from manyhands.comm.group import Group

T = TypeVar("T")


def run_threads(size: int, work: Callable[[Group], T], *, timeout: float = 60.0) -> list[T]:
    """Call `work(group)` in each of `size` threads, every one with its own group; what they return, by rank.

    The first error of any thread is raised here. TimeoutError, with everyone's stack, if they don't end in time.
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
        for rank, make in enumerate(thread_groups(size))
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
