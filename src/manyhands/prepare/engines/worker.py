"""The program of a worker process of the local pool."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from manyhands.errors import DataError, ManyhandsError
from manyhands.members.processes import kill_with_parent
from manyhands.output import protect_output
from manyhands.prepare.plan.modules import is_installed


def main() -> None:
    """Serve the connection. The arguments are its file descriptor and the pid of the parent."""
    protect_output()  # nobody may read the output, and a failed print must not make a record bad
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent handles it
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    parent = int(sys.argv[2])
    # The kernel also ends a task that holds Python's lock in a long call of a C library. A thread could not.
    if not kill_with_parent(parent):
        threading.Thread(target=_end_with_parent, args=(connection.fileno(), parent), daemon=True).start()
    try:
        from manyhands.prepare.task import run_task

        initial_modules = frozenset(sys.modules)
        connection.send_bytes(pickle.dumps(("ready", None, rss_bytes(), True)))
        while True:
            task = pickle.loads(connection.recv_bytes())
            try:
                answer: tuple[str, object] = ("done", run_task(task))
            except BaseException as error:
                answer = ("failed", _portable(error, task.name))
            if "pyarrow" in sys.modules:
                sys.modules["pyarrow"].default_memory_pool().release_unused()
            connection.send_bytes(pickle.dumps((*answer, rss_bytes(), _all_installed(initial_modules))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the connection


def rss_bytes() -> int:
    """Return the resident memory of this process, or 0 without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _all_installed(initial_modules: frozenset[str]) -> bool:
    """Return True if all modules that tasks have imported belong to Python or installed packages, which do not
    change.
    """
    for name in sys.modules.keys() - initial_modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and not (name.startswith("manyhands.") or is_installed(file)):
            return False
    return True


def _end_with_parent(fd: int, parent: int) -> None:
    """End this process as soon as the parent ends for any reason, even in the middle of a task."""
    poller = select.poll()
    poller.register(fd, 0)  # 0: report only that the other end was closed
    while os.getppid() == parent:
        if poller.poll(1000):
            break
    os._exit(1)


def _portable(error: BaseException, name: str) -> BaseException:
    """Return an error that can be pickled, with its traceback as text. Any other error becomes a DataError."""
    if not isinstance(error, ManyhandsError):
        trace = "".join(traceback.format_exception(error))
        error = DataError(f"a task failed: {type(error).__name__}: {error}", where=name, detail=trace)
    elif error.__cause__ is not None and error.detail is None:
        error.detail = "".join(traceback.format_exception(error.__cause__))
    return error


if __name__ == "__main__":
    main()
