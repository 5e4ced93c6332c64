"""To be asked to stop: the first Ctrl-C (or SIGTERM) ends the run after this step; a second Ctrl-C, now."""

from __future__ import annotations

import signal
import threading
from types import FrameType


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
