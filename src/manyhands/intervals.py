"""The numbers of steps, and intervals and the length of a run: in steps, epochs or time.

`every` parses the interval between two checkpoints, and `Period` the one between two validations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from manyhands.errors import ConfigError


def step_number(index: int) -> int:
    """Return the number of the step with this index: the step with index 0 is step 1.

    Users see numbers: after step n, n steps have been made, and step 0 is the state before the first step. Seeds and
    the order of the samples are derived from the index, which is the number of the steps before this one. This
    function and its inverse, `index_of_step`, are the only places that decide how the two differ.
    """
    return index + 1


def index_of_step(number: int) -> int:
    """Return the index of the step with this number."""
    return number - 1


_SECONDS = {"s": 1, "m": 60, "h": 3600}

_INTERVAL = re.compile(r"(\d+)\s*(steps?|[smh])?")


@dataclass(frozen=True)
class Every:
    """An interval, either in `steps` or in `seconds`. The other value is None."""

    steps: int | None = None
    seconds: float | None = None


def every(value: int | str) -> Every:
    """Parse 500, "500", "500steps", "30s", "10m" or "2h". Raises ConfigError."""
    found = _INTERVAL.fullmatch(str(value).strip())
    if found is None or int(found[1]) < 1:
        raise ConfigError(
            "the interval between checkpoints can't be parsed",
            expected="a number of steps or a time: 500, '500steps', '30s', '10m', '2h'",
            got=repr(value),
        )
    number, unit = int(found[1]), found[2]
    return Every(seconds=number * _SECONDS[unit]) if unit in _SECONDS else Every(steps=number)


_PERIOD = re.compile(r"(\d+(?:\.\d+)?)\s*(steps?|epochs?)")


@dataclass(frozen=True)
class Period:
    """A period of a run, either in `steps` or in `epochs`. The other value is None."""

    steps: int | None = None
    epochs: Fraction | None = None

    @classmethod
    def parsed(cls, text: object, name: str) -> Period:
        """Parse "500 steps", "1 epoch" or "0.25 epoch". Raises ConfigError, which calls the value `name`."""
        found = _PERIOD.fullmatch(str(text).strip())
        number = Fraction(found[1]) if found is not None else Fraction(0)
        in_steps = found is not None and found[2].startswith("step")
        if not number or (in_steps and number.denominator > 1):
            bare = isinstance(text, (int, float)) or str(text).strip().replace(".", "", 1).isdecimal()
            raise ConfigError(
                f"{name} can't be parsed",
                expected="a whole number of steps, or a number of epochs: '500 steps', '1 epoch', '0.25 epoch'",
                got=repr(text),
                hint=f"say which: '{text} steps' or '{text} epochs'" if bare else None,
            )
        return cls(steps=int(number)) if in_steps else cls(epochs=number)

    def ends_with(self, step: int, epochs_after: Callable[[int], Fraction]) -> bool:
        """Return True if a period ends with step `step`.

        epochs_after: returns the number of epochs that are complete after a number of steps.
        """
        if self.steps is not None:
            return step % self.steps == 0
        length = self.epochs or Fraction(1)
        return epochs_after(step) // length > epochs_after(step - 1) // length


def check_length(steps: int | None, epochs: int | None, where: str | None = None) -> None:
    """Raise ConfigError unless a run has either a number of steps or a number of epochs."""
    if steps is not None and epochs is not None:
        raise ConfigError(
            "both steps and epochs are set",
            where=where,
            expected="one of them",
            got=f"steps = {steps}, epochs = {epochs}",
            hint="for a short trial of a recipe with epochs, use --set epochs=1 (in Python: dataclasses.replace)",
        )
    if steps is None and epochs is None:
        raise ConfigError(
            "the number of steps is not set",
            where=where,
            hint="set steps (--steps N, or steps=N in Python), or set steps or epochs in the recipe",
        )
