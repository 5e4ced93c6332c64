"""Requests to the store on the first host, each with a time limit.

The store's host may be stopped or cut off. torch's client would wait for the store's answer without limit and without
reacting to signals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, Store  # type: ignore[attr-defined]

from manyhands.members.processes import Answer, call_with_limit

ANSWER_SECONDS = 20.0
"""The time limit of a request to the first host's store."""

_WAIT_SECONDS = 30.0  # default time limit for a key that is not set yet

_POLL_SECONDS = 0.05


def ask_store(call: Callable[[], Answer], meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """Make a request to the first host's store, as `call_with_limit` does, with the time limit ANSWER_SECONDS.

    Raises DistNetworkError if there is no answer in time.
    """
    try:
        return call_with_limit(call, ANSWER_SECONDS, meanwhile)
    except TimeoutError as error:
        raise DistNetworkError(f"the first host has not answered for {ANSWER_SECONDS:g} s") from error


class RemoteStore(Store):
    """A client of a store on another host, with a time limit for each request.

    client: torch's client, which makes the requests. meanwhile: called repeatedly while a request is pending. After a
    request without an answer, all later requests fail immediately.

    torch's C++ code also calls these methods, for stores with a prefix. That code holds no reference to this Python
    object, so the caller must keep a reference.
    """

    def __init__(self, client: Store, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._client, self._meanwhile = client, meanwhile
        self._no_answer: DistNetworkError | None = None

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        self._meanwhile()
        if self._no_answer is not None:
            raise self._no_answer
        try:
            return ask_store(call, self._meanwhile)
        except DistNetworkError as error:
            self._no_answer = error
            raise

    def wait(self, keys: list[str], limit: timedelta = timedelta(seconds=_WAIT_SECONDS)) -> None:
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise DistStoreError(f"{', '.join(keys)} were not set within {limit.total_seconds():g} s")
            time.sleep(_POLL_SECONDS)

    def check(self, keys: list[str]) -> bool:
        return self._ask(lambda: self._client.check(keys))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._ask(lambda: self._client.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return self._ask(lambda: self._client.multi_get(keys))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._client.set(key, value))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._ask(lambda: self._client.multi_set(keys, values))  # type: ignore[attr-defined]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self._ask(lambda: self._client.compare_set(key, expected, value))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._client.add(key, amount))
