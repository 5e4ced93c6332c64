"""Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.ids import read_id, write_id
from manyhands.listeners.listener import Listener
from manyhands.listeners.summary import Summary


class WandbListener(Listener):
    """Logs a run to Weights & Biases. Needs the package wandb.

    options: arguments of `wandb.init`, such as project="gpt". By default the name of the recipe is the project, and the
    recipe is the config. The run directory keeps the id, so a resumed run continues the same run there, and steps that
    it repeats are not logged twice.
    """

    network = True

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._run: Any = None
        self._has_islands = False

    def began(self, facts: Mapping[str, Any]) -> None:
        """Start the run, or continue it."""
        import wandb

        given = self._options
        run_id = given.get("id") or read_id(facts, "wandb") or secrets.token_hex(8)
        options = {"project": facts["name"], "config": facts["recipe"], "resume": "allow", "reinit": "create_new"}
        options["settings"] = wandb.Settings(console="off")  # the run directory has the output
        self._run = wandb.init(**options | given | {"id": run_id})
        write_id(facts, "wandb", run_id)
        self._run.define_metric("*", step_metric="step")

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Log the step's numbers. W&B ignores numbers for steps that it already has.

        Islands make the same steps one after the other, so their numbers have names and rows of their own.
        """
        self._has_islands = metrics.island is not None
        named = {f"{metrics.prefix}{name}": value for name, value in metrics.numbers.items()}
        self._log(named | {"step": metrics.step}, metrics.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Log the figures of a validation, in the same row as the step."""
        self._log({**evaluation.numbers, "step": evaluation.step}, evaluation.step)

    def _log(self, numbers: Mapping[str, Any], step: int) -> None:
        self._run.log(numbers, step=None if self._has_islands else step)

    def ended(self, summary: Summary) -> None:
        """Finish the run."""
        self._run.summary.update({"digest": summary.digest, "outcome": summary.outcome})
        self._run.finish(exit_code=0 if summary.outcome == "completed" else 1)
