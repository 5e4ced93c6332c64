"""Exit hooks, with which a worker reports its error to peers and launcher before it ends.

The hooks are active while this process is in a group:

- An uncaught exception is reported to peers and launcher.
- Launchers send SIGTERM as soon as one worker has failed. The hook delays the signal until this worker knows the root
  cause, unless the program has its own handler for SIGTERM.
- A program that exits without closing its engine leaves the group.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

from manyhands.errors import WorkerError
from manyhands.members.membership import Membership
from manyhands.members.reports import PARENT_REPORTS_VARIABLE, record_failure

_REPORT_SECONDS = 1.0
"""The time for which a worker that received SIGTERM waits for the report of the failed worker."""


class ExitHooks:
    """The exit hooks of a worker, which the module's docstring describes.

    The constructor installs the hooks, and they are removed when `membership` is closed. The hook for uncaught
    exceptions remains if a worker has failed or the launcher reports errors.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership: Membership | None = membership  # None after it was closed
        self._pid = os.getpid()
        # Replace a hook that an earlier, closed group has left for the launcher. Chaining to it would keep all earlier
        # groups of this process in memory.
        before = getattr(sys.excepthook, "__self__", None)
        self._previous_hook = sys.excepthook
        if isinstance(before, ExitHooks) and before._membership is None:
            self._previous_hook = before._previous_hook
        self._handles_signal = False
        sys.excepthook = self._on_uncaught
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            self._handles_signal = True
        atexit.register(self._on_exit)
        membership.at_close.append(self._remove)

    def _remove(self) -> None:
        membership, self._membership = self._membership, None  # a hook that remains must not keep the group in memory
        atexit.unregister(self._on_exit)
        failed = membership is not None and membership.failure is not None
        # The hook must still report later errors to the launcher.
        needed = failed or os.environ.get(PARENT_REPORTS_VARIABLE)
        if not needed and sys.excepthook == self._on_uncaught:
            sys.excepthook = self._previous_hook
        if self._handles_signal and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            with suppress(ValueError):  # this is allowed only in the main thread; elsewhere the handler remains
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        membership = self._membership
        if membership is None:
            record_failure(error)
        else:
            membership.fail(error)
        if not os.environ.get(PARENT_REPORTS_VARIABLE):
            self._previous_hook(kind, error, trace)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        membership, deadline = self._membership, time.monotonic() + _REPORT_SECONDS
        while membership is not None and membership.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if membership is not None and membership.failure is not None:
            report_error(membership.failure)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _on_exit(self) -> None:
        membership = self._membership
        if membership is not None and membership.failure is None and os.getpid() == self._pid:  # not in a forked child
            membership.leave()


def report_error(error: WorkerError) -> None:
    """Report another worker's failure to the launcher. Print it on the terminal if no launcher does."""
    record_failure(error)
    if not os.environ.get(PARENT_REPORTS_VARIABLE):
        with suppress(OSError):
            os.write(2, f"\n{error}\n".encode())


def end_process(error: WorkerError) -> None:
    """Report a peer's failure and end this process immediately, because this process did not raise the error in
    time.
    """
    report_error(error)
    os._exit(1)
