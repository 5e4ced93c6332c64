"""Amendments of a run in progress: steps to skip, and settings that change from a given step on.

The recipe and the amendments determine the bits, so a checkpoint lists the amendments with which it was computed. Steps
have the numbers that users see, which start with 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from manyhands.errors import ConfigError
from manyhands.options import real_number, whole_number

CLIP_NORM = "clip_norm"


class Change(NamedTuple):
    """From step `step` on, the setting `key` has the value `value`: a number, or a list of numbers."""

    step: int
    key: str
    value: Any

    def __str__(self) -> str:
        return f"from step {self.step} on, {self.key} = {self.value}"


@dataclass(frozen=True)
class Amendments:
    """The skipped steps, in order, and the changes, by step and then in the order in which they were given."""

    skipped: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.skipped or self.changes)

    def up_to(self, step: int) -> Amendments:
        """Return the amendments that affect the state after this step."""
        return Amendments(
            tuple(number for number in self.skipped if number <= step),
            tuple(change for change in self.changes if change.step <= step),
        )

    def at(self, step: int) -> list[Change]:
        """Return the changes that take effect at step `step`."""
        return [change for change in self.changes if change.step == step]

    def of_optimizers(self, step: int) -> dict[str, Any]:
        """Return the settings of optimizers that change at step `step`, with their new values, in the order given."""
        return {change.key: change.value for change in self.at(step) if change.key != CLIP_NORM}

    def joined(self, later: Amendments) -> Amendments:
        """Return these amendments and `later` combined.

        If both change a setting at the same step, `later` takes precedence.
        """
        changes = {(change.step, change.key): change for change in (*self.changes, *later.changes)}
        return Amendments(
            tuple(sorted({*self.skipped, *later.skipped})),
            tuple(sorted(changes.values(), key=lambda change: change.step)),
        )

    def clip_norm(self, step: int, of_recipe: float | None) -> float | None:
        """Return the norm to which gradients are clipped in step `step`."""
        amended = [change.value for change in self.changes if change.key == CLIP_NORM and change.step <= step]
        return amended[-1] if amended else of_recipe

    def by_step(self) -> dict[int, dict[str, Any]]:
        """Return the changes as step -> setting -> value."""
        found: dict[int, dict[str, Any]] = {}
        for change in self.changes:
            found.setdefault(change.step, {})[change.key] = change.value
        return found

    def as_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes an equal object."""
        return {"skipped_steps": list(self.skipped), "changes": [list(change) for change in self.changes]}

    @classmethod
    def from_json(cls, value: Any) -> Amendments:
        """Return the amendments that `as_json` encoded, or none for {}. Raises ConfigError."""
        try:
            changes: dict[int, dict[str, Any]] = {}
            for step, key, new in value.get("changes", ()):
                changes.setdefault(step, {})[key] = new
            return amendments_of(value.get("skipped_steps", ()), changes)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError("the amendments of a run can't be read", got=f"{value!r} ({error})"[:200]) from None

    def described(self) -> list[str]:
        """Return one line of text for each amendment."""
        return [*(f"step {step} is skipped" for step in self.skipped), *map(str, self.changes)]


def amendments_of(skip_steps: Iterable[int], changes: Mapping[int, Mapping[str, Any]]) -> Amendments:
    """Check the values that a user gave, and return them as amendments. changes: step -> setting -> value. Raises
    ConfigError.

    `optim.amending` checks whether the optimizers have the settings.
    """
    found = []
    for step, settings in changes.items():
        for key, value in settings.items():
            plain = [real_number(each) for each in value] if isinstance(value, (list, tuple)) else real_number(value)
            if plain is None or (isinstance(plain, list) and None in plain) or not isinstance(key, str):
                raise ConfigError(
                    f"the amendment {key} is not a number", expected="a number, or a list of numbers", got=repr(value)
                )
            if key == CLIP_NORM and (isinstance(plain, list) or not plain >= 0.0):
                raise ConfigError(f"{key} is out of range", expected="a number of at least 0.0", got=repr(value))
            found.append(Change(_step(step), key, plain))
    return Amendments().joined(Amendments(tuple(map(_step, skip_steps)), tuple(found)))


def _step(value: object) -> int:
    step = whole_number(value)
    if step is None or step < 1:
        raise ConfigError("a step is out of range", expected="an integer; the first step is step 1", got=repr(value))
    return step
