"""Faults that `make faults` and `make faults-prepare` cause around commands: full disks, links, closed pipes, clocks.

The disks are small file systems in memory. They, and a /dev/shm of its own, are in a mount namespace of the harness, so
that nothing of the machine is filled, other programs see none of it, and everything ends with the harness.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support import fake_clock
from support.full_disk import BALLAST, UNSHARE, fill

SHARED_MEMORY = Path("/dev/shm")
_SEPARATE = "MANYHANDS_FAULTS_SEPARATE"
NO_SPACE = ("No space left", "disk is full", "shared memory is probably full")
"""Texts of errors that name a full disk."""


def separate() -> dict[str, str]:
    """Start this program again in a mount namespace of its own, with its own /dev/shm.

    Returns the kinds of faults for which this machine lacks the means, with the reason.
    """
    missing = {"clock": fake_clock.why_not()} if fake_clock.why_not() else {}
    if _SEPARATE not in os.environ:
        os.environ[_SEPARATE] = "1"
        possible = sys.platform.startswith("linux") and shutil.which("unshare") is not None
        if possible and not subprocess.run([*UNSHARE, *_mount(Path("/mnt"), "1m")], capture_output=True).returncode:
            os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.orig_argv[1:]])
        os.environ[_SEPARATE] = ""
    if os.environ[_SEPARATE]:
        small_disk(SHARED_MEMORY, "32m")
    else:
        reason = "no file system can be mounted (this needs root, or user namespaces)"
        missing |= {"full disk": reason, "full shared memory": reason}
    return missing


def _mount(folder: Path, size: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]


def small_disk(folder: Path, size: str) -> None:
    """Mount a file system of that size at `folder`, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(_mount(folder, size), check=True)


def unmount_below(folder: Path) -> None:
    """Unmount everything that is mounted at or below `folder`."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for place in sorted((place for place in places if Path(place).is_relative_to(folder)), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=True)


def free(folder: Path) -> None:
    """Undo `fill`."""
    (folder / BALLAST).unlink(missing_ok=True)


class Links:
    """Symbolic links that are put into folders. They lead to nothing, in a circle, or to a folder of others."""

    def __init__(self, decoy: Path) -> None:
        self._decoy, self._put = decoy, list[Path]()
        decoy.mkdir(exist_ok=True)
        (decoy / "manifest.json").write_text("{}")
        (decoy / "precious").write_text("precious")

    def put(self, path: Path, chance: random.Random) -> bool:
        """Put a link at `path` if there is nothing yet. Return whether it is there."""
        target = chance.choice([self._decoy, self._decoy / "precious", path, Path("nowhere")])
        with suppress(OSError):
            path.symlink_to(target)
            self._put.append(path)
            return True
        return False

    def remove(self) -> None:
        """Remove all links that are still there."""
        for path in self._put:
            if path.is_symlink():
                path.unlink()
        self._put.clear()

    def damage(self) -> str:
        """Return what was done to the folder to which the links lead; "" if nothing was."""
        found = {path.name: path.read_text() for path in sorted(self._decoy.iterdir())}
        return "" if found == {"manifest.json": "{}", "precious": "precious"} else f"written through a link: {found}"


@dataclass
class Schedule:
    """What happens to a command while it runs: (seconds after its start, kind of fault, action)."""

    events: list[tuple[float, str, Callable[[], object]]] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)

    def add(self, seconds: float, kind: str, action: Callable[[], object]) -> None:
        self.events.append((seconds, kind, action))

    def fill(self, disk: Path, kind: str, chance: random.Random, within_seconds: float) -> None:
        """Fill a disk; sometimes there is space again soon. `free` must be called at the end."""
        start = chance.choice([0.0, chance.uniform(0, within_seconds)])
        self.add(start, kind, lambda: fill(disk))
        if chance.random() < 0.5:
            self.add(start + chance.uniform(0.5, within_seconds), "", lambda: free(disk))

    def jump(self, clock: fake_clock.FakeClock, seconds: float, chance: random.Random, within_seconds: float) -> None:
        """Let a clock jump; sometimes it is set right soon."""
        start = chance.uniform(0, within_seconds)
        self.add(start, "clock", lambda: clock.jump(seconds))
        if chance.random() < 0.5:
            self.add(start + chance.uniform(0.5, within_seconds), "", lambda: clock.jump(0))

    def run(self, has_ended: Callable[[], bool]) -> None:
        """Let everything happen in time, until the command has ended."""
        started = time.monotonic()
        for seconds, kind, action in sorted(self.events, key=lambda event: event[0]):
            while time.monotonic() < started + seconds:
                if has_ended():
                    return
                time.sleep(0.05)
            done = action()
            if kind and done is not False:
                self.happened.append(kind)


def impatient_reader(count: int, output: Path) -> int:
    """Return the end of a pipe to write to. Its reader copies `count` bytes to `output` and goes away."""
    reader, writer = os.pipe()
    with output.open("ab") as file:
        subprocess.Popen(["head", "-c", str(count)], stdin=reader, stdout=file)
    os.close(reader)
    return writer
