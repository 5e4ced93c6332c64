"""The errors that Manyhands raises, in one class tree.

All are subclasses of ManyhandsError:

- ConfigError (a ValueError): the recipe, the strategy or the command line is wrong, and the user must change it.
- DataError (a ValueError): the data is missing, damaged, or not as the recipe specifies.
- NumericsError: a gradient or loss is not finite, or this machine's numerics differ from those of the run.
- CheckpointError: a checkpoint cannot be written, or is missing or invalid.
- WorkerError: a worker raised an exception, died or stalled. The error names the worker, its step and its position.
- Interrupted: the user or the system requested the run to stop.
- InvariantError: a bug in Manyhands, or in an object that was passed to it.

Every error states what failed, what was expected and found, where, and what to do next.
"""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """A worker's position in its work.

    activity: text for people. step: the number of the current or last finished step; None outside of steps, for example
    during start-up. micro_batch: the micro-batch that is being loaded or computed.
    """

    activity: str = ""
    step: int | None = None
    micro_batch: int | None = None


NO_POSITION = Position()


class ManyhandsError(Exception):
    """The base class of all errors that Manyhands raises on purpose.

    what: what failed, in one sentence. The other parts are optional, and each starts on its own line: `where` (worker,
    step, unit, parameter, file and line), `expected` and `got`, `hint` (what to do next), `detail` (a traceback or
    other text).
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
        # Exceptions are pickled by their args, which would lose the keyword arguments.
        return (_rebuild, (type(self), self.what, dict(self.__dict__)))


def _rebuild(kind: type[ManyhandsError], what: str, attributes: dict[str, object]) -> ManyhandsError:
    error = kind(what)
    error.__dict__.update(attributes)
    return error


class ConfigError(ManyhandsError, ValueError):
    """The recipe, the strategy, the command line or the program that calls Manyhands is wrong."""


class DataError(ManyhandsError, ValueError):
    """The data is missing, damaged, or not as the recipe specifies."""


class NumericsError(ManyhandsError):
    """A gradient or loss is not finite, or this machine's numerics differ from those of the run."""


class CheckpointError(ManyhandsError):
    """A checkpoint cannot be written, or is not a complete checkpoint of this run."""


class WorkerError(ManyhandsError):
    """A worker raised an exception, died or stalled.

    rank: the worker that is the root cause, which may differ from the worker that reports it; -1 if unknown. alive:
    True if that worker was alive when its failure was detected. position: the position of that worker. raised: the
    exception that it raised there, as "kind: message", or "" if it was killed or stalled. If the worker raised an error
    of Manyhands, the launcher sets that error as the `__cause__`.
    """

    alive = False
    raised = ""

    def __init__(self, what: str, *, rank: int = -1, position: Position = NO_POSITION, **where: object) -> None:
        super().__init__(what, **where)  # type: ignore[arg-type]
        self.rank, self.position = rank, position


class Interrupted(ManyhandsError):
    """The run stopped between two steps, as requested by Ctrl-C, SIGTERM or another stop signal."""


class InvariantError(ManyhandsError):
    """An internal rule was violated, because of a bug in Manyhands or in an object that was passed to it."""
