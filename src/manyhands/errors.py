"""The errors that Manyhands raises, in one class tree.

    ManyhandsError
    ├── ConfigError (ValueError)     the recipe, the strategy or the command is wrong: the user mends it
    ├── DataError (ValueError)       the data are missing, broken or not what the recipe says
    ├── NumericsError                the arithmetic can't go on (a gradient is not finite) or is not the one recorded
    ├── CheckpointError              a checkpoint can't be written, or what was found is not one
    ├── WorkerError                  another worker raised, died or stalled: names it, its step and where it was
    ├── Interrupted                  a person or the system asked the run to stop
    └── InvariantError               our bug: carries the story of what led there

Every error says what failed, what was expected and found, where, and what to do next.
"""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """Where a worker is. words: for people; step: the one that it's in, or has just made (None: it isn't at steps, but
    starts, say); micro_batch: the one that it reads or computes."""

    words: str = ""
    step: int | None = None
    micro_batch: int | None = None


NO_POSITION = Position()


class ManyhandsError(Exception):
    """Base of all errors that Manyhands raises on purpose.

    `what` is one sentence. The rest is optional and printed one to a line: `expected` and `got`, `where`
    (worker, step, unit, parameter, file and line), `hint` (what to do next), `detail` (a stack, a story).
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        where: str | None = None,
        hint: str | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.detail = what, where, hint, detail
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)

    def __str__(self) -> str:
        lines = [self.what]
        for name in ("where", "expected", "got", "hint"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {'what to do' if name == 'hint' else name}: {value}")
        if self.detail:
            lines.append("  " + self.detail.rstrip().replace("\n", "\n  "))
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, dict(self.__dict__)))


def _rebuild(kind: type[ManyhandsError], what: str, attributes: dict[str, object]) -> ManyhandsError:
    error = kind(what)
    error.__dict__.update(attributes)
    return error


class ConfigError(ManyhandsError, ValueError):
    """The recipe, the strategy or the command line is wrong."""


class DataError(ManyhandsError, ValueError):
    """The data are missing, broken, or not what the recipe says they are."""


class NumericsError(ManyhandsError):
    """A gradient or loss is not finite, or this machine's numerics are not those that a run was begun with."""


class CheckpointError(ManyhandsError):
    """A checkpoint can't be written, or what was found is not a whole checkpoint of this run."""


class WorkerError(ManyhandsError):
    """A worker raised, died or stalled. `rank` is the root cause's number, not the number of the one that noticed;
    `alive`: it was alive when that was noticed. `place`: where it was; `raised`: what it raised there itself, as
    "kind: message" ("": it was killed or stalled). What a launcher passes on of Manyhands's other errors is the cause.
    """

    alive = False
    raised = ""

    def __init__(self, what: str, *, rank: int = -1, position: Position = NO_POSITION, **where: object) -> None:
        super().__init__(what, **where)  # type: ignore[arg-type]
        self.rank, self.position = rank, position


class Interrupted(ManyhandsError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and stopped between two steps."""


class InvariantError(ManyhandsError):
    """A rule of our own was broken: a bug in Manyhands, or in an object that it was given."""
