"""How much memory this process takes at its peak, shared pages divided among those who map them (PSS)."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

_SMAPS = Path("/proc/self/smaps_rollup")
_SAMPLE_SECONDS = 0.02


def memory_bytes() -> int:
    """The process's proportional set size now; where the system doesn't tell it, its largest resident size so far."""
    try:
        with _SMAPS.open() as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class PeakMemory:
    """The largest `memory_bytes` seen while active (a context manager; it may be entered again and again)."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="manyhands-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_bytes())
            if self._done.wait(_SAMPLE_SECONDS):
                return
