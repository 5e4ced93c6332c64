"""Ranges of a file's bytes, wherever it is."""

from __future__ import annotations

from manyhands.checkpoint.address import AHEAD_BYTES, Address, Place


class Ranges:
    """Reads ranges of a file. size: its bytes. Of one in a store it reads some MiB ahead, since a request takes long
    and what follows is mostly wanted next. Raises OSError."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._first, self._ahead = 0, b""
        self.size = place.size() if isinstance(place, Address) else place.stat().st_size

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length): fewer if the file ends before."""
        found = bytearray(max(0, min(length, self.size - start)))
        return bytes(found[: self.read_into(start, memoryview(found))])

    def read_into(self, start: int, wanted: memoryview) -> int:
        """Fill `wanted` with the bytes from `start` on; how many there were."""
        if not isinstance(self._place, Address):
            with self._place.open("rb") as file:
                file.seek(start)
                return file.readinto(wanted)
        position, end = start, min(start + wanted.nbytes, self.size)
        while position < end:
            offset = position - self._first
            if not 0 <= offset < len(self._ahead):
                self._first, offset = position, 0
                self._ahead = self._place.read_range(position, min(position + AHEAD_BYTES, self.size))
                if not self._ahead:
                    break
            part = self._ahead[offset : offset + end - position]
            wanted[position - start : position - start + len(part)] = part
            position += len(part)
        return position - start

    def rest(self) -> None:
        """Something else is read for now: what was read ahead is forgotten."""
        self._ahead = b""
