"""A worker's board in shared memory: its progress, readable after its death.

Each worker maps the boards of its peers on the same host, and reads their progress and activity there. Layout of a
board, which only its owner writes:

    int64 [0], [1]   posted: the number of collective calls that the owner has started, by channel
    int64 [8]        drained: the number of all-to-alls whose pieces the owner has read
    int64 [16]       closed: 1 if the owner left on purpose
    int64 [24]       waiting: 1 while the owner waits for peers
    int64 [32], [33] position: step and micro-batch, plus 1 (0: none)
    int64 [64:64+RING], [64+RING:64+2*RING]  CRC-32 of each call's tag, at call number modulo RING; one ring per channel
    bytes [TEXT:]    the owner's current activity or collective call as text, zero-terminated

A channel is a sequence of collective calls that all workers make in the same order. Calls of different channels may
interleave differently on different workers. Counters that change often are 64 bytes apart, so that writing one counter
does not invalidate the cache line of another.

The module also defines two protocols: the shared memory, which comm/process_arena.py implements, and the key-value
store that a membership uses.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

from torch import Tensor

from manyhands.errors import Position


class Arena(Protocol):
    """A source of buffers that several workers can map."""

    def create(self, num_bytes: int, scratch: Path | None = None) -> tuple[Tensor, str]:
        """Create a zeroed uint8 buffer. Return it and the address with which peers open it.

        scratch: the folder for a file that holds the buffer, or None for a buffer in memory. Raises ConfigError.
        """

    def open(self, address: str) -> Tensor:
        """Map the buffer that another worker created."""

    def seal(self) -> None:
        """Invalidate the addresses of all buffers created so far. Call it only once all peers have opened them."""


class Store(Protocol):
    """A key-value store that all workers see, such as the stores of torch.distributed."""

    def set(self, key: str, value: str, /) -> None:
        """Set the value of a key."""

    def get(self, key: str, /) -> bytes:
        """Return the value of a key. Waits until it is set."""

    def check(self, keys: list[str], /) -> bool:
        """Return True if all the keys are set."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set the key to `desired` if its value is `expected`, or if it has no value and `expected` is "".

        Return the key's value after the call.
        """


RING = 4096
"""The number of recent calls whose tags a board holds.

A peer can't be this many calls ahead, because all workers wait for each other every few calls.
"""

CHANNELS = 2
"""The number of channels: one for the group, and one for its sibling or for its links between hosts."""

TEXT = (64 + CHANNELS * RING) * 8

TEXT_BYTES = 512

BOARD_BYTES = TEXT + TEXT_BYTES

_POSTED, _DRAINED, _CLOSED, _WAITING, _POSITION, _TAGS = 0, 8, 16, 24, 32, 64


class Board:
    """One worker's board in `memory`, uint8 [BOARD_BYTES]. Only the owner may call methods that write."""

    def __init__(self, memory: Tensor) -> None:
        array = memory.numpy()
        self._counts = array[:TEXT].view("<i8")
        self._text = memoryview(array[TEXT:BOARD_BYTES])  # type: ignore[arg-type]

    def posted(self, channel: int) -> int:
        """Return the number of collective calls that the owner has started on this channel."""
        return int(self._counts[_POSTED + channel])

    @property
    def drained(self) -> int:
        """Return the number of all-to-alls whose pieces the owner has read."""
        return int(self._counts[_DRAINED])

    @property
    def closed(self) -> bool:
        """Return True if the owner has left on purpose."""
        return bool(self._counts[_CLOSED])

    @property
    def waiting(self) -> bool:
        """Return True while the owner waits for peers."""
        return bool(self._counts[_WAITING])

    def record_waiting(self, waiting: bool) -> None:
        """Record whether the owner waits for peers."""
        self._counts[_WAITING] = waiting

    def post(self, number: int, tag: str, channel: int) -> None:
        """Announce the start of collective call `number` on a channel."""
        # Write the tag first, because a peer that sees the new count may read the tag immediately.
        self._counts[_TAGS + channel * RING + number % RING] = zlib.crc32(tag.encode())
        self._counts[_POSTED + channel] = number

    def has_tag(self, number: int, tag: str, channel: int) -> bool:
        """Return True if call `number` of this channel has this tag. Call it only after `posted` has shown the call."""
        return bool(self._counts[_TAGS + channel * RING + number % RING] == zlib.crc32(tag.encode()))

    def drain(self, number: int) -> None:
        """Announce that the pieces of all all-to-alls up to `number` have been read."""
        self._counts[_DRAINED] = number

    def close(self) -> None:
        """Announce that the owner leaves on purpose."""
        self._counts[_CLOSED] = 1

    @property
    def position(self) -> Position:
        """Return the owner's position.

        Text and numbers are read one after the other, so they may be from different moments.
        """
        activity = bytes(self._text).split(b"\0", 1)[0].decode(errors="replace")
        step, micro_batch = (int(number) - 1 if number else None for number in self._counts[_POSITION : _POSITION + 2])
        return Position(activity, step, micro_batch)

    def record_position(self, position: Position) -> None:
        """Record the owner's new position."""
        self._counts[_POSITION : _POSITION + 2] = [0 if number is None else number + 1 for number in position[1:]]
        self.record_activity(position.activity)

    def record_activity(self, activity: str) -> None:
        """Record only the text of the position: the owner's activity."""
        line = activity.encode()[: TEXT_BYTES - 1] + b"\0"
        self._text[: len(line)] = line
