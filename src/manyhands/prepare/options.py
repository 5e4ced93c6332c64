"""Options of a data job: workers, memory, engine. They never change the output."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict, cast

from manyhands.errors import ConfigError
from manyhands.formatting import GIB, MIB, format_bytes
from manyhands.options import check_options, declared, option, options
from manyhands.surroundings import Rank, parse_rank

if TYPE_CHECKING:
    from manyhands.prepare.engines.engine import JobEngine

EXPECTED = 'dask://scheduler:8786, ray, ray://head:10001, "rank 2 of 8", ranks'


def check_engine(engine: object) -> None:
    """Check that `engine` is an engine or names one, and that its package is installed. Raises ConfigError."""
    if callable(getattr(engine, "submit", None)):
        return
    name = engine if isinstance(engine, str) else ""
    if parse_rank(name, os.environ) is not None:
        return
    kind = name.partition("://")[0]
    if kind not in ("dask", "ray") or (kind == "dask" and name == "dask"):
        raise ConfigError("unknown engine", expected=EXPECTED, got=repr(engine))
    package = {"dask": "distributed", "ray": "ray"}[kind]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"the engine {name!r} needs a package that isn't installed",
            expected=package,
            hint=f"pip install 'manyhands[{kind}]', here and on all workers",
        )


def rank_of(options: Options) -> Rank | None:
    """Return the rank of this process, or None if it is not one of several ranks."""
    from manyhands.prepare.engines.ranks import Ranks

    if isinstance(options.engine, Ranks):
        return options.engine.rank
    return parse_rank(options.engine, os.environ) if isinstance(options.engine, str) else None


def patience_seconds(options: Options) -> float:
    """Return the time for which a rank waits for other ranks before it runs their tasks."""
    from manyhands.prepare.engines.ranks import RANK_PATIENCE_SECONDS, Ranks

    return options.engine.patience_seconds if isinstance(options.engine, Ranks) else RANK_PATIENCE_SECONDS


LEAST_BYTES = 192 * MIB
"""The minimum memory of a worker."""

_UNITS = {"": 1, "B": 1, "KIB": 1024, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class JobOptions(TypedDict, total=False):
    """The keyword arguments of every method that runs a job, for type checkers.

    `Options` declares and describes them.
    """

    workers: int | None
    engine: JobEngine | str | None
    memory: int | str | None
    max_bad_records: int
    progress: bool
    listeners: Sequence[Any]


@options
class Options:
    """The way in which a job runs.

    `engine` may also be an object with the method of `JobEngine`. Raises ConfigError.
    """

    workers: int | None = option(
        default=None,
        at_least=0,
        flags=("--workers", "-n"),
        flag_type=int,
        metavar="N",
        help="The number of worker processes on this machine (default: one per CPU). 0: tasks run in the main process.",
    )
    engine: JobEngine | str | None = option(
        default=None,
        flags=("--engine",),
        metavar="NAME",
        help="Run tasks on a cluster: dask://scheduler:8786, ray or ray://head:10001. If several runs of the same "
        "script share the work, pass 'rank 2 of 8' for example, or ranks if a scheduler such as Slurm sets the rank.",
    )
    memory: int | str | None = option(
        default=None,
        flags=("--memory",),
        metavar="SIZE",
        help="The memory for all workers together: 2GiB, 512MiB, or a number of bytes (default: 70 % of the "
        "machine's). If "
        "that is too little for all workers, fewer workers start.",
    )
    max_bad_records: int = option(
        default=0,
        at_least=0,
        flags=("--max-bad-records",),
        flag_type=int,
        metavar="N",
        help="The number of unreadable or failing records that may be set aside.",
    )
    progress: bool = option(default=True, help="Show progress on standard error.")
    listeners: Sequence[Any] = option(
        default=(),
        help="Objects with the method event(name, facts) of manyhands.Listener. It gets each event of a job that "
        "writes files, in the process that runs the job.",
    )

    def __post_init__(self) -> None:
        check_options(self, prefix="")
        for listener in self.listeners:
            if isinstance(listener, type) or not callable(getattr(listener, "event", None)):
                raise ConfigError(
                    "an object in the list of listeners has no method event",
                    expected="objects of classes that derive from manyhands.Listener",
                    got=repr(listener)[:80],
                    hint="pass an object, not its class" if isinstance(listener, type) else None,
                )
        if self.memory is not None and self.total_bytes() < LEAST_BYTES:
            raise ConfigError(
                "memory is too small for one worker",
                expected=f"at least {format_bytes(LEAST_BYTES)}",
                got=format_bytes(self.total_bytes()),
            )
        if self.engine is not None:
            check_engine(self.engine)

    def total_bytes(self) -> int:
        """Return the memory for all workers together."""
        return _machine_bytes() * 7 // 10 if self.memory is None else parse_bytes(self.memory)

    def num_workers(self) -> int:
        """Return the number of processes on this machine, which is reduced if there is too little memory for all of
        them.
        """
        return min(self.workers or _cpus(), max(1, self.total_bytes() // LEAST_BYTES))

    def task_bytes(self) -> int:
        """Return the memory of each worker on this machine."""
        return self.total_bytes() // max(1, self.num_workers())

    def keywords(self) -> JobOptions:
        """Return the options as keyword arguments."""
        return cast("JobOptions", {name: getattr(self, name) for name in declared(Options)})

    def described(self) -> dict[str, Any]:
        """Return the options as a job's events record them."""
        where = self.engine if isinstance(self.engine, str) else type(self.engine).__name__
        of_engine = {"engine": where} if self.engine is not None else {"workers": self.num_workers()}
        return {**of_engine, "memory_bytes": self.total_bytes(), "max_bad_records": self.max_bad_records}

    def alone(self) -> Options:
        """Return the same options without other ranks, for work that is not shared."""

        return self if rank_of(self) is None else replace(self, engine=None)


def options_of(keywords: JobOptions) -> Options:
    """Check the options that a caller passed. Raises ConfigError for an unknown option."""
    given: dict[str, Any] = dict(keywords)
    known = list(declared(Options))
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ConfigError(
                f"there is no option {name!r}",
                expected=", ".join(known),
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
    return Options(**given)


def parse_bytes(text: int | str) -> int:
    """Parse a number of bytes: an int, or text like 2GiB, 512 MiB, 1.5GB. Raises ConfigError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if match and match[2].upper() in _UNITS:
        try:
            return int(float(match[1]) * _UNITS[match[2].upper()])
        except ValueError:
            pass
    raise ConfigError("an amount of memory can't be parsed", expected="2GiB, 512MiB or a number of bytes", got=text)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine_bytes() -> int:
    """Return the memory of the machine, or the limit of this process's control group if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # there is no control group, or the limit is "max"
        return total
