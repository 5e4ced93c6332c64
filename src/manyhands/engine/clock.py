"""Where a step's time goes: phases of one worker, with the waiting for others taken out of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from manyhands.comm.record import Recorder
from manyhands.engine.metrics import PHASES


class PhaseClock:
    """Seconds by phase since `begin`; phases don't nest."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_moved: dict[str, int] = {}
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_moved = {}
        self._recorder.take()
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside for `name`, but for the waits, which count for "waiting"."""
        began = time.perf_counter()
        try:
            yield
        finally:
            moved, waited = self._recorder.take()
            for kind, num_bytes in moved.items():
                self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + num_bytes
            self.seconds[name] += time.perf_counter() - began - waited
            self.seconds["waiting"] += waited

    @property
    def step_seconds(self) -> float:
        """Since `begin`."""
        return time.perf_counter() - self._began
