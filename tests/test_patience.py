"""When a worker waits, in the midst of a backward, for gradients of the others."""

from __future__ import annotations

import pytest
from torch import Tensor

from manyhands.comm.group import AllToAll, Recorder
from manyhands.engine.step.reduce import PATIENCE_SECONDS, BoundedWait


class Late(AllToAll):
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
    recorder, never = Recorder(), Late(float("inf"))
    patience = BoundedWait(recorder)
    for seconds in (PATIENCE_SECONDS, PATIENCE_SECONDS / 10, PATIENCE_SECONDS / 100):
        assert not patience.completes(never)
        assert recorder.take()[1] >= seconds  # it counts as waiting
        assert patience.seconds == pytest.approx(seconds / 10)


def test_what_comes_soon_is_awaited() -> None:
    patience = BoundedWait(Recorder(), 60.0)
    assert patience.completes(Late(20))
    assert patience.seconds == 60.0
