"""Ctrl-C in a job: the job stops, and the script ends with one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from manyhands.errors import Interrupted
from manyhands.output import say

_EXIT_CODE = 128 + 2  # the exit code of a process that SIGINT ended


@contextmanager
def stopping_on_request(folder: str, hint: str) -> Iterator[None]:
    """Raise Interrupted instead of KeyboardInterrupt. If nothing catches it, the process ends with a line and code 130.

    folder: the job's folder. hint: what to do to continue.
    """
    try:
        yield
    except KeyboardInterrupt:
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _show
        raise Interrupted("the job was stopped on request", where=folder, hint=hint) from None


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show an error that nothing caught, as the default hook does, except Interrupted."""
    if not isinstance(error, Interrupted):
        sys.__excepthook__(kind, error, traceback)
        return
    say(f"{error.what} ({error.where}): {error.hint}")
    raise SystemExit(_EXIT_CODE)  # Python ends with this code
