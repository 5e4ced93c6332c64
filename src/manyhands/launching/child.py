"""The first code that runs in a worker process. Imports only the standard library.

The launcher runs this file by its path, as `python -I -S child.py FOLDER`. It starts in about 15 ms, because it imports
only the standard library. The process then replaces itself with the worker's command by exec, which retains the process
and its kernel settings. So a user's script runs exactly as with `python script.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PLAN_FILE = "plan.json"

_PR_SET_PDEATHSIG = 1

_PROGRESS_VARIABLE = "MANYHANDS_PROGRESS_OF_HOST"  # as in surroundings.py, which this file can't import

# The same as in surroundings.py, which this file can't import.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process (SIGKILL) when its parent ends for any reason.

    parent: the expected pid of the parent, if known. If that process has already ended, this process exits immediately.
    The setting survives exec but not fork. On systems other than Linux, this function does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:  # the parent ended before prctl took effect
        os._exit(1)


def started_marker(rank: int) -> str:
    """Return the name of the empty file that reports this worker's pid and start time (clock ticks) to the launcher.

    The start time distinguishes this process from a later one with the same pid. All values are in the name, because
    creating an empty file is atomic.
    """
    try:
        with open("/proc/self/stat") as file:
            ticks = file.read().rpartition(")")[2].split()[19]
    except OSError:
        ticks = ""
    return f"started-{rank}-{os.getpid()}-{ticks}"


def become_worker(folder: str) -> None:
    """Set up this process as the plan in `folder` specifies, and replace it with the worker's command.

    Does not return.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C before the exec ends the process without a traceback
    try:
        with open(os.path.join(folder, PLAN_FILE), encoding="utf-8") as file:
            plan = json.load(file)
        die_with_parent(plan["parent"])
        if plan["holds_signals"]:
            # The worker handles these signals once it has started (StopSignals). Until then they stay pending, so that
            # no signal is lost or kills a worker that is still importing torch.
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        rank = int(os.environ["RANK"])
        os.close(os.open(os.path.join(folder, started_marker(rank)), os.O_CREAT | os.O_WRONLY, 0o600))
    except FileNotFoundError:  # the launcher gave up while this process was starting, and deleted the folder
        os._exit(1)
    if rank != 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if plan["log_dir"] is not None:
            path = os.path.join(plan["log_dir"], f"worker-{rank}.log")
            # Don't follow a link or wait for a FIFO's reader.
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                log = os.open(path, flags, 0o644)
            except OSError:  # the disk is full, or the path is not a file; the launcher still gets the worker's error
                log = os.open(os.devnull, os.O_WRONLY)
            if os.environ.get(_PROGRESS_VARIABLE) and os.environ.get("LOCAL_RANK") == "0":
                terminal = os.dup(2)
                os.set_inheritable(terminal, True)
                os.environ[_PROGRESS_VARIABLE] = str(terminal)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
    try:
        os.execvp(plan["command"][0], plan["command"])
    except OSError as error:
        sys.stderr.write(f"manyhands: cannot run {plan['command'][0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    become_worker(sys.argv[1])
