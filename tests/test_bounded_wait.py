"""How long a worker waits for gradients of its peers during a backward."""

from __future__ import annotations

import pytest
from torch import Tensor

from manyhands.comm.group import AllToAll, Recorder
from manyhands.engine.step.reduce import MAX_WAIT_SECONDS, BoundedWait


class Late(AllToAll):
    """An all-to-all that is complete after `checks` checks. Its pieces must not be requested."""

    def __init__(self, checks: float) -> None:
        self.checks = checks

    @property
    def is_complete(self) -> bool:
        self.checks -= 1
        return self.checks <= 0

    def pieces(self) -> list[Tensor]:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError

    def wait_reusable(self) -> None:
        raise NotImplementedError


def test_each_wait_that_times_out_shortens_the_next_one() -> None:
    recorder, never = Recorder(), Late(float("inf"))
    wait = BoundedWait(recorder)
    for seconds in (MAX_WAIT_SECONDS, MAX_WAIT_SECONDS / 10, MAX_WAIT_SECONDS / 100):
        assert not wait.completes(never)
        assert recorder.take()[1] >= seconds  # it counts as waiting
        assert wait.seconds == pytest.approx(seconds / 10)


def test_a_wait_that_succeeds_leaves_the_limit_unchanged() -> None:
    wait = BoundedWait(Recorder(), 60.0)
    assert wait.completes(Late(20))
    assert wait.seconds == 60.0
