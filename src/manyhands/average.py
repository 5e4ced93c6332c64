"""Average: an average of the weights over the steps of a run."""

from __future__ import annotations

from manyhands.errors import ConfigError
from manyhands.options import check_options, option, options

KINDS = ("ema", "swa")

DECAY = 0.999
"""The decay of an exponential moving average if none is given."""


@options
class Average:
    """An average of the weights over the steps of a run. It changes no bit of the training. Raises ConfigError.

    It begins with the weights after `start` steps, which are the initial weights if `start` is 0. It is stored in fp32,
    whatever the precision. Buffers, such as batch norm's running statistics, are not averaged.
    """

    kind: str = option(
        default="ema",
        choices=KINDS,
        kw_only=False,
        help="ema: an exponential moving average, decay * average + (1 - decay) * weights; swa: the mean of the "
        "weights, each counted once.",
    )
    decay: float | None = option(
        default=None,
        at_least=0.0,
        at_most=1.0,
        help=f"The share of the average that an update keeps. For ema only. None: {DECAY}.",
    )
    start: int = option(default=0, at_least=0, help="The number of steps after which the average begins.")
    every: int = option(default=1, at_least=1, help="The number of steps between two updates of the average.")
    warmup: bool = option(
        default=False,
        help="Begin with a smaller decay: update n uses the smaller of decay and (1 + n) / (10 + n). For ema only.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not isinstance(self.warmup, bool):
            raise ConfigError("average.warmup has the wrong type", expected="True or False", got=repr(self.warmup))
        if self.kind == "swa" and (self.decay is not None or self.warmup):
            raise ConfigError(
                "average.decay and average.warmup have no meaning for the mean of the weights",
                expected="neither of them with kind = swa",
                got=str(self),
                hint="leave them out, or use kind = ema",
            )

    def is_due(self, step: int) -> bool:
        """Return True if the average is updated after `step` steps."""
        return step > self.start and (step - self.start) % self.every == 0

    def rate(self, count: int) -> float:
        """Return the share of the weights in the next update. count: the number of weights in the average so far."""
        if self.kind == "swa":
            return 1 / (count + 1)
        decay = DECAY if self.decay is None else self.decay
        return 1 - (min(decay, (1 + count) / (10 + count)) if self.warmup else decay)

    def __str__(self) -> str:
        """Describe the average in one line."""
        decay = f", decay {DECAY if self.decay is None else self.decay}" if self.kind == "ema" else ""
        return f"{self.kind}{decay}, start {self.start}, every {self.every}{', warmup' if self.warmup else ''}"


def check_average(average: object, ema: float | None) -> None:
    """Check a recipe's options `average` and `ema`. Raises ConfigError."""
    if not (average is None or isinstance(average, Average)):
        raise ConfigError("recipe.average has the wrong type", expected="manyhands.Average(...)", got=repr(average))
    if average is not None and ema is not None:
        raise ConfigError(
            "both recipe.ema and recipe.average are set",
            expected="one of them",
            got=f"ema = {ema}, average = {average}",
        )
