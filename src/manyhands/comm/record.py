"""What a step's messages came to: bytes by kind, and the seconds that were waited for others."""

from __future__ import annotations


class Recorder:
    """Sums over a group's calls on this worker. A message's kind is its tag's last word: grad, param, control."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._seconds = 0.0

    def add(self, tag: str, num_bytes: int, seconds: float) -> None:
        """Record a message. num_bytes: received from the others; seconds: waited for it."""
        kind = tag.rsplit(" / ", 1)[-1]
        self._bytes[kind] = self._bytes.get(kind, 0) + num_bytes
        self._seconds += seconds

    def waited(self, seconds: float) -> None:
        """Record that others were waited for, besides what a message took."""
        self._seconds += seconds

    def take(self) -> tuple[dict[str, int], float]:
        """Bytes by kind and seconds waited since the last call."""
        taken = (self._bytes, self._seconds)
        self._bytes, self._seconds = {}, 0.0
        return taken
