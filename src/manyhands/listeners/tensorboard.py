"""TensorBoard event files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.listener import Listener
from manyhands.listeners.summary import Summary

RETRY_SECONDS = 60.0
"""The time after an error until the next attempt to write."""


class TensorBoardListener(Listener):
    """Writes a run's curves into `directory`. Does nothing if tensorboard isn't installed.

    Curves: loss, gradient_norm, learning_rate (one per param group), throughput (tokens or samples per second),
    seconds by phase, the loss function's metrics, the figures of validations. When a run resumes, TensorBoard no longer
    shows the points that an earlier process wrote for later steps.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._writer: Any = None
        self._directory, self._purge_step = str(directory), 0
        self._failed: OSError | None = None
        self._failed_at = 0.0

    def began(self, facts: Mapping[str, Any]) -> None:
        """Begin a file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._make_writer = SummaryWriter
        self._purge_step = facts["step"] + 1 if facts["step"] else 0
        with suppress(OSError):  # the next `step` raises the same error
            self._attempt(self._open)

    def _open(self) -> None:
        is_new = not os.path.isdir(self._directory) or not os.listdir(self._directory)
        self._writer = self._make_writer(self._directory, purge_step=None if is_new else self._purge_step)

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Add the points of one step. Raises OSError if they can't be written, for example because the disk is full.

        After an error, the points of the next minute are lost. Then `step` begins a new file.
        """
        if metrics.skipped:
            return
        if self._failed is not None:
            if time.monotonic() - self._failed_at < RETRY_SECONDS:
                raise self._failed.with_traceback(None)  # otherwise each step would add to the error's traceback
            self._failed, self._purge_step = None, metrics.step
            self._attempt(self._open)
        if self._writer is not None:
            self._attempt(lambda: self._add(metrics))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Add the points of a validation. Raises OSError as `step` does."""
        points = {name.replace(".", "/", 1): value for name, value in evaluation.numbers.items()}
        if self._writer is not None:
            self._attempt(lambda: self._add_points(points, evaluation.step))

    def _add_points(self, points: Mapping[str, float | None], step: int) -> None:
        # One event with all points takes a tenth of the time of one event per point, as written by `add_scalar`.
        from tensorboard.compat.proto.summary_pb2 import Summary as Event

        values = [Event.Value(tag=name, simple_value=value) for name, value in points.items() if value is not None]
        self._writer.file_writer.add_summary(Event(value=values), step)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._failed, self._failed_at = error, time.monotonic()
            self.close()
            raise

    def close(self) -> None:
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
        group = metrics.prefix.replace(".", "/")
        self._add_points({f"{group}{name}": value for name, value in points.items()}, metrics.step)

    def ended(self, summary: Summary) -> None:
        """Write pending points, unless they can't be written."""
        self.close()
