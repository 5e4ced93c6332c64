"""How often: every so many steps, or after so much time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from manyhands.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_FORM = re.compile(r"(\d+)\s*(steps?|[smh])?")


@dataclass(frozen=True)
class Every:
    """`steps` or `seconds`; the other one is None."""

    steps: int | None = None
    seconds: float | None = None


def every(value: int | str) -> Every:
    """From 500, "500", "500steps", "30s", "10m" or "2h". Raises ConfigError."""
    found = _FORM.fullmatch(str(value).strip())
    if found is None or int(found[1]) < 1:
        raise ConfigError(
            "how often a checkpoint is written can't be read",
            expected="a number of steps or a time: 500, '500steps', '30s', '10m', '2h'",
            got=repr(value),
        )
    number, unit = int(found[1]), found[2]
    return Every(seconds=number * _SECONDS[unit]) if unit in _SECONDS else Every(steps=number)
