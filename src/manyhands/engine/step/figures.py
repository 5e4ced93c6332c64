"""The figures of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manyhands.formatting import format_seconds
from manyhands.validation import TRAINED

if TYPE_CHECKING:  # listeners must not import torch
    from manyhands.metrics.metric import Figure


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one evaluation. They are the same on every worker, and for any number of workers.

    set: the name of the data. step: the number of steps that were complete. loss: the weighted mean of the loss; None
    if no sample counts. weight: the sum of the weights. samples, samples_in_data: how many samples were used, and how
    many the data have. metrics: the figures by name; None for a figure to which no sample counts. weights: "trained",
    or "ema" for the average of the weights. seconds: the time on this worker. not_computed: why metrics could not be
    computed in a trial, by name.
    """

    set: str
    step: int
    loss: float | None
    weight: float
    samples: int
    samples_in_data: int
    metrics: dict[str, Figure] = field(default_factory=dict)
    weights: str = TRAINED
    seconds: float = field(default=0.0, compare=False, repr=False)
    not_computed: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON values, without the time that they took."""
        return {
            "step": self.step,
            "set": self.set,
            **({} if self.weights == TRAINED else {"weights": self.weights}),
            "loss": self.loss,
            **self.metrics,
            "weight": self.weight,
            "samples": self.samples,
        }

    def __str__(self) -> str:
        """Describe the figures in one line."""
        shown = [f"{name.partition('.')[2]} {_shown(value)}" for name, value in self.numbers.items()][:12]
        of = "" if self.samples == self.samples_in_data else f" of {self.samples_in_data:,}"
        samples = f"{self.samples:,}{of} sample{'' if self.samples_in_data == 1 else 's'}"
        return f"step {self.step}: {self.set} {', '.join(shown)} ({samples}, {format_seconds(self.seconds)})"

    @property
    def name(self) -> str:
        """Return the text before the names of the figures: the set, and "ema" for the average of the weights."""
        return self.set if self.weights == TRAINED else f"{self.set}.{self.weights}"

    @property
    def numbers(self) -> dict[str, float | None]:
        """Return the single numbers by their full names, such as "validation.loss", "validation.f1.0" and
        "validation.ema.loss".
        """
        found: dict[str, float | None] = {}

        def add(name: str, figure: Figure) -> None:
            if isinstance(figure, Mapping):
                for key, each in figure.items():
                    add(f"{name}.{key}", each)
            elif figure is None or isinstance(figure, (int, float)):
                found[name] = figure

        add(self.name, {"loss": self.loss, **self.metrics})
        return found


def _shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"
