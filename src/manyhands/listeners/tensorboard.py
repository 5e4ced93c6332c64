"""TensorBoard event files."""

from __future__ import annotations

import os
from typing import Any

from manyhands.engine.step.metrics import StepMetrics


class TensorBoardLog:
    """Writes a run's curves into `directory`. Does nothing if tensorboard isn't installed.

    Curves: loss, gradient_norm, learning_rate (one per param group), throughput (tokens or samples per second),
    seconds by phase, the loss function's metrics. When a run resumes, TensorBoard no longer shows the points that an
    earlier process wrote for `start_step` and later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(directory), purge_step=start_step or None)

    def write(self, metrics: StepMetrics) -> None:
        """Add the points of one step."""
        if self._writer is None or metrics.skipped:
            return
        points = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "seconds/step": metrics.step_seconds}
        points |= {f"metrics/{name}": value for name, value in metrics.metrics.items()}
        for index, rate in enumerate(metrics.learning_rates):
            points["learning_rate" if index == 0 else f"learning_rate/group_{index}"] = rate
        if metrics.step_seconds > 0:
            points[f"throughput/{metrics.unit}_per_second"] = metrics.amount / metrics.step_seconds
        points |= {f"seconds/{phase}": seconds for phase, seconds in metrics.seconds.items()}
        for name, value in points.items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Write pending points. `close` may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
