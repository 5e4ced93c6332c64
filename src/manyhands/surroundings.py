"""What started this process, read from its environment; and signals that ask it to stop.

To be asked to stop: the first Ctrl-C (or SIGTERM) ends the run after this step; a second Ctrl-C, now.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple

from manyhands.errors import ConfigError


class StopSignals:
    """While active (a context manager, in the main thread): `wanted` tells whether someone asked to stop.

    Before `training_begins` there is nothing to finish: KeyboardInterrupt is raised at once, on every worker asked.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._training = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)  # a launcher may have held them back so far
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def training_begins(self) -> None:
        """From now on the first signal is only noted."""
        self._training = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only Ctrl-C may be impatience; service managers repeat SIGTERM as a matter of course.
        if not self._training or (self.wanted and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.wanted = True


def environment_rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of workers, as its launcher says; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Rank(NamedTuple):
    """Which of how many; the first is 0."""

    number: int
    of: int


def rank_from(text: str, environment: Mapping[str, str]) -> Rank | None:
    """The rank that `engine=` names: "rank 2 of 8", or "ranks" for what the scheduler has said. None: it names none.

    Raises ConfigError for numbers that make no rank.
    """
    if text == "ranks":
        return _rank_in(environment)
    match = re.fullmatch(r"rank (\d+) of (\d+)", text)
    return None if match is None else _checked(int(match[1]), int(match[2]), text)


def _rank_in(environment: Mapping[str, str]) -> Rank:
    """As Slurm, Kubernetes, SkyPilot or torchrun say it; MANYHANDS_RANK and MANYHANDS_RANKS before all."""

    def number(*names: str, default: int | None = None) -> int | None:
        found = next((environment[name] for name in names if environment.get(name, "").isdigit()), None)
        return default if found is None else int(found)

    index, count = number("MANYHANDS_RANK"), number("MANYHANDS_RANKS")
    if index is None and number("SLURM_ARRAY_TASK_ID") is not None:  # of an array of jobs that may have tasks, each
        first, step = number("SLURM_ARRAY_TASK_MIN", default=0) or 0, number("SLURM_ARRAY_TASK_STEP", default=1) or 1
        tasks = number("SLURM_NTASKS", default=1) or 1
        place = ((number("SLURM_ARRAY_TASK_ID") or 0) - first) // step
        index = place * tasks + (number("SLURM_PROCID", default=0) or 0)
        count = count or (number("SLURM_ARRAY_TASK_COUNT", default=1) or 1) * tasks
    if index is None:
        index = number("SLURM_PROCID", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK", "RANK")
        count = count or number("SLURM_NTASKS", "SKYPILOT_NUM_NODES", "WORLD_SIZE")
    if index is None or count is None:
        raise ConfigError(
            'engine="ranks" finds no rank in the environment',
            expected="what Slurm, Kubernetes, SkyPilot or torchrun set, or MANYHANDS_RANK and MANYHANDS_RANKS",
            got=f"rank {index} of {count}",
            hint='Kubernetes doesn\'t say how many there are: set MANYHANDS_RANKS. Or say it: engine="rank 2 of 8"',
        )
    return _checked(index, count, "ranks")


def _checked(number: int, of: int, text: str) -> Rank:
    if not 0 <= number < of:
        raise ConfigError(
            "there is no such rank", expected=f"from 0 to {of - 1}", got=f"rank {number} of {of}", where=f"{text!r}"
        )
    return Rank(number, of)
