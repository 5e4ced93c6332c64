"""Islands: replicas of the model that train by themselves and synchronize their weights every few steps.

The names follow DiLoCo (Douillard et al., arXiv 2311.08105): the steps of an island are *inner* steps, and the update
that follows from the weights of all islands is the *outer* step. A *round* is the inner steps between two outer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from manyhands.errors import ConfigError
from manyhands.options import check_options, option, options, whole_number

BITS = (32, 8, 4, 2)
"""The numbers of bits in which an island's change of a weight can be published."""

INNER_STATES = ("keep", "reset")

EVERY, EVERY_BEFORE_MOMENTUM = 30, 10
"""The numbers of steps in a round, before and after the outer optimizer has momentum, if the recipe gives none."""


@options
class Averaging:
    """The outer step replaces the weights with the mean of the islands' weights."""

    def __str__(self) -> str:
        """Describe the outer optimizer in one line."""
        return "averaging"


@options
class Nesterov:
    """The outer step is a step of SGD with Nesterov momentum against the mean of the islands' changes.

    With g, the mean over the islands of (the weights at the start of the round - the island's weights at its end):
    velocity = momentum * velocity + g, and weights = weights - lr * (g + momentum * velocity). See DiLoCo, algorithm 1.
    Each product and each sum is rounded by itself. Raises ConfigError.
    """

    lr: float = option(default=0.7, at_least=0.0, help="The outer learning rate.")
    momentum: float = option(default=0.9, at_least=0.0, at_most=1.0, help="The share of the velocity that is kept.")

    def __post_init__(self) -> None:
        check_options(self)

    def __str__(self) -> str:
        """Describe the outer optimizer in one line."""
        return f"nesterov, lr {self.lr}, momentum {self.momentum}"


OuterOptimizer = Averaging | Nesterov

_OUTER_NAMES: dict[str, Callable[[], OuterOptimizer]] = {"averaging": Averaging, "nesterov": Nesterov}


@dataclass(frozen=True)
class Round:
    """A round of the islands. Steps are counted as complete: a round from step 30 to step 60 makes steps 31 to 60.

    number: counted from 1. start, end: the number of complete steps at its start and its end. applied: the number of
    complete steps after which an island's weights take in the result; this is before the end of the next round. outer:
    the outer optimizer.
    """

    number: int
    start: int
    end: int
    applied: int
    outer: OuterOptimizer
    is_last: bool


@options
class Islands:
    """Replicas of the model that train by themselves, and synchronize their weights every few steps.

    `Recipe.batch` is one island's step. Each island has samples of its own, which depend on the seed, the island and
    the step. The islands are part of the recipe, because they change bits. Which cluster computes them, and when, does
    not. Raises ConfigError.
    """

    count: int = option(at_least=1, help="The number of islands.")
    every: int | str | Mapping[int, int] = option(
        default="auto",
        help="The number of steps in a round; or numbers of steps by the step from which they hold, such as "
        f"{{0: 10, 300: 30}}. auto: {EVERY_BEFORE_MOMENTUM} before momentum_from, and {EVERY} from then on.",
    )
    bits: int = option(
        default=4,
        at_least=2,
        help="The bits in which an island publishes the change of a weight: 32 (exactly), 8, 4 or 2.",
    )
    outer: str | Mapping[str, float] | OuterOptimizer = option(
        default="auto",
        help="The outer optimizer. averaging, or manyhands.Averaging(): the mean of the islands' weights; nesterov, or "
        "manyhands.Nesterov(lr=0.7, momentum=0.9). auto: averaging until momentum_from, then nesterov. The last round "
        "is averaged in any case.",
    )
    momentum_from: int | None = option(
        default=None,
        at_least=0,
        help="The step from which the outer optimizer has momentum. None: 0 if the recipe has initial weights, "
        "otherwise never, because momentum that starts at random weights makes the result worse.",
    )
    warm_steps: int = option(
        default=0,
        at_least=0,
        help="The number of steps at the start in which one cluster computes the batches of all islands "
        "synchronously. The others join at the first round.",
    )
    inner_state: str = option(
        default="keep",
        choices=INNER_STATES,
        help="The state of an island's optimizer after a round. keep: it continues; reset: it is empty, so that "
        "another cluster needs only the weights to compute the island.",
    )
    error_feedback: bool | str = option(
        default="auto",
        help="Add what the codec rounded away to the change that the island publishes next. auto: with 2 bits only.",
    )
    compress: bool = option(
        default=False,
        help="Compress files without loss (zstd). This pays off on links slower than about 500 Mbit/s.",
    )
    delay: int = option(
        default=0,
        at_least=0,
        help="The number of steps for which an island continues before it takes in a round's result, so that "
        "computing hides the exchange. The last round has no delay.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.bits not in BITS:
            raise ConfigError("islands.bits has an unknown value", expected="32, 8, 4 or 2", got=self.bits)
        object.__setattr__(self, "every", _checked_every(self.every))
        object.__setattr__(self, "outer", _checked_outer(self.outer))
        for name, known in (("compress", (True, False)), ("error_feedback", (True, False, "auto"))):
            value = getattr(self, name)
            if not any(value is each or value == each == "auto" for each in known):
                expected = "True, False or auto" if "auto" in known else "True or False"
                raise ConfigError(f"islands.{name} has the wrong type", expected=expected, got=repr(value))
        if isinstance(self.outer, Averaging) and self.momentum_from is not None:
            raise ConfigError(
                "islands.momentum_from has no effect, because averaging has no momentum",
                expected="outer = auto or nesterov",
                got=f"outer = averaging, momentum_from = {self.momentum_from}",
            )
        if self.every != "auto":
            self._check_delay(_shortest(self.every))
        if self.error_feedback is True and self.bits == 32:
            raise ConfigError(
                "islands.error_feedback has no effect, because 32 bits lose nothing",
                expected="bits = 8, 4 or 2, or no error_feedback",
            )

    def _check_delay(self, shortest: int) -> None:
        """Raise ConfigError if the delay is as long as the shortest round."""
        if self.delay >= shortest:
            raise ConfigError(
                "islands.delay is as long as a round, so a round would begin before the result of the one before the "
                "last is applied",
                expected=f"less than {shortest}, the number of steps in a round",
                got=self.delay,
            )

    @property
    def has_error_feedback(self) -> bool:
        """Return True if an island keeps what the codec rounded away."""
        return self.bits == 2 if self.error_feedback == "auto" else bool(self.error_feedback)

    def momentum_start(self, *, pretrained: bool) -> int | None:
        """Return the step from which the outer optimizer has momentum, or None if it never has.

        pretrained: True if the run does not start from random weights. Raises ConfigError for momentum that would start
        at random weights without being asked for by number.
        """
        if isinstance(self.outer, Averaging):
            return None
        if self.momentum_from is not None:
            return self.momentum_from
        if pretrained:
            return 0
        if isinstance(self.outer, Nesterov):
            raise ConfigError(
                "the outer momentum would start at random weights, where it makes the result worse than that of one "
                "island alone",
                expected="islands.momentum_from, the step from which the outer optimizer has momentum",
                got=f"outer = {self.outer}, and no initial weights",
                hint="set momentum_from to about half of a short run; or start from weights (recipe.weights), or use "
                "outer = auto or averaging; momentum_from = 0 has momentum from the start",
            )
        return None

    def check_recipe(self, unsupported: Mapping[str, bool], *, pretrained: bool) -> None:
        """Raise ConfigError if a recipe can't have islands. unsupported: whether it has these options.

        pretrained: as in `momentum_start`.
        """
        for what in (name for name, is_set in unsupported.items() if is_set):
            raise ConfigError(
                f"islands don't support {what}",
                expected="a recipe without it, or without islands",
                got=f"islands = {self}",
            )
        self._check_delay(_shortest(self.every, momentum_start=self.momentum_start(pretrained=pretrained)))

    def has_momentum(self, *, pretrained: bool) -> bool:
        """Return True if some rounds of a long run have outer momentum."""
        return self.momentum_start(pretrained=pretrained) is not None

    def _length(self, start: int, momentum_start: int | None) -> int:
        if isinstance(self.every, Mapping):
            return self.every[max(step for step in self.every if step <= start)]
        if isinstance(self.every, int):
            return self.every
        return EVERY if momentum_start is not None and start >= momentum_start else EVERY_BEFORE_MOMENTUM

    def rounds(self, steps: int, *, pretrained: bool) -> list[Round]:
        """Return the rounds of a run of `steps` steps, as a function of the recipe and these arguments alone."""
        momentum_start, momentum = self.momentum_start(pretrained=pretrained), self._momentum
        found: list[Round] = []
        start = min(self.warm_steps, steps)
        while start < steps:
            end = min(start + self._length(start, momentum_start), steps)
            following = min(end + self._length(end, momentum_start), steps)
            is_last = end == steps
            has_momentum = momentum_start is not None and end > momentum_start and not is_last
            outer: OuterOptimizer = momentum if has_momentum else Averaging()
            applied = end if is_last else max(end, min(end + self.delay, following - 1))
            found.append(Round(len(found) + 1, start, end, applied, outer, is_last))
            start = end
        return found

    @property
    def _momentum(self) -> Nesterov:
        return self.outer if isinstance(self.outer, Nesterov) else Nesterov()

    def described(self, rounds: Sequence[Round]) -> str:
        """Describe the islands of a run in one line."""
        with_momentum = [each for each in rounds if isinstance(each.outer, Nesterov)]
        lengths = sorted({each.end - each.start for each in rounds[:-1] or rounds})
        sizes = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}" if lengths else "0"
        outer = f"{with_momentum[0].outer} from step {with_momentum[0].start}" if with_momentum else "averaging"
        plural = "" if self.count == 1 else "s"
        return f"{self.count} island{plural}, {len(rounds)} rounds of {sizes} steps, {self.bits} bits, {outer}"

    def __str__(self) -> str:
        """Describe the options that decide bits in one line."""
        return (
            f"{self.count}, every {self.every}, {self.bits} bits, outer {self.outer}, momentum_from "
            f"{self.momentum_from}, warm_steps {self.warm_steps}, inner_state {self.inner_state}, error_feedback "
            f"{self.has_error_feedback}, delay {self.delay}"
        )


def _shortest(every: int | str | Mapping[int, int], momentum_start: int | None = None) -> int:
    """Return the number of steps in the shortest round of a long run. momentum_start: as in `Islands`."""
    if isinstance(every, Mapping):
        return min(every.values())
    if isinstance(every, int):
        return every
    return EVERY if momentum_start == 0 else EVERY_BEFORE_MOMENTUM


def _checked_every(every: object) -> int | str | dict[int, int]:
    """Return `Islands.every` with plain integers. Raises ConfigError."""
    expected = "a number of steps, auto, or a mapping from steps to numbers of steps, such as {0: 10, 300: 30}"
    if every == "auto":
        return "auto"
    if isinstance(every, Mapping):
        steps_from = {_as_step(at): whole_number(steps) or 0 for at, steps in every.items()}
        if 0 in steps_from and None not in steps_from and min(steps_from.values()) >= 1:
            return {at: steps_from[at] for at in sorted(at for at in steps_from if at is not None)}
        raise ConfigError("islands.every is not valid", expected=f"{expected}; the first one from step 0", got=every)
    number = whole_number(every)
    if number is None or number < 1:
        raise ConfigError("islands.every is not valid", expected=expected, got=repr(every))
    return number


def _as_step(at: object) -> int | None:
    """Return a key of `Islands.every` as an integer. The keys of a TOML table are texts."""
    return int(at) if isinstance(at, str) and at.isdecimal() else whole_number(at)


def _checked_outer(outer: object) -> str | OuterOptimizer:
    """Return `Islands.outer` as an optimizer or "auto". Raises ConfigError."""
    if isinstance(outer, (Averaging, Nesterov)):
        return outer
    if outer == "auto":
        return "auto"
    if isinstance(outer, str) and outer in _OUTER_NAMES:
        return _OUTER_NAMES[outer]()
    if isinstance(outer, Mapping) and set(outer) <= {"lr", "momentum"}:
        return Nesterov(**outer)
    raise ConfigError(
        "islands.outer is not an outer optimizer",
        expected="auto, averaging, nesterov, manyhands.Averaging(), manyhands.Nesterov(lr=..., momentum=...)",
        got=repr(outer),
    )
