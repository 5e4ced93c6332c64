"""A store on another host that may be stopped or cut off: torch's client would wait for it without limit, deaf to
signals."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, Store  # type: ignore[attr-defined]

from manyhands.members.answer import Answer, answered

ANSWER_SECONDS = 20.0
_WAIT_SECONDS = 30.0  # for a key, unless told otherwise
_LOOK_SECONDS = 0.05


def asked(call: Callable[[], Answer], meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """What a call to the first host's store gives or raises; see `answered`. Raises DistNetworkError if it takes longer
    than ANSWER_SECONDS."""
    try:
        return answered(call, ANSWER_SECONDS, meanwhile)
    except TimeoutError as error:
        raise DistNetworkError(f"the first host has not answered for {ANSWER_SECONDS:g} s") from error


class FarStore(Store):
    """`near`, torch's client of such a store, with `meanwhile` called while it's awaited. Once it hasn't answered it's
    not asked again. (C++ calls these methods, too, for the stores with a prefix: someone must hold this object.)"""

    def __init__(self, near: Store, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._near, self._meanwhile = near, meanwhile
        self._silent: DistNetworkError | None = None

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        self._meanwhile()
        if self._silent is not None:
            raise self._silent
        try:
            return asked(call, self._meanwhile)
        except DistNetworkError as error:
            self._silent = error
            raise

    def wait(self, keys: list[str], limit: timedelta = timedelta(seconds=_WAIT_SECONDS)) -> None:
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise DistStoreError(f"nobody has set {', '.join(keys)} within {limit.total_seconds():g} s")
            time.sleep(_LOOK_SECONDS)

    def check(self, keys: list[str]) -> bool:
        return self._ask(lambda: self._near.check(keys))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._ask(lambda: self._near.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return self._ask(lambda: self._near.multi_get(keys))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._near.set(key, value))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._ask(lambda: self._near.multi_set(keys, values))  # type: ignore[attr-defined]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self._ask(lambda: self._near.compare_set(key, expected, value))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._near.add(key, amount))
