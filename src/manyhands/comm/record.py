"""A record of every message: operation, tag, bytes, seconds; summed by kind for a step's metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

STORY_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Message:
    """One call of a group's verb on this worker.

    num_bytes: what this worker received from the others; seconds: how long it waited for it.
    """

    operation: str
    tag: str
    num_bytes: int
    seconds: float


class Recorder:
    """Keeps the last messages, for errors, and sums by kind (the tag's last word: grad, param, control)."""

    def __init__(self) -> None:
        self.story: deque[Message] = deque(maxlen=STORY_LENGTH)
        self._bytes: dict[str, int] = {}
        self._seconds = 0.0

    def add(self, operation: str, tag: str, num_bytes: int, seconds: float) -> None:
        """Record one message."""
        self.story.append(Message(operation, tag, num_bytes, seconds))
        kind = tag.rsplit(" / ", 1)[-1]
        self._bytes[kind] = self._bytes.get(kind, 0) + num_bytes
        self._seconds += seconds

    def take(self) -> tuple[dict[str, int], float]:
        """Bytes by kind and seconds waited since the last call."""
        taken = (self._bytes, self._seconds)
        self._bytes, self._seconds = {}, 0.0
        return taken
