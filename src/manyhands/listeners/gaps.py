"""Lets a run continue while its record can't be written, for example because the disk is full."""

from __future__ import annotations

import threading
from collections.abc import Callable

from manyhands.errors import ManyhandsError


class Gaps:
    """The gaps in a run's record. A failed write is reported once. It does not end the run, because no result depends
    on the record.

    report: called with messages for people. closed: called when a kind of write succeeds again, with the kind and the
    number of writes that failed.
    """

    def __init__(self, report: Callable[[str], None], closed: Callable[[str, int], None]) -> None:
        self._report, self._closed = report, closed
        self._failed: dict[str, int] = {}
        self._lock = threading.Lock()  # checkpoints are published in another thread

    def attempt(self, kind: str, write: Callable[[], object]) -> None:
        """Call `write`. kind: what it writes, such as "metrics". Does not raise OSError or an error of Manyhands."""
        try:
            write()
        except (OSError, ManyhandsError) as error:
            self.failed(kind, error)
        else:
            self.succeeded(kind)

    def failed(self, kind: str, error: Exception) -> None:
        """Count a write that failed, and report the first one."""
        with self._lock:
            is_first = kind not in self._failed
            self._failed[kind] = self._failed.get(kind, 0) + 1
        if is_first:
            self._report(f"training continues without a record of its {kind}: {error}")

    def succeeded(self, kind: str) -> None:
        """Report that writes succeed again, if earlier ones failed."""
        if not self._failed:
            return
        with self._lock:
            failed = self._failed.pop(kind, 0)
        if failed:
            self._report(f"the record of the {kind} continues; {failed} could not be written")
            self._closed(kind, failed)
