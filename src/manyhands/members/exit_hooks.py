"""Exit hooks: a worker reports its error to peers and launcher before it ends.

While this process is in a group, and only where the program hasn't its own ways: an uncaught exception is told to the
peers and the parent; a SIGTERM, which launchers send as soon as another worker has failed, waits until this one has
heard why; a program that ends without closing its engine leaves the group.
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
from manyhands.members.reports import PARENT_TELLS_VARIABLE, record_failure

_HEARSAY_SECONDS = 1.0


class ExitHooks:
    """See the module. In force from here on until `membership` is closed; for the parent, to the program's end."""

    def __init__(self, membership: Membership) -> None:
        self._membership: Membership | None = membership  # until it's closed
        self._pid = os.getpid()
        # What stays for the parent after a group was closed is replaced: else each group would keep all before it.
        before = getattr(sys.excepthook, "__self__", None)
        self._previous_hook = sys.excepthook
        if isinstance(before, ExitHooks) and before._membership is None:
            self._previous_hook = before._previous_hook
        self._handles_signal = False
        sys.excepthook = self._uncaught
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._asked_to_end)
            self._handles_signal = True
        atexit.register(self._ending)
        membership.at_close.append(self._remove)

    def _remove(self) -> None:
        membership, self._membership = self._membership, None  # which is kept by nothing that stays here
        atexit.unregister(self._ending)
        failed = membership is not None and membership.failure is not None
        wanted = failed or os.environ.get(PARENT_TELLS_VARIABLE)  # for what comes later
        if not wanted and sys.excepthook == self._uncaught:
            sys.excepthook = self._previous_hook
        if self._handles_signal and signal.getsignal(signal.SIGTERM) == self._asked_to_end:
            with suppress(ValueError):  # closed in another thread: it stays
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        membership = self._membership
        if membership is None:
            record_failure(error)
        else:
            membership.fail(error)
        if not os.environ.get(PARENT_TELLS_VARIABLE):
            self._previous_hook(kind, error, trace)

    def _asked_to_end(self, number: int, frame: FrameType | None) -> None:
        membership, deadline = self._membership, time.monotonic() + _HEARSAY_SECONDS
        while membership is not None and membership.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if membership is not None and membership.failure is not None:
            report_error(membership.failure)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _ending(self) -> None:
        membership = self._membership
        if membership is not None and membership.failure is None and os.getpid() == self._pid:  # not in a forked child
            membership.leave()


def report_error(error: WorkerError) -> None:
    """Leave what another worker's failure is for the parent, or on the terminal where there is none that shows it."""
    record_failure(error)
    if not os.environ.get(PARENT_TELLS_VARIABLE):
        with suppress(OSError):
            os.write(2, f"\n{error}\n".encode())


def end_process(error: WorkerError) -> None:
    """Tell, and end at once: this worker didn't come round to raising the error itself."""
    report_error(error)
    os._exit(1)
