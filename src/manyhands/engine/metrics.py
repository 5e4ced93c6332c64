"""What one step reports: plain numbers, the same on every worker but for the seconds and bytes, which are its own."""

from __future__ import annotations

from dataclasses import dataclass, field

PHASES = ("data", "compute", "exchange", "update", "waiting")


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
