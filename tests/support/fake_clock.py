"""Clocks that jump: libfaketime fakes the time of day of one command and of all processes that it starts.

The monotonic clock stays the machine's, as when somebody sets a host's clock. Requires Debian's package libfaketime.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

_SHIM = Path(__file__).resolve().parent / "faked_clock"
_SHOW = "import time; t = time.monotonic(); time.sleep(0.01); print(time.time() - (time.monotonic() - t))"


@cache
def _library() -> str | None:
    return next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@cache
def why_not() -> str:
    """Return why no clock can be faked on this machine; "" if one can."""
    if _library() is None:
        return "libfaketime is not installed (Debian: apt install libfaketime)"
    command = [sys.executable, "-S", "-c", "import sitecustomize; " + _SHOW]
    environment = {**os.environ, "LD_PRELOAD": _library() or "", "FAKETIME": "@2001-02-03 04:05:06"}
    environment["PYTHONPATH"] = str(_SHIM)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "" if done.stdout.startswith("98") else f"libfaketime does not work here: {done.stderr[-300:]}"


class FakeClock:
    """The clock of one host. file: holds the offset; processes read this file whenever they ask for the time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def environment(self) -> dict[str, str]:
        """Return the variables with which a command and its processes see this clock."""
        paths = [str(_SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "LD_PRELOAD": _library() or "",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def jump(self, seconds: float) -> None:
        """Set the clock to the machine's time plus `seconds`."""
        new = self._file.with_name(f"{self._file.name}-new")
        new.write_text(f"{seconds:+g}\n")
        new.replace(self._file)  # a reader sees the old offset or the new one

    @staticmethod
    def forget(pid: int) -> None:
        """Delete the files in shared memory that libfaketime leaves if the command with that pid was killed."""
        for path in Path("/dev/shm").glob(f"*faketime_s*_{pid}"):
            path.unlink(missing_ok=True)
