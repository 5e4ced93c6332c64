"""The first code in a worker process (standard library only).

Run by its path, as `python -I -S child.py FOLDER`: nothing but the standard library, about 15 ms. It replaces itself
by the command (exec: same process, kernel settings kept), so a user's script runs exactly as `python script.py` would.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PLAN_FILE = "plan.json"

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process (SIGKILL) when its parent ends, however that ends.

    parent: the parent's pid, where known: if it is gone already, this process ends at once. The setting outlives
    exec, not fork. Linux only; elsewhere it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:  # it ended before the kernel was told
        os._exit(1)


def started_marker(rank: int) -> str:
    """The name of the empty file by which this worker tells the parent its pid, and when (clock ticks) this process
    began, as another one may get its number later: made whole or not at all."""
    try:
        with open("/proc/self/stat") as file:
            ticks = file.read().rpartition(")")[2].split()[19]
    except OSError:
        ticks = ""
    return f"started-{rank}-{os.getpid()}-{ticks}"


def become_worker(folder: str) -> None:
    """Set this process up as the plan in `folder` says, and replace it by the worker's command. Doesn't return."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C this early ends it without a traceback
    try:
        with open(os.path.join(folder, PLAN_FILE), encoding="utf-8") as file:
            plan = json.load(file)
        die_with_parent(plan["parent"])
        if plan["holds_signals"]:  # it listens once it's ready; until then they wait
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        rank = int(os.environ["RANK"])
        os.close(os.open(os.path.join(folder, started_marker(rank)), os.O_CREAT | os.O_WRONLY, 0o600))
    except FileNotFoundError:  # the parent gave up while this process was starting, and took the folder away
        os._exit(1)
    if rank != 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if plan["log_dir"] is not None:
            path = os.path.join(plan["log_dir"], f"worker-{rank}.log")
            log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
    try:
        os.execvp(plan["command"][0], plan["command"])
    except OSError as error:
        sys.stderr.write(f"manyhands: can't run {plan['command'][0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    become_worker(sys.argv[1])
