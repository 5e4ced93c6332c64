"""MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.ids import read_id, write_id
from manyhands.listeners.listener import Listener
from manyhands.listeners.summary import Summary


class MLflowListener(Listener):
    """Logs a run to MLflow. Needs the package mlflow, or mlflow-skinny.

    tracking_uri: the server; by default, what MLflow itself uses. experiment: by default, the name of the recipe. The
    run directory keeps the id, so a resumed run continues the same run there, and steps that it repeats are not logged
    twice.
    """

    network = True

    def __init__(self, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        self._tracking_uri, self._experiment = tracking_uri, experiment
        self._client: Any = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}

    def began(self, facts: Mapping[str, Any]) -> None:
        """Start the run, or continue it."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        self._client = client = MlflowClient(self._tracking_uri)
        known = read_id(facts, "mlflow")
        if known is not None:
            self._run_id = client.get_run(known).info.run_id
            client.update_run(self._run_id, "RUNNING")
            return
        name = self._experiment or facts["name"]
        experiment = client.get_experiment_by_name(name)
        experiment_id = client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run_id = client.create_run(experiment_id, run_name=facts["name"]).info.run_id
        write_id(facts, "mlflow", self._run_id)
        self._last_steps = {"loss": 0}
        params = [Param(_key(key), value[:MAX_PARAM_VAL_LENGTH]) for key, value in flattened(facts["recipe"])]
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            client.log_batch(self._run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Log the step's numbers."""
        if not metrics.skipped:
            named = {f"{metrics.prefix}{name}": value for name, value in metrics.numbers.items()}
            self._log(f"{metrics.prefix}loss", named, metrics.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Log the figures of a validation."""
        self._log(f"{evaluation.set}.loss", evaluation.numbers, evaluation.step)

    def ended(self, summary: Summary) -> None:
        """Finish the run."""
        self._client.set_tag(self._run_id, "digest", summary.digest)
        status = {"completed": "FINISHED", "interrupted": "KILLED"}.get(summary.outcome, "FAILED")
        self._client.set_terminated(self._run_id, status)

    def _log(self, first: str, numbers: Mapping[str, float | None], step: int) -> None:
        """Log numbers, unless the run already has the first one for this step: MLflow would keep both."""
        from mlflow.entities import Metric
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH

        if first not in self._last_steps:
            history = self._client.get_metric_history(self._run_id, _key(first))
            self._last_steps[first] = max((point.step for point in history), default=-1)
        if step <= self._last_steps[first]:
            return
        now = int(time.time() * 1000)
        points = [Metric(_key(name), value, now, step) for name, value in numbers.items() if value is not None]
        for start in range(0, len(points), MAX_METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=points[start : start + MAX_METRICS_PER_BATCH])
        self._last_steps[first] = step


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values in nested mappings as text, with names such as "batch.global_size"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _key(name: str) -> str:
    """Replace the characters that MLflow refuses in names."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)
