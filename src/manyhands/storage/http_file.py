"""A file of an HTTP server. A read returns correct data or raises an error.

Requests that fail are repeated. A server that does not support ranges sends the complete file, which is stored in a
temporary file. A connection that is cut, or a file that changes while it is read, raises an error.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from typing import IO, Any

_ATTEMPTS = 5

_FIRST_PAUSE_SECONDS = 0.2
"""The pause after the first failed attempt. It doubles after each further failure."""

_AHEAD_BYTES = 4 << 20  # one request reads this many bytes

_NOT_SATISFIABLE, _PARTIAL, _TOO_MANY, _SERVER_ERRORS = 416, 206, 429, 500


def is_http(system: Any) -> bool:
    """Return True if `system` is the fsspec file system of http:// and https:// addresses."""
    protocols = system.protocol
    return "http" in ((protocols,) if isinstance(protocols, str) else protocols)


def open_http(system: Any, url: str) -> IO[bytes]:
    """Return the file, open for reading and seeking. This call and later reads raise OSError.

    system: the fsspec file system of the address, whose session and options are used.
    """
    return BufferedReader(_HttpFile(system, url), 1 << 17)


def http_info(system: Any, url: str) -> tuple[int, str] | None:
    """Return the size of a file, and a header that changes with its content ("" if the server sends no such header).

    Returns None if there is no such file. Raises OSError.
    """
    try:
        file = _HttpFile(system, url)
    except FileNotFoundError:
        return None
    with file:
        return file.size_bytes(), file.version


class _FinalError(OSError):
    """An error that another attempt would not fix."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """An answer of the server. total_bytes: the size of the complete file, if known. body: the range, for a partial
    answer.
    """

    is_range: bool
    total_bytes: int | None
    version: str
    body: bytes = b""


class _HttpFile(RawIOBase):
    def __init__(self, system: Any, url: str) -> None:
        self._system, self._url = system, url
        self._position, self._first, self._ahead = 0, 0, b""
        self._complete: IO[bytes] | None = None
        self._answer: _Answer | None = None
        self._answer = first = self._request(0, 1)
        self._is_range, self._total_bytes, self.version = first.is_range, first.total_bytes, first.version

    def size_bytes(self) -> int:
        """Return the size of the file. The file is downloaded if the server does not report its size."""
        if self._total_bytes is not None:
            return self._total_bytes
        return self._download().seek(0, SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        base = {SEEK_SET: 0, SEEK_CUR: self._position}
        self._position = max(0, offset + (self.size_bytes() if whence == SEEK_END else base[whence]))
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = min(len(view), max(0, self.size_bytes() - self._position))
        if not count:
            return 0
        if not self._is_range:
            file = self._download()
            file.seek(self._position)
            data = file.read(count)
        else:
            offset = self._position - self._first
            if not 0 <= offset < len(self._ahead):
                end = min(self._position + max(_AHEAD_BYTES, count), self.size_bytes())
                self._first, self._ahead, offset = self._position, self._request(self._position, end).body, 0
            data = self._ahead[offset : offset + count]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._complete is not None:
            self._complete.close()
        super().close()

    def _request(self, start: int, end: int) -> _Answer:
        """Request bytes `start` to `end`. If the file was read before, check that it has not changed."""
        answer = self._repeated(lambda: self._sync(_get, start, end, None))
        known = self._answer
        if known is not None and (answer.is_range, answer.total_bytes, answer.version) != (
            known.is_range,
            known.total_bytes,
            known.version,
        ):
            raise _FinalError(f"{self._url}: the file changed while it was being read")
        return answer

    def _download(self) -> IO[bytes]:
        """Download the complete file to a temporary file, and return it."""
        if self._complete is not None:
            return self._complete
        self._complete = file = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)

        def attempt() -> _Answer:
            file.seek(0)
            file.truncate()
            return self._sync(_get, 0, 1, file)

        try:
            answer = self._repeated(attempt)
            if answer.version != self.version or answer.total_bytes not in (None, file.seek(0, SEEK_END)):
                raise _FinalError(f"{self._url}: the file changed while it was being read")
        except BaseException:
            self._complete = None
            file.close()
            raise
        return file

    def _sync(self, function: Any, *arguments: Any) -> _Answer:
        from fsspec.asyn import sync

        answer: _Answer = sync(self._system.loop, function, self._system, self._url, *arguments)
        return answer

    def _repeated(self, attempt: Callable[[], _Answer]) -> _Answer:
        failed = 0
        while True:
            try:
                return attempt()
            except (FileNotFoundError, PermissionError, _FinalError):
                raise
            except Exception as error:  # errors of aiohttp are not OSErrors
                failed += 1
                if failed == _ATTEMPTS:
                    text = str(error) or type(error).__name__
                    raise _FinalError(f"{self._url}: {failed} attempts failed; the last error: {text}") from error
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (failed - 1))


async def _get(system: Any, url: str, start: int, end: int, sink: IO[bytes] | None) -> _Answer:
    """Request a range.

    If the server answers with the complete file, write the file to `sink`, or ignore it if there is no sink.
    """
    session = await system.set_session()
    headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if sink is None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    async with session.get(system.encode_url(url), **{**system.kwargs, "headers": headers}) as response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        _, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if response.status == _NOT_SATISFIABLE and total == "0":
            return _Answer(is_range=False, total_bytes=0, version=version)
        _raise_for(response, url)
        if response.status == _PARTIAL and total.isdigit():
            body = await response.read()
            expected = f"bytes {start}-{min(end, int(total)) - 1}/{total}"
            if response.headers["Content-Range"] != expected or len(body) != min(end, int(total)) - start:
                raise ConnectionError(
                    f"expected {expected}, got {len(body)} bytes of {response.headers['Content-Range']}"
                )
            return _Answer(is_range=True, total_bytes=int(total), version=version, body=body)
        length = response.headers.get("Content-Length")
        is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
        if length is None and "chunked" not in response.headers.get("Transfer-Encoding", ""):
            raise _FinalError(
                f"{url}: the server does not send the file's length, so a cut connection can't be detected"
            )
        if sink is not None:
            async for part in response.content.iter_chunked(1 << 20):  # this raises if the connection is cut
                sink.write(part)
        return _Answer(is_range=False, total_bytes=int(length) if length and is_plain else None, version=version)


def _raise_for(response: Any, url: str) -> None:
    """Raise an error for an answer that is not a success. After a ConnectionError the request may be repeated."""
    status = f"{url}: the server answered {response.status} {response.reason}"
    if response.status in (404, 410):
        raise FileNotFoundError(status)
    if response.status in (401, 403):
        raise PermissionError(status)
    if response.status >= _SERVER_ERRORS or response.status in (408, _TOO_MANY):
        raise ConnectionError(status)
    if response.status >= 300:
        raise _FinalError(status)
