"""A small file system in memory that can be filled, as a full disk. Requires root, or user namespaces."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


BALLAST = ".ballast.tmp"
"""The file that takes all space of the disk. It has the name of a temporary file, so it may be in a run directory."""


def fill(folder: Path) -> None:
    """Fill the file system of `folder` to the last byte."""
    with (folder / BALLAST).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@cache
def _is_possible() -> bool:
    command = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        sys.platform.startswith("linux") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def run_on_small_disk(
    disk: Path, command: list[str], *, size: str = "4m", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a small file system at `disk`, which ends with the command, or skip the test."""
    import pytest

    if not _is_possible():
        pytest.skip("no file system can be mounted here")
    disk.mkdir(exist_ok=True)
    mounted = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    whole = [*UNSHARE, "sh", "-c", mounted, "sh", size, str(disk), *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=300, env=env)
