"""What a step reports, and where its time went.

What one step reports: plain numbers, the same on every worker but for the seconds and bytes, which are its own.

Where a step's time goes: phases of one worker, with the waiting for others taken out of each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands.comm.group import Recorder

PHASES = ("data", "compute", "communication", "update", "waiting")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step's figures.

    loss: the global batch's weighted mean loss. weight: the sum of the micro-batches' weights; weighted: whether the
    loss function gave them (tokens, say), else it's the number of micro-batches. gradient_norm: 2-norm before clipping.
    learning_rates: one per param group, as used in this step. seconds: by phase (PHASES) on this worker; they add up
    to step_seconds. bytes_moved: by kind of message (grad, param, control) that this worker read from others.
    digest: SHA-256 of the master weights after the step, or None if it wasn't asked for.
    """

    step: int
    loss: float
    weight: float
    samples: int
    weighted: bool = False
    gradient_norm: float
    learning_rates: tuple[float, ...]
    step_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    digest: str | None = None

    @property
    def unit(self) -> str:
        """What a step's throughput is counted in."""
        return "tokens" if self.weighted else "samples"

    @property
    def amount(self) -> float:
        """How many of `unit` the step saw."""
        return self.weight if self.weighted else float(self.samples)


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
