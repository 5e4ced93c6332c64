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
from manyhands.output import protect_output

_PATH_FILE, _CALL_FILE = "path.json", "call.pkl"

# The worker must find all modules where its parent found them, including this package, so set the path before any
# import.
_BOOT = (
    f"import json, sys; sys.path[:] = json.load(open(sys.argv[1] + '/{_PATH_FILE}'));"
    "from manyhands.launching.function import answer_call; answer_call(sys.argv[1])"
)


def launch(fn: Callable[..., Any], *args: Any, workers: int, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` in `workers` processes on this host and return their results in rank order.

    `fn` may be defined anywhere, including a notebook cell. The function, its arguments and its results are sent with
    cloudpickle. All workers print to this process's terminal. Blocks until all workers have ended.

    Raises WorkerError, which names the worker and has its traceback in `detail`; Interrupted after Ctrl-C, as
    `run_workers` does; ConfigError if the call cannot be pickled. No processes or files are left behind.
    """
    # Import the launcher here, because the workers also import this module and do not need the launcher.
    from manyhands.launching.launcher import run_workers
    from manyhands.launching.worker_files import shared_folder

    try:
        call = cloudpickle.dumps((fn, args, kwargs))
    except Exception as error:  # pickling runs user code, which may raise anything
        raise ConfigError(
            f"{getattr(fn, '__qualname__', fn)} cannot be sent to the workers",
            got=f"{type(error).__name__}: {error}",
            hint="create objects such as locks, open files and connections inside the function",
        ) from error
    with shared_folder() as folder:
        (folder / _PATH_FILE).write_text(json.dumps(sys.path), encoding="utf-8")
        (folder / _CALL_FILE).write_bytes(call)
        run_workers([sys.executable, "-c", _BOOT, str(folder)], workers=workers)
        return [_read_result(folder, rank) for rank in range(workers)]


def answer_call(name: str) -> None:
    """Make the call that is stored in folder `name`, in a worker. Store the result, or report the error."""
    protect_output()
    folder, rank = Path(name), int(os.environ["RANK"])
    try:
        fn, args, kwargs = pickle.loads((folder / _CALL_FILE).read_bytes())
        result = fn(*args, **kwargs)
        _result_file(folder, rank).write_bytes(cloudpickle.dumps(result))
    except (KeyboardInterrupt, Interrupted):
        sys.exit(130)
    except Exception as error:  # the parent reads and raises it
        record_failure(error)
        sys.exit(1)


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pkl"


def _read_result(folder: Path, rank: int) -> Any:
    try:
        data = _result_file(folder, rank).read_bytes()
    except FileNotFoundError:
        raise WorkerError(
            f"worker {rank} exited without a result", rank=rank, hint="the function must return instead of exiting"
        ) from None
    return pickle.loads(data)
