"""Waiting for an exchange that may not come as long as this worker waits for it."""

from __future__ import annotations

import time

from manyhands.comm.group import Exchange
from manyhands.comm.record import Recorder

PATIENCE_SECONDS = 1.0
LOOK_SECONDS = 0.0002


class Patience:
    """Each time that waiting was in vain, a tenth of it from then on. seconds: that an exchange is awaited by now."""

    def __init__(self, recorder: Recorder, seconds: float = PATIENCE_SECONDS) -> None:
        self._recorder, self.seconds = recorder, seconds

    def completes(self, exchange: Exchange) -> bool:
        """Whether it is complete soon."""
        began = time.monotonic()
        while not (complete := exchange.is_complete) and time.monotonic() < began + self.seconds:
            time.sleep(LOOK_SECONDS)
        self._recorder.waited(time.monotonic() - began)
        if not complete:
            self.seconds /= 10
        return complete
