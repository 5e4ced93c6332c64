"""Writes text for people to standard output and standard error. A failed write never ends the program.

Output fails when the reader of a pipe has ended (`| head -1`), when a terminal is gone (a lost ssh connection), when
the disk of a redirected output is full, when a stream was closed at the start (`>&-`), and when an encoding lacks a
character (PYTHONIOENCODING=ascii). In all of these cases the text is lost or simplified, and the program continues.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_SIMPLE = {
    "→": "->",
    "·": "-",
    "…": "...",
    "✓": "+",
    "✗": "x",
    "█": "#",
    "▓": "=",
    "▒": "+",
    "░": ".",
    "▚": "%",
}
"""Replacements for characters that an encoding lacks. Other characters are replaced by question marks."""

_GONE = (errno.EPIPE, errno.EIO)
"""The errors after which a stream never works again: the reader of the pipe has ended, or the terminal is gone."""


class SafeStream(io.TextIOBase):
    """A text stream that writes to another stream and never raises.

    current: a function that returns the other stream. It is called for each write, because programs replace
    `sys.stderr`. It may return None, because `sys.stderr` is None in a program that was started with a closed standard
    error.
    """

    def __init__(self, current: Callable[[], TextIO | None]) -> None:
        self._current = current

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the other stream."""
        return getattr(self._current(), "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        """Return the binary stream below the other stream. Writing to it directly may raise."""
        return cast(Any, self._current()).buffer

    def isatty(self) -> bool:
        """Return True if the other stream is a terminal."""
        return is_terminal(self._current())

    def fileno(self) -> int:
        """Return the descriptor of the other stream. Raises io.UnsupportedOperation if it has none."""
        stream = self._current()
        if stream is None:
            raise io.UnsupportedOperation("fileno")
        return stream.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Write `text`, in simpler characters if the encoding lacks some of them."""
        self._attempt(lambda stream: stream.write(_encodable(text, stream)))
        return len(text)

    def flush(self) -> None:
        """Flush the other stream."""
        self._attempt(lambda stream: stream.flush())

    def reconfigure(self, **options: Any) -> None:
        """Change the settings of the other stream, as `TextIOWrapper.reconfigure` does."""
        cast(Any, self._current()).reconfigure(**options)

    def _attempt(self, call: Callable[[TextIO], object]) -> None:
        stream = self._current()
        if stream is None:
            return
        try:
            call(stream)
        except OSError as error:
            if error.errno in _GONE:
                _discard(stream)
        except ValueError:  # the stream was closed
            pass


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
        return text
    except UnicodeEncodeError:
        return "".join(_in_encoding(each, encoding) for each in text)


def _in_encoding(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
        return character
    except UnicodeEncodeError:
        return _SIMPLE.get(character, "?")


def _discard(stream: TextIO) -> None:
    """Redirect the descriptor of a stream to /dev/null, because the stream's reader is gone.

    Otherwise Python would fail to flush the stream when it exits, and would exit with code 120.
    """
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _same(stream: TextIO | None) -> TextIO | None:
    return stream


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if the stream is a terminal; False for None and for a closed stream."""
    with suppress(OSError, ValueError, AttributeError):
        return stream is not None and stream.isatty()
    return False


def say(text: str, *, to_stdout: bool = False) -> None:
    """Write `text` and a line break to standard error, or to standard output, and flush. Never raises."""
    stream = SafeStream(lambda: sys.stdout if to_stdout else sys.stderr)
    stream.write(f"{text}\n")
    stream.flush()


def console(*, stderr: bool = True) -> Console:
    """Return a rich console that writes to standard error, or to standard output, and never raises."""
    from rich.console import Console

    def current() -> TextIO | None:
        stream = sys.stderr if stderr else sys.stdout
        # While a progress bar is shown, rich replaces the streams by ones that print to a console, such as this one.
        return getattr(stream, "rich_proxied_file", stream)

    return Console(file=cast(TextIO, SafeStream(current)), highlight=False)


def protect_output() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that never raise, and that the user's `print` uses, too.

    Call this only in processes that run a program of Manyhands: commands, workers of the train command, and workers of
    data jobs. Descriptors that were closed at the start are opened on /dev/null. Otherwise a file that is opened later,
    such as a checkpoint, would have such a descriptor, and output would be written to it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # opens fd, because it is the lowest free descriptor
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(partial(_same, stream)))
