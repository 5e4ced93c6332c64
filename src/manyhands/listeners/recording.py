"""Writes the record of a run to its run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.gaps import Gaps
from manyhands.listeners.listener import Listener
from manyhands.listeners.run_directory import RunDirectory


class Recording(Listener):
    """Writes metrics, validations, digests and events. A failed write is reported once, and the run continues.

    hashes: returns the hashes of all blocks that the last digest covers, or None.
    """

    def __init__(self, directory: RunDirectory, gaps: Gaps, hashes: Callable[[], Any]) -> None:
        self._directory, self._gaps, self._hashes = directory, gaps, hashes

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Write the step's metrics, and the table of hashes if the step has a digest."""
        self._gaps.attempt("metrics", partial(self._directory.append_metrics, metrics))
        hashes = None if metrics.digest is None else self._hashes()
        if hashes is not None:
            self._gaps.attempt("digests", partial(self._directory.write_digests, metrics.step, hashes))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write the figures of a validation."""
        self._gaps.attempt("validations", partial(self._directory.append_validation, evaluation.as_json()))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write an event."""
        self._gaps.attempt("events", partial(self._directory.append_event, name, **facts))
