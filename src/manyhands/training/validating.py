"""Validates during a run, and decides what follows: the best checkpoint, learning rates, and an early stop.

After a step the order is always the same: update, record, validate, decide, checkpoint. The state of the decisions is
in `engine.progress`, which checkpoints contain. So a run that was killed and resumed makes the same decisions as an
uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from manyhands.comm.agreement import agree
from manyhands.engine.step.figures import Evaluation
from manyhands.errors import ConfigError
from manyhands.options import nearest
from manyhands.training.engine import Engine
from manyhands.validation import Validation


class Watched(NamedTuple):
    """A figure of a validation, and whether the smallest or the largest value is the best."""

    name: str
    smallest: bool

    @classmethod
    def parsed(cls, text: object, what: str) -> Watched:
        """Parse "validation.loss:min". what: the name of the option, for errors. Raises ConfigError."""
        name, _, direction = str(text).rpartition(":")
        if not isinstance(text, str) or direction not in ("min", "max") or not name:
            raise ConfigError(
                f"{what} can't be parsed",
                expected="the name of a figure, and whether the smallest or the largest value is the best: "
                "'validation.loss:min', 'validation.accuracy:max'",
                got=repr(text),
            )
        return cls(name, direction == "min")

    def is_better(self, value: float | None, than: float | None, by: float = 0.0) -> bool:
        """Return True if `value` is better than `than` by more than `by`. NaN and None are never better."""
        if value is None or math.isnan(value):
            return False
        if than is None:
            return True
        return value < than - by if self.smallest else value > than + by

    def __str__(self) -> str:
        return f"{self.name}:{'min' if self.smallest else 'max'}"


class Validations:
    """The validations of a run. All methods are collective.

    steps: the number of steps of the run. keep_best: the figures whose best checkpoint is kept. record: called with
    each evaluation. report: called with messages for people. event: called with the name of an event and its facts.
    last: the last evaluation of each set, and of each set with the average of the weights, by name.
    """

    def __init__(
        self,
        engine: Engine,
        steps: int,
        keep_best: str | Sequence[str],
        record: Callable[[Evaluation], None],
        report: Callable[[str], None],
        event: Callable[..., None] = lambda event, **facts: None,
    ) -> None:
        self._engine, self._steps, self._record, self._report = engine, steps, record, report
        self._event, self._given = event, engine.recipe.validations
        keep_best = [keep_best] if isinstance(keep_best, str) else keep_best
        self._keep_best = [Watched.parsed(text, "keep_best") for text in keep_best]
        self._patient = {
            name: (Watched.parsed(f"{name}.{each.watched}", f"{name}.watch"), each.patience)
            for name, each in self._given.items()
            if each.patience is not None
        }
        self._schedule_on = engine.recipe.schedule_on
        self.last: dict[str, Evaluation] = {}
        if self._keep_best and not self._given:
            raise ConfigError(
                "keep_best needs a validation",
                expected="a recipe with validation=manyhands.Validation(...)",
                got=", ".join(map(str, keep_best)),
            )

    @property
    def stop_reason(self) -> str | None:
        """Return why no further step is made, or None."""
        for watched, patience in self._patient.values():
            without = self._engine.progress.get("patience", {}).get(str(watched), {}).get("without", 0)
            if without >= patience:
                plural = "" if without == 1 else "s"
                return f"stopped early: {watched.name} has not improved for {without} validation{plural}"
        return None

    def described(self) -> list[str]:
        """Describe in one line when validations are made, and what follows from them."""
        found = []
        for name, each in self._given.items():
            watched = None if each.patience is None else self._patient[name][0]
            plural = "" if each.patience == 1 else "s"
            stops = f" until {watched.name} has not improved for {each.patience} validation{plural}" if watched else ""
            found.append(f"{name} every {each.every.strip()} and at the end{stops}")
        found += [f"the checkpoint with the best {watched.name} is kept" for watched in self._keep_best]
        return ["; ".join(found)] if found else []

    def begin(self) -> bool:
        """Try one micro-batch of each set, and make the validations that are due before the next step.

        A validation after the last step may be missing, because the run was stopped before it. Returns True if the
        present step is the best, so that its checkpoint, which may not be written yet, must be kept. Raises ConfigError
        if the workers have different data, or if a figure that is watched doesn't exist.
        """
        self._note_patience()
        if not self._given:
            return False
        values: dict[str, float | None] = {}
        for name, validation in self._given.items():
            agree(
                self._engine.group,
                f"data of the validation {name}",
                self._engine.facts_of_validation(name),
                hint="give every worker all of the data, which Manyhands divides itself",
            )
            for weights in validation.evaluated_weights:
                trial = self._engine.validate(name, weights=weights, micro_batches=1)
                values |= trial.numbers
                for metric, why in trial.not_computed.items():
                    self._report(
                        f"{trial.name}.{metric} can't be computed from the micro-batch that is tried first: {why}"
                    )
        for figure in (*(each.name for each in self._keep_best), *filter(None, [self._schedule_on])):
            _figure(figure, values)
        for name, (watched, _) in self._patient.items():
            _figure(watched.name, values, watched_in=name)
        step = self._engine.step_index
        if self._engine.progress.get("validated") != step:
            given = self._given.items()
            self._validate({name: each for name, each in given if self._is_due(each, step) and (step or each.at_start)})
        return any(each["step"] == step for each in self.best.values())

    def _note_patience(self) -> None:
        """Record a patience that has changed since the last checkpoint, because it decides the number of steps."""
        before = self._engine.progress.get("patience options", {})
        now = {
            name: f"{each.patience} validations without a better {each.watched} by {each.min_improvement:g}"
            for name, each in self._given.items()
            if each.patience is not None
        }
        if self._engine.step_index:
            for name in dict.fromkeys([*before, *now]):
                if before.get(name) != now.get(name):
                    old, new = before.get(name, "none"), now.get(name, "none")
                    self._event("patience changed", step=self._engine.step_index, set=name, before=old, after=new)
                    self._report(f"the patience of {name} has changed: {new}; it was: {old}")
        if before or now:
            self._engine.progress["patience options"] = now

    def after_step(self) -> bool:
        """Make the validations that are due. Return True if the checkpoint of this step is to be kept as the best."""
        step = self._engine.step_index
        return self.after_steps(range(step, step + 1))

    def after_steps(self, steps: range) -> bool:
        """Make the validations that were due after one of these steps, the last of which was just made.

        Return True if the checkpoint of the last step is to be kept as the best.
        """
        given = self._given.items()
        return self._validate({name: each for name, each in given if any(self._is_due(each, step) for step in steps)})

    def _is_due(self, validation: Validation, step: int) -> bool:
        return step == self._steps or self._is_regular(validation, step)

    def _is_regular(self, validation: Validation, step: int) -> bool:
        """Return True if a validation is due after `step` steps, however many steps the run has."""
        return step == 0 or validation.period.ends_with(step, self._engine.epochs.complete_after)

    def _validate(self, due: dict[str, Validation]) -> bool:
        found = [
            self._engine.validate(name, weights=weights)
            for name, validation in due.items()
            for weights in validation.evaluated_weights
        ]
        for each in found:
            self._record(each)
        self.last |= {each.name: each for each in found}
        if not found:
            return False
        progress = self._engine.progress
        progress["validated"] = self._engine.step_index
        values = {name: value for each in found for name, value in each.numbers.items()}
        best = progress.setdefault("best", {})
        is_best = False
        for watched in self._keep_best:
            if watched.name.partition(".")[0] in due:
                before, value = best.get(str(watched)), _figure(watched.name, values)
                if watched.is_better(value, before and before["value"]):
                    best[str(watched)] = {"step": self._engine.step_index, "value": value}
                    is_best = True
        if self._engine.recipe.validation_of_schedule in due:
            self._advance_schedules(values)
        for name, validation in due.items():
            # A validation that is made only because the run ends must not count, as for schedules.
            if validation.patience is not None and self._is_regular(validation, self._engine.step_index):
                self._count_for_patience(name, validation, values)
        return is_best

    def _advance_schedules(self, values: dict[str, float | None]) -> None:
        """Give the schedules the figure that they need.

        A validation that is made only because the run ends must not count: if the run continues later, its learning
        rates must be those of a run that was longer from the start.
        """
        validation = self._given[self._engine.recipe.validation_of_schedule]
        if self._schedule_on is not None and self._is_regular(validation, self._engine.step_index):
            self._engine.advance_schedules(_figure(self._schedule_on, values))

    def _count_for_patience(self, name: str, validation: Validation, values: dict[str, float | None]) -> None:
        """Count the validations since the watched figure last improved. `stop_reason` compares them with `patience`."""
        watched, _ = self._patient[name]
        states = self._engine.progress.setdefault("patience", {})
        state: dict[str, Any] = states.setdefault(str(watched), {"value": None, "without": 0})
        value = _figure(watched.name, values)
        if watched.is_better(value, state["value"], validation.min_improvement):
            state |= {"value": value, "without": 0}
        else:
            state["without"] += 1

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """Return the step and the value of the best checkpoint for each figure of keep_best."""
        found: dict[str, dict[str, Any]] = self._engine.progress.get("best", {})
        return {name: found[name] for name in map(str, self._keep_best) if name in found}


def _figure(name: str, values: dict[str, float | None], *, watched_in: str = "") -> float | None:
    """Return a figure by its name. Return None if its metric could not be computed.

    values: the numbers of evaluations, by their full names. watched_in: the validation whose `watch` names the figure.
    `watch` leaves out the name of its validation. Raises ConfigError if there is no such figure.
    """
    part = name
    while part:
        if part in values and (part == name or values[part] is None):
            return values[part]
        part = part.rpartition(".")[0]
    if watched_in:
        prefix = f"{watched_in}."
        given = name.removeprefix(prefix)
        known = [each.removeprefix(prefix) for each in values if each.startswith(prefix)]
        raise ConfigError(
            f"there is no figure {name}",
            expected=f"in {prefix}watch, the name of a figure of this validation, without {prefix!r}",
            got=repr(given),
            hint=nearest(given.removeprefix(prefix), known),
        )
    raise ConfigError(
        f"there is no figure {name}",
        expected="the name of a figure of a validation",
        got=repr(name),
        hint=nearest(name, values),
    )
