"""What Dask's and Ray's workers run: they hand the task to processes of our own beside them, and wait.

So a task runs as it does in the embedded pool: one at a time in a process, with the same seed of hashes, watched for
its memory, and whoever kills it is not the engine's worker.
"""

from __future__ import annotations

import sys
from concurrent.futures import CancelledError
from functools import cache
from typing import NamedTuple

from manyhands import __version__
from manyhands.errors import ConfigError, DataError, WorkerError
from manyhands.prepare.pool import Place, Pool
from manyhands.prepare.storage import exists
from manyhands.prepare.task import Task, TaskResult

_MOST = 1024  # workers beside one worker of the engine, which decides how many tasks it has at once


class Versions(NamedTuple):
    """What must be the same everywhere: functions are sent as code of one Python, files written by one Arrow."""

    python: str
    manyhands: str
    pyarrow: str

    @classmethod
    def here(cls) -> Versions:
        """This process's."""
        import pyarrow as pa

        return cls(".".join(map(str, sys.version_info[:2])), __version__, str(pa.__version__))


def run_on_host(task: Task, place: Place, versions: Versions) -> TaskResult:
    """Do a task in a process beside this one. Raises what the task raises, or that this host can't do it."""
    if versions != Versions.here():
        raise ConfigError(
            "a worker has other versions than the script",
            expected=_in_words(versions),
            got=_in_words(Versions.here()),
            hint="install the same versions everywhere: the bytes of the output depend on them",
        )
    if not exists(task.plan_path):
        raise DataError(
            "a worker doesn't see the job's folder",
            where=task.plan_path,
            hint="all hosts need the output folder under the same path, on a shared disk or in a store; take() and "
            "count() work in the system's folder of temporary files: set TMPDIR to a shared one, or write()",
        )
    try:
        return _pool(place, task.memory_bytes).submit(task).result()
    except CancelledError:
        raise WorkerError("a worker was ended in the middle of a task", where=task.name) from None


@cache
def _pool(place: Place, memory_bytes: int) -> Pool:
    """One for all tasks of a script, as long as the engine's worker lives. Its processes end when they have no work."""
    return Pool(_MOST, memory_bytes, place)


def _in_words(versions: Versions) -> str:
    return f"Python {versions.python}, Manyhands {versions.manyhands}, pyarrow {versions.pyarrow}"
