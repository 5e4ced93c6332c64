"""TensorBoard event files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from manyhands.engine.step.metrics import StepMetrics

RETRY_SECONDS = 60.0
"""The time after an error until the next attempt to write."""


class TensorBoardLog:
    """Writes a run's curves into `directory`. Does nothing if tensorboard isn't installed.

    Curves: loss, gradient_norm, learning_rate (one per param group), throughput (tokens or samples per second),
    seconds by phase, the loss function's metrics. When a run resumes, TensorBoard no longer shows the points that an
    earlier process wrote for `start_step` and later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int = 0) -> None:
        self._writer: Any = None
        self._directory, self._start_step = str(directory), start_step
        self._failed: OSError | None = None
        self._failed_at = 0.0
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._make_writer = SummaryWriter
        with suppress(OSError):  # the next `write` raises the same error
            self._attempt(self._open)

    def _open(self) -> None:
        self._writer = self._make_writer(self._directory, purge_step=self._start_step or None)

    def write(self, metrics: StepMetrics) -> None:
        """Add the points of one step. Raises OSError if they can't be written, for example because the disk is full.

        After an error, the points of the next minute are lost. Then `write` begins a new file.
        """
        if metrics.skipped:
            return
        if self._failed is not None:
            if time.monotonic() - self._failed_at < RETRY_SECONDS:
                raise self._failed.with_traceback(None)  # or each step would add to its traceback
            self._failed, self._start_step = None, metrics.step
            self._attempt(self._open)
        if self._writer is not None:
            self._attempt(lambda: self._add(metrics))

    def write_points(self, points: Mapping[str, float | None], step: int) -> None:
        """Add one point to each of several curves; a value None has no point. Raises OSError as `write` does."""
        if self._writer is not None:
            self._attempt(lambda: self._add_points(points, step))

    def _add_points(self, points: Mapping[str, float | None], step: int) -> None:
        for name, value in points.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._failed, self._failed_at = error, time.monotonic()
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Close the writer without the points that it could not write."""
        with suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _add(self, metrics: StepMetrics) -> None:
        points = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "seconds/step": metrics.step_seconds}
        points |= {f"metrics/{name}": value for name, value in metrics.metrics.items()}
        for index, rate in enumerate(metrics.learning_rates):
            points["learning_rate" if index == 0 else f"learning_rate/group_{index}"] = rate
        if metrics.step_seconds > 0:
            points[f"throughput/{metrics.unit}_per_second"] = metrics.amount / metrics.step_seconds
        points |= {f"seconds/{phase}": seconds for phase, seconds in metrics.seconds.items()}
        self._add_points(points, metrics.step)

    def close(self) -> None:
        """Write pending points, unless they can't be written. `close` may be called twice."""
        self._abandon()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
