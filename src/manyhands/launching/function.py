"""launch(): calls a function in N workers."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.members.reports import record_failure

_PATH_FILE, _CALL_FILE = "path.json", "call.pkl"

# The worker finds modules where its parent did, this package included: so nothing is imported before the path is set.
_BOOT = (
    f"import json, sys; sys.path[:] = json.load(open(sys.argv[1] + '/{_PATH_FILE}'));"
    "from manyhands.launching.function import answer_call; answer_call(sys.argv[1])"
)


def launch(fn: Callable[..., Any], *args: Any, workers: int, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` in `workers` processes on this host; their results in rank order.

    `fn` may be defined anywhere, in a notebook's cell too; it, its arguments and its results travel by cloudpickle.
    Worker 0 prints here, and so do the others. Blocks until all have ended.

    Raises WorkerError, naming the worker, with its traceback in `detail`; Interrupted (Ctrl-C: see `run_workers`);
    ConfigError for what can't be shipped. Nothing is left behind, neither processes nor files.
    """
    from manyhands.launching.launcher import run_workers
    from manyhands.launching.worker_files import shared_folder  # not in the worker, which imports this module too

    try:
        call = cloudpickle.dumps((fn, args, kwargs))
    except Exception as error:  # pickling runs anybody's code
        raise ConfigError(
            f"{getattr(fn, '__qualname__', fn)} can't be sent to the workers",
            got=f"{type(error).__name__}: {error}",
            hint="make such objects (locks, open files, connections) inside the function",
        ) from error
    with shared_folder() as folder:
        (folder / _PATH_FILE).write_text(json.dumps(sys.path), encoding="utf-8")
        (folder / _CALL_FILE).write_bytes(call)
        run_workers([sys.executable, "-c", _BOOT, str(folder)], workers=workers)
        return [_read_result(folder, rank) for rank in range(workers)]


def answer_call(name: str) -> None:
    """In a worker: make the call that waits in folder `name`, leave its result there, or the error for the parent."""
    folder, rank = Path(name), int(os.environ["RANK"])
    try:
        fn, args, kwargs = pickle.loads((folder / _CALL_FILE).read_bytes())
        result = fn(*args, **kwargs)
        _result_file(folder, rank).write_bytes(cloudpickle.dumps(result))
    except (KeyboardInterrupt, Interrupted):
        sys.exit(130)
    except Exception as error:  # the parent raises it
        record_failure(error)
        sys.exit(1)


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pkl"


def _read_result(folder: Path, rank: int) -> Any:
    try:
        data = _result_file(folder, rank).read_bytes()
    except FileNotFoundError:
        raise WorkerError(
            f"worker {rank} ended without a result", rank=rank, hint="the function must return, not exit"
        ) from None
    return pickle.loads(data)
