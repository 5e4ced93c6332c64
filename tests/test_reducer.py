"""When a worker waits, in the midst of a backward, for gradients of the others."""

from __future__ import annotations

import pytest
from torch import Tensor

from manyhands.comm.group import Exchange
from manyhands.engine.reducer import PATIENCE_SECONDS, Reducer


class Late(Exchange):
    """Complete once it was looked at so often; asked for its pieces before, it would wait for good."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    @property
    def is_complete(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def pieces(self) -> list[Tensor]:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError

    def wait_reusable(self) -> None:
        raise NotImplementedError


def test_what_may_never_come_is_awaited_for_less_and_less() -> None:
    reducer = Reducer.__new__(Reducer)
    reducer._must_go_on, reducer._views, reducer._patience = True, False, PATIENCE_SECONDS
    never = Late(float("inf"))
    for patience in (PATIENCE_SECONDS / 10, PATIENCE_SECONDS / 100, PATIENCE_SECONDS / 1000):
        reducer._in_flight = [(None, never)] * 3
        assert not reducer._shall_drain()
        assert reducer._patience == pytest.approx(patience)
    reducer._in_flight = [(None, never)] * 2
    assert not reducer._shall_drain()
    assert reducer._patience == patience  # with few under way it isn't awaited


def test_what_comes_soon_is_awaited() -> None:
    reducer = Reducer.__new__(Reducer)
    reducer._must_go_on, reducer._views, reducer._patience = True, False, 60.0
    reducer._in_flight = [(None, Late(20)), (None, Late(1)), (None, Late(1))]
    assert reducer._shall_drain()
    assert reducer._patience == 60.0
