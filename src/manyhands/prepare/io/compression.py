"""Opens compressed files: gzip and zstd."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any, cast


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A method of compression.

    suffixes: the suffixes of file names; the first suffix is used for output. reader, writer: functions that return a
    stream which decompresses or compresses an open file. Closing the stream does not close the file.
    """

    suffixes: tuple[str, ...]
    reader: Callable[[IO[bytes]], IO[bytes]]
    writer: Callable[[IO[bytes]], IO[bytes]]


def _gzip_reader(file: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file))


def _gzip_writer(file: IO[bytes]) -> IO[bytes]:
    # The level is fixed (6), and the header has no file name and no time, so the bytes are the same in every run.
    return cast("IO[bytes]", gzip.GzipFile("", "wb", 6, file, mtime=0))


def _zstd_reader(file: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa

    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))


def _zstd_writer(file: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa

    stream: Any = pa.CompressedOutputStream(pa.PythonFile(_WithoutClose(file), "w"), "zstd")
    return cast("IO[bytes]", stream)


class _WithoutClose:
    """A file whose `close` does nothing, because Arrow closes the file that it writes to."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush, self.tell = file.write, file.flush, file.tell
        self.closed = False

    def close(self) -> None:
        pass


COMPRESSIONS = {
    "gzip": Compression(suffixes=(".gz",), reader=_gzip_reader, writer=_gzip_writer),
    "zstd": Compression(suffixes=(".zst", ".zstd"), reader=_zstd_reader, writer=_zstd_writer),
}
