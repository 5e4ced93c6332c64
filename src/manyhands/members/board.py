"""A worker's board in shared memory: its progress, readable after its death.

What a membership needs of its surroundings: memory that several workers see (offload/scratch.py), and a store.

A worker's notice board: how far it has come and what it is doing, readable by its peers even after its death.
Layout of a board, one shared page run per worker, written by its owner alone:

    int64 [0], [1]   posted: how many collective calls it has begun (or contributed to), by lane
    int64 [8]        drained: how many exchanges it has read to the end
    int64 [16]       closed: it left on purpose
    int64 [24]       waiting: it waits for others
    int64 [32], [33] its place: step and micro-batch, plus 1 (0: in none)
    int64 [64:64+RING], [64+RING:64+2*RING]  what it called: the tag's checksum, by call number modulo RING, by lane
    bytes [TEXT:]    its place in words, or the call that it's in, zero-terminated

A lane is a sequence of collective calls that all workers make in one order; two lanes keep no order between them.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

from torch import Tensor

from manyhands.errors import Position


class Arena(Protocol):
    """Where shared buffers come from."""

    def create(self, num_bytes: int, scratch: Path | None = None) -> tuple[Tensor, str]:
        """A zeroed uint8 buffer and the address under which others find it. scratch: a folder for a file to hold it, if
        memory shall not. Raises ConfigError."""

    def open(self, address: str) -> Tensor:
        """The buffer that another worker created."""

    def seal(self) -> None:
        """Everyone has opened what I created so far: drop the addresses."""


class Store(Protocol):
    """Small texts by key that all workers see: torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> None:
        """Keep a text."""

    def get(self, key: str, /) -> bytes:
        """The text; waits until there is one."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all the keys have a text."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Keep `desired` if the text is `expected`, or "" if there is none; what is kept then."""


RING = 4096

CHANNELS = 2

TEXT = (64 + CHANNELS * RING) * 8

TEXT_BYTES = 512

BOARD_BYTES = TEXT + TEXT_BYTES

_POSTED, _DRAINED, _CLOSED, _WAITING, _POSITION, _TAGS = 0, 8, 16, 24, 32, 64


class Board:
    """One worker's board over `memory`, uint8 [BOARD_BYTES]."""

    def __init__(self, memory: Tensor) -> None:
        array = memory.numpy()
        self._counts = array[:TEXT].view("<i8")
        self._text = memoryview(array[TEXT:BOARD_BYTES])  # type: ignore[arg-type]

    def posted(self, channel: int) -> int:
        """How many collective calls it has begun on that lane."""
        return int(self._counts[_POSTED + channel])

    @property
    def drained(self) -> int:
        return int(self._counts[_DRAINED])

    @property
    def closed(self) -> bool:
        return bool(self._counts[_CLOSED])

    @property
    def waiting(self) -> bool:
        return bool(self._counts[_WAITING])

    def wait(self, waiting: bool) -> None:
        """Owner: I wait for others, or do no longer."""
        self._counts[_WAITING] = waiting

    def post(self, number: int, tag: str, channel: int) -> None:
        """Owner: begin collective call `number` of a lane. The tag is written before the count that shows it."""
        self._counts[_TAGS + channel * RING + number % RING] = zlib.crc32(tag.encode())
        self._counts[_POSTED + channel] = number

    def has_tag(self, number: int, tag: str, channel: int) -> bool:
        """Whether call `number` of that lane had this tag; only to be asked once it is posted."""
        return bool(self._counts[_TAGS + channel * RING + number % RING] == zlib.crc32(tag.encode()))

    def drain(self, number: int) -> None:
        """Owner: all exchanges up to `number` are read."""
        self._counts[_DRAINED] = number

    def close(self) -> None:
        """Owner: I leave on purpose."""
        self._counts[_CLOSED] = 1

    @property
    def position(self) -> Position:
        words = bytes(self._text).split(b"\0", 1)[0].decode(errors="replace")
        step, micro_batch = (int(number) - 1 if number else None for number in self._counts[_POSITION : _POSITION + 2])
        return Position(words, step, micro_batch)

    def enter(self, position: Position) -> None:
        """Owner: where I am from now on."""
        self._counts[_POSITION : _POSITION + 2] = [0 if number is None else number + 1 for number in position[1:]]
        self.say(position.words)

    def say(self, words: str) -> None:
        """Owner: what I am doing at my place."""
        line = words.encode()[: TEXT_BYTES - 1] + b"\0"
        self._text[: len(line)] = line
