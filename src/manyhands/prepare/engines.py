"""From what `engine=` says to an engine. All make the same bytes; they differ in where tasks run."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from manyhands.errors import ConfigError
from manyhands.prepare.ranks import Rank, rank_from

if TYPE_CHECKING:
    from manyhands.prepare.engine import Engine
    from manyhands.prepare.options import Options

EXPECTED = 'dask://scheduler:8786, ray, ray://head:10001, "rank 2 of 8", ranks'


def check_engine(engine: object) -> None:
    """Raises ConfigError if it is no engine and names none, or if what the name needs isn't installed."""
    if hasattr(engine, "submit"):
        return
    name = engine if isinstance(engine, str) else ""
    if rank_from(name, os.environ) is not None:
        return
    kind = name.partition("://")[0]
    if kind not in ("dask", "ray") or (kind == "dask" and name == "dask"):
        raise ConfigError("there is no such engine", expected=EXPECTED, got=repr(engine))
    package = {"dask": "distributed", "ray": "ray"}[kind]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"the engine {name!r} needs a package that isn't installed",
            expected=package,
            hint=f"pip install 'manyhands[{kind}]', here and on all workers",
        )


def rank_of(options: Options) -> Rank | None:
    """The rank that this process is, if it is one."""
    from manyhands.prepare.ranks import Ranks

    if isinstance(options.engine, Ranks):
        return options.engine.rank
    return rank_from(options.engine, os.environ) if isinstance(options.engine, str) else None


def patience_seconds(options: Options) -> float:
    """How long a rank waits for the others before it does their part."""
    from manyhands.prepare.ranks import PATIENCE_SECONDS, Ranks

    return options.engine.patience_seconds if isinstance(options.engine, Ranks) else PATIENCE_SECONDS


def open_engine(options: Options) -> Engine:
    """The engine that is named; processes on this machine if none is. Raises ConfigError if nobody answers."""
    from manyhands.prepare.engine import InProcess
    from manyhands.prepare.kept_pool import kept_pool
    from manyhands.prepare.ranks import Ranks

    name = options.engine if isinstance(options.engine, str) else ""
    total, given = options.total_bytes(), None if options.memory is None else options.total_bytes()
    default = total // max(1, options.num_workers())
    if name.startswith("dask://"):
        from manyhands.prepare.dask_engine import DaskEngine

        return DaskEngine(name.replace("dask://", "tcp://", 1), given, default)
    if name.startswith("ray"):
        from manyhands.prepare.ray_engine import RayEngine

        return RayEngine(name if name.startswith("ray://") else None, given, default)
    here: Engine = InProcess(total) if options.workers == 0 else kept_pool(options.num_workers(), default)
    rank = rank_of(options)
    return here if rank is None else Ranks(rank, here)
