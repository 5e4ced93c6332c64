"""What a membership needs of its surroundings: memory that several workers see (offload/shared.py), and a store."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor


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
