"""A worker's board in shared memory: its progress, readable after its death.

Peers on the same host map the board of each worker. They see how far it has come and what it is doing, even after its
death. Layout of a board, written only by its owner:

    int64 [0], [1]   posted: number of collective calls that it has started, by channel
    int64 [8]        drained: number of all-to-alls whose pieces it has read
    int64 [16]       closed: 1 if it left on purpose
    int64 [24]       waiting: 1 while it waits for peers
    int64 [32], [33] position: step and micro-batch, plus 1 (0: none)
    int64 [64:64+RING], [64+RING:64+2*RING]  CRC-32 of each call's tag, by call number modulo RING, by channel
    bytes [TEXT:]    its current activity or collective call as text, zero-terminated

A channel is a sequence of collective calls that all workers make in the same order; calls of different channels may
interleave differently on different workers. Counters that change often lie 64 bytes apart, so that writing one does not
invalidate the cache line of another.

The module also has the protocols of the shared memory (implemented in offload/scratch.py) and of the key-value store
that a membership uses.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

from torch import Tensor

from manyhands.errors import Position


class Arena(Protocol):
    """Source of buffers that several workers can map."""

    def create(self, num_bytes: int, scratch: Path | None = None) -> tuple[Tensor, str]:
        """Create a zeroed uint8 buffer; return it and the address by which peers open it.

        scratch: folder of a file that holds the buffer (None: it is in memory). Raises ConfigError.
        """

    def open(self, address: str) -> Tensor:
        """Map the buffer that another worker created."""

    def seal(self) -> None:
        """Invalidate the addresses of all buffers created so far. Call it only once all peers have opened them."""


class Store(Protocol):
    """Key-value store that all workers see: the stores of torch.distributed."""

    def set(self, key: str, value: str, /) -> None:
        """Set the value of a key."""

    def get(self, key: str, /) -> bytes:
        """Return the value of a key. Waits until it is set."""

    def check(self, keys: list[str], /) -> bool:
        """True if all the keys are set."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set `desired` if the value is `expected`, or if `expected` is "" and there is none. Return the new value."""


RING = 4096
"""Tags of the last calls that a board holds. A peer can't be this far ahead: every few calls wait for all workers."""

CHANNELS = 2
"""Independent sequences of calls: that of the group, and that of its sibling or of its links between hosts."""

TEXT = (64 + CHANNELS * RING) * 8

TEXT_BYTES = 512

BOARD_BYTES = TEXT + TEXT_BYTES

_POSTED, _DRAINED, _CLOSED, _WAITING, _POSITION, _TAGS = 0, 8, 16, 24, 32, 64


class Board:
    """One worker's board in `memory`, uint8 [BOARD_BYTES]. Methods that write are for the owner only."""

    def __init__(self, memory: Tensor) -> None:
        array = memory.numpy()
        self._counts = array[:TEXT].view("<i8")
        self._text = memoryview(array[TEXT:BOARD_BYTES])  # type: ignore[arg-type]

    def posted(self, channel: int) -> int:
        """Return the number of collective calls that the owner has started on this channel."""
        return int(self._counts[_POSTED + channel])

    @property
    def drained(self) -> int:
        """Number of all-to-alls whose pieces the owner has read."""
        return int(self._counts[_DRAINED])

    @property
    def closed(self) -> bool:
        """True if the owner has left on purpose."""
        return bool(self._counts[_CLOSED])

    @property
    def waiting(self) -> bool:
        """True while the owner waits for peers."""
        return bool(self._counts[_WAITING])

    def record_waiting(self, waiting: bool) -> None:
        """Record whether the owner waits for peers."""
        self._counts[_WAITING] = waiting

    def post(self, number: int, tag: str, channel: int) -> None:
        """Announce the start of collective call `number` on a channel."""
        # The tag first: a peer that sees the new count may read the tag at once.
        self._counts[_TAGS + channel * RING + number % RING] = zlib.crc32(tag.encode())
        self._counts[_POSTED + channel] = number

    def has_tag(self, number: int, tag: str, channel: int) -> bool:
        """True if call `number` of this channel has this tag. Call it only after `posted` has shown the call."""
        return bool(self._counts[_TAGS + channel * RING + number % RING] == zlib.crc32(tag.encode()))

    def drain(self, number: int) -> None:
        """Announce that the pieces of all all-to-alls up to `number` have been read."""
        self._counts[_DRAINED] = number

    def close(self) -> None:
        """Announce that the owner leaves on purpose."""
        self._counts[_CLOSED] = 1

    @property
    def position(self) -> Position:
        """Where the owner is. Text and numbers are read one after the other, so they may be of different moments."""
        activity = bytes(self._text).split(b"\0", 1)[0].decode(errors="replace")
        step, micro_batch = (int(number) - 1 if number else None for number in self._counts[_POSITION : _POSITION + 2])
        return Position(activity, step, micro_batch)

    def record_position(self, position: Position) -> None:
        """Record where the owner is from now on."""
        self._counts[_POSITION : _POSITION + 2] = [0 if number is None else number + 1 for number in position[1:]]
        self.record_activity(position.activity)

    def record_activity(self, activity: str) -> None:
        """Record the text of the position only: what the owner is doing there."""
        line = activity.encode()[: TEXT_BYTES - 1] + b"\0"
        self._text[: len(line)] = line
