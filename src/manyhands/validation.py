"""Validation: data on which a model is evaluated during a run, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manyhands.errors import ConfigError
from manyhands.intervals import Period
from manyhands.options import check_options, option, options
from manyhands.streams import stream_of

if TYPE_CHECKING:
    from torch import nn

TRAINED, AVERAGED = "trained", "ema"
"""The weights that can be validated and exported: those that the last step left, and their average."""


@options
class Validation:
    """Data on which the model is evaluated during a run, and when. A validation changes no bit of the training.

    All workers share its micro-batches, and the figures are the same to the last bit for any number of workers. The
    recipe's loss is always among them. Raises ConfigError.
    """

    data: Any = option(in_toml=False, help="A map-style torch Dataset.")
    metrics: Sequence[Any] | Mapping[str, Any] = option(
        default=(),
        in_toml=False,
        help="Figures beside the loss: names (accuracy), metrics (manyhands.metrics.f1(...)), or functions "
        "(output, batch) -> (sum, weight), where output is what the model returned in the loss function. In a mapping, "
        "the keys are the names of the figures.",
    )
    every: str = option(
        default="1 epoch",
        help="When to validate: '500 steps', '1 epoch', '0.25 epoch'. The end of the run is always validated.",
    )
    batch: int | None = option(
        default=None, at_least=1, help="Samples in one micro-batch. None: the micro_size of the recipe's batch."
    )
    samples: int | None = option(
        default=None,
        at_least=1,
        help="The number of samples to use, drawn once with the seed; all if there are fewer. None: all samples.",
    )
    at_start: bool = option(default=False, help="Also validate before the first step.")
    weights: str = option(
        default=TRAINED,
        choices=(TRAINED, AVERAGED, "both"),
        help="The weights to validate. trained: those that the last step left; ema: their average, whatever its "
        "kind; both: "
        "one after the other. Figures of the average are called validation.ema.loss, for example. "
        "Before the average begins, they are those of the trained weights.",
    )
    patience: int | None = option(
        default=None,
        at_least=1,
        help="Stop the run after this many validations without an improvement of the figure `watch`. None: never.",
    )
    watch: str = option(
        default="loss:min", help="The figure for `patience`, and whether the smallest or the largest value is the best."
    )
    min_improvement: float = option(
        default=0.0, at_least=0.0, help="A smaller improvement of the figure `watch` doesn't count for `patience`."
    )
    collate: Callable[[list[Any]], Any] | None = option(
        default=None, in_toml=False, help="Makes a batch from a list of samples. None: the recipe's collate."
    )
    predict: Callable[[nn.Module, Any], Any] | None = option(
        default=None,
        in_toml=False,
        help="(model, batch) -> the output that metrics get. None: what the model returned in the loss function.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if stream_of("validation.data", self.data) is not None:
            raise ConfigError(
                "validation.data is a stream",
                expected="a map-style data set, because a validation needs the number of samples",
                got=type(self.data).__name__,
                hint="take the first samples of a stream once: list(itertools.islice(stream, 1000))",
            )
        self.period  # noqa: B018  (checks `every`)
        for name in ("collate", "predict"):
            value = getattr(self, name)
            if not (value is None or callable(value)):
                raise ConfigError(f"validation.{name} can't be called", expected="a function", got=repr(value))
        if self.patience is None and (self.watch != "loss:min" or self.min_improvement):
            raise ConfigError(
                "validation.watch and validation.min_improvement have no effect without validation.patience",
                expected="patience=3, the number of validations without an improvement that end the run",
                got=f"watch={self.watch!r}, min_improvement={self.min_improvement!r}",
            )
        if isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", (self.metrics,))

    @property
    def period(self) -> Period:
        """Return `every`, parsed."""
        return Period.parsed(self.every, "validation.every")

    @property
    def evaluated_weights(self) -> tuple[str, ...]:
        """Return which weights to evaluate, in order: "trained", "ema" or both."""
        return (TRAINED, AVERAGED) if self.weights == "both" else (self.weights,)

    @property
    def watched(self) -> str:
        """Return `watch`, with the prefix of the average's figures if only the average is evaluated."""
        prefix = f"{AVERAGED}."
        return self.watch if self.weights != AVERAGED or self.watch.startswith(prefix) else prefix + self.watch
