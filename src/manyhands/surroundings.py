"""This process's rank, read from the environment, and the signals that request it to stop.

The first stop signal ends the run after the current step, and a second SIGINT ends it immediately. Schedulers send
SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU before a job's time is over, and SIGHUP reports that the terminal was closed.

This module does not import torch, because a worker must handle stop signals before it imports torch, which takes
seconds.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Mapping
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

from manyhands.errors import ConfigError

PROGRESS_VARIABLE = "MANYHANDS_PROGRESS_OF_HOST"
"""An environment variable of workers on several hosts: a descriptor on which the first worker of a host shows progress.

It is 2, standard error, until `launching.child` redirects standard error to a log file.
"""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def to_handle() -> list[signal.Signals]:
    """Return the stop signals to handle in this process.

    Signals that are ignored stay ignored: nohup ignores SIGHUP, and a shell without job control starts background jobs
    with SIGINT ignored, so that Ctrl-C ends only what runs in the foreground. SIGINT and SIGTERM are handled in all
    other cases. The program's own handlers for the other signals stay, because programs use SIGUSR1 and SIGUSR2 for
    their own purposes.
    """
    unused, replaced = (signal.SIG_DFL, signal.default_int_handler), (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    return [
        number
        for number, handler in handlers.items()
        if handler in unused or (number in replaced and handler is not signal.SIG_IGN)
    ]


def progress_descriptor() -> int | None:
    """Return the descriptor on which this worker shows progress, if it is the first worker of one of several hosts."""
    value = os.environ.get(PROGRESS_VARIABLE, "")
    return int(value) if value.isdecimal() and os.environ.get("LOCAL_RANK") == "0" else None


class StopSignals:
    """A context manager that handles stop signals in the main thread. In other threads it does nothing.

    `to_handle` says which signals are handled.

    requested: True once a signal has arrived. Before `training_started` is called there is no step to finish, so the
    first signal also raises KeyboardInterrupt immediately.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in to_handle():
                self._previous[number] = signal.signal(number, self._on_signal)
            # Unblock the signals only after the handlers are installed. The launcher starts workers with these signals
            # blocked, and a signal that has arrived since then is delivered now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def training_started(self) -> None:
        """Record the first signal from now on, instead of raising KeyboardInterrupt."""
        self._training = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a second Ctrl-C means "at once": service managers routinely send SIGTERM several times, and a scheduler's
        # signal reaches a worker directly and through its launcher.
        if self.requested and number != signal.SIGINT:
            return
        at_once = self.requested or not self._training
        self.requested = True
        if at_once:
            raise KeyboardInterrupt


RESTARTS_VARIABLE = "MANYHANDS_RESTARTS"
"""Environment variable of workers: how often their launcher has started the program again without progress."""

LAUNCH_VARIABLE = "MANYHANDS_LAUNCH"
"""Environment variable of workers: an id of the launch, which the restarts of the program share."""


def is_restart() -> bool:
    """Return True if a launcher (this package's, or torchrun) has started this program again after a failure."""
    return any(int(os.environ.get(name, "0")) for name in (RESTARTS_VARIABLE, "TORCHELASTIC_RESTART_COUNT"))


def launch_id() -> str | None:
    """Return the id of the launch that started this program, or None without a launcher. Restarts have the same id."""
    if LAUNCH_VARIABLE in os.environ:
        return os.environ[LAUNCH_VARIABLE]
    run_id, error_file = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if run_id == "none" and error_file:  # the default id of all launches: use the name of torchrun's temporary folder
        return str(PurePath(error_file).parent.parent.parent)
    return run_id


def environment_rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of workers from the launcher's variables, or (0, 1) without a
    launcher.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Rank(NamedTuple):
    """The rank of this process: `number`, counted from 0, among `of` ranks."""

    number: int
    of: int


def parse_rank(text: str, environment: Mapping[str, str]) -> Rank | None:
    """Parse the value of `engine=`: "rank 2 of 8", or "ranks" to read it from the scheduler's variables.

    Return None for other engines. Raises ConfigError if the numbers are not a valid rank.
    """
    if text == "ranks":
        return _rank_from(environment)
    match = re.fullmatch(r"rank (\d+) of (\d+)", text)
    return None if match is None else _check_rank(int(match[1]), int(match[2]), text)


def _rank_from(environment: Mapping[str, str]) -> Rank:
    """Read the rank from the variables of Slurm, Kubernetes, SkyPilot or torchrun. Raises ConfigError.

    MANYHANDS_RANK and MANYHANDS_RANKS take precedence.
    """

    def number(*names: str, default: int | None = None) -> int | None:
        found = next((environment[name] for name in names if environment.get(name, "").isdigit()), None)
        return default if found is None else int(found)

    index, count = number("MANYHANDS_RANK"), number("MANYHANDS_RANKS")
    if index is None and number("SLURM_ARRAY_TASK_ID") is not None:
        # Each job of a job array may have several tasks, so number the tasks job by job.
        first, step = number("SLURM_ARRAY_TASK_MIN", default=0) or 0, number("SLURM_ARRAY_TASK_STEP", default=1) or 1
        tasks = number("SLURM_NTASKS", default=1) or 1
        job = ((number("SLURM_ARRAY_TASK_ID") or 0) - first) // step
        index = job * tasks + (number("SLURM_PROCID", default=0) or 0)
        count = count or (number("SLURM_ARRAY_TASK_COUNT", default=1) or 1) * tasks
    if index is None:
        index = number("SLURM_PROCID", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK", "RANK")
        count = count or number("SLURM_NTASKS", "SKYPILOT_NUM_NODES", "WORLD_SIZE")
    if index is None or count is None:
        raise ConfigError(
            'engine="ranks" requires a rank in the environment',
            expected="variables of Slurm, Kubernetes, SkyPilot or torchrun, or MANYHANDS_RANK and MANYHANDS_RANKS",
            got=f"rank {index} of {count}",
            hint='on Kubernetes, set MANYHANDS_RANKS to the number of ranks; or use engine="rank 2 of 8"',
        )
    return _check_rank(index, count, "ranks")


def _check_rank(number: int, of: int, text: str) -> Rank:
    if not 0 <= number < of:
        raise ConfigError(
            "the rank is out of range", expected=f"from 0 to {of - 1}", got=f"rank {number} of {of}", where=f"{text!r}"
        )
    return Rank(number, of)
