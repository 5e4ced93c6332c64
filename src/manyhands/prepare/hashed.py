"""A file that is hashed while it is written."""

from __future__ import annotations

import hashlib
import os
from typing import IO, Any


class HashedFile:
    """Passes bytes on to `file`, from its beginning to its end, and hashes them on the way."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._written = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write some bytes; how many."""
        count = self._file.write(data)
        self._hash.update(data)
        self._written += count
        return count

    def tell(self) -> int:
        """How many bytes were written."""
        return self._written

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()

    def sync(self) -> None:
        """Have it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """No."""
        return False

    def seekable(self) -> bool:
        """No."""
        return False

    def close(self) -> None:
        """Nothing: the file belongs to who opened it."""
