"""The metrics of a step, and a clock that measures its phases.

All values of a step's metrics are the same on every worker, except seconds and bytes, which are per worker. A step's
time is divided into phases, and the time spent waiting for other workers is counted separately. Each worker's seconds
and memory reach the other workers one step later, with the control values of that step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from manyhands.offload.process_memory import resident_bytes

if TYPE_CHECKING:
    from manyhands.comm.group import Recorder

PHASES = ("data", "compute", "communication", "update", "waiting")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one step.

    step: the number of steps made, including this one: 1 for the first step.
    island: the island that made the step; None without islands.
    epoch: the epoch of the step's first sample, counted from 1; None for a stream.
    skipped: True if an amendment skipped the step: there is no loss, no gradient and no weight.
    loss: the weighted mean loss of the global batch.
    weight: the sum of the micro-batches' weights.
    weighted: True if the loss function returned weights, such as numbers of tokens. If not, `weight` counts
    micro-batches.
    metrics: the means of the loss function's named metrics; NaN for a metric whose weight is zero in this step.
    gradient_norm: the 2-norm of the gradient before clipping.
    learning_rates: the learning rate of each param group in this step.
    seconds: seconds spent in each phase (PHASES) on this worker; they add up to about step_seconds.
    bytes_moved: bytes that this worker read from peers, by kind of message (grad, param, control).
    digest: the digest of the weights after the step, or None if it wasn't requested.
    """

    step: int
    island: int | None = None
    epoch: int | None = 1
    skipped: bool = False
    loss: float
    weight: float
    samples: int
    weighted: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    gradient_norm: float
    learning_rates: tuple[float, ...]
    step_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    digest: str | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """Return the numbers of the step by their full names, such as "metrics.accuracy" and "seconds.compute".

        A step that was skipped has no loss, so only its number, epoch and learning rates are returned.
        """
        found: dict[str, float] = {"step": self.step}
        if self.island is not None:
            found["island"] = self.island
        if self.epoch is not None:
            found["epoch"] = self.epoch
        if not self.skipped:
            found |= {"loss": self.loss, "gradient_norm": self.gradient_norm, "samples": self.samples}
            found |= {f"metrics.{name}": value for name, value in self.metrics.items()}
            found["seconds.step"] = self.step_seconds
            if self.step_seconds > 0:
                found[f"{self.unit}_per_second"] = self.amount / self.step_seconds
            found |= {f"seconds.{phase}": seconds for phase, seconds in self.seconds.items()}
        for index, rate in enumerate(self.learning_rates):
            found["learning_rate" if index == 0 else f"learning_rate.group_{index}"] = rate
        return found

    @property
    def prefix(self) -> str:
        """Return the prefix of names for listeners that have one series for each name: "island-2." or nothing."""
        return "" if self.island is None else f"island-{self.island}."

    @property
    def unit(self) -> str:
        """Return the unit of a step's throughput: "tokens" if the weight is a whole number other than the number of
        samples, and otherwise "samples".
        """
        return "tokens" if self.weighted and self.weight % 1 == 0 and self.weight != self.samples else "samples"

    @property
    def amount(self) -> float:
        """Return the number of tokens or samples in the step; see `unit`."""
        return self.weight if self.unit == "tokens" else float(self.samples)


class WorkerFigures(NamedTuple):
    """What one worker measured in a step.

    seconds: seconds spent in each phase (PHASES). memory_bytes: the memory of the process that is in RAM at the end of
    the step, including memory that it shares with other workers.
    """

    seconds: dict[str, float]
    memory_bytes: int


class PhaseClock:
    """Measures seconds and bytes by phase since `begin`. Phases don't nest.

    measured: [1, figures] the seconds by phase and the memory of the previous step; NaN before the first step.
    of_workers: [workers, figures] the same figures for every worker, by rank.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.measured = self.of_workers = np.full((1, len(PHASES) + 1), np.nan)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_moved: dict[str, int] = {}
        self._start = 0.0

    def begin(self) -> None:
        """Start a step: keep the figures of the previous one, and reset all values."""
        if self._start:
            self.measured = np.array([[*self.seconds.values(), resident_bytes()]])
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_moved = {}
        self._recorder.take()  # discard the traffic between steps
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's time to phase `name`. Time spent waiting for peers is added to "waiting" instead."""
        start = time.perf_counter()
        try:
            yield
        finally:
            moved, waited = self._recorder.take()
            for kind, num_bytes in moved.items():
                self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + num_bytes
            self.seconds[name] += time.perf_counter() - start - waited
            self.seconds["waiting"] += waited

    @property
    def workers(self) -> list[WorkerFigures]:
        """Return what each worker measured in the previous step, by rank; an empty list if there was none."""
        rows = self.of_workers.tolist()
        return [
            WorkerFigures(dict(zip(PHASES, seconds, strict=True)), int(memory))
            for *seconds, memory in rows
            if not np.isnan(memory)
        ]

    @property
    def step_seconds(self) -> float:
        """Return the seconds since `begin`."""
        return time.perf_counter() - self._start
