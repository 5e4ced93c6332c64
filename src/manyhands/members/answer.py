"""A call that may never return, such as one to a store whose process is stopped, or whose host is cut off."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

_LOOK_SECONDS = 0.05

Answer = TypeVar("Answer")


def answered(call: Callable[[], Answer], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """What the call gives or raises. While it's awaited, `meanwhile` is called again and again, and may raise. Raises
    TimeoutError if the call takes longer; then, too, it is left to itself, in a thread of its own."""
    answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    try:
        threading.Thread(target=ask, name="manyhands-asks", daemon=True).start()
    except RuntimeError:  # no thread is to be had: there are too many, or this process is ending
        return call()
    for _ in range(round(seconds / _LOOK_SECONDS)):  # counted: this process may have been stopped itself
        if concurrent.futures.wait([answer], _LOOK_SECONDS).done:
            return answer.result()
        meanwhile()
    raise TimeoutError(f"no answer within {seconds:g} s")
