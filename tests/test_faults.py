"""When a worker raises, is killed, stalls or is stopped at any point, all end soon after it and name it.

Real processes, started as a user starts them. The faults are in support/faulty.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

SUPPORT = Path(__file__).resolve().parent / "support"
MANYHANDS = [sys.executable, "-m", "manyhands.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENT = ["--set", "strategy.stall_seconds=600"]
"""For runs in which no worker stalls: none is reported to, however busy the machine is."""

STALL_SECONDS = {"stall": 5, "stop": 3}
"""The launcher kills a worker whose process has been stopped for 5 s, so its peers must report it before."""

WITHIN_SECONDS = 5.0
"""From a fault until all processes have ended, besides the time that they took to start, which the machine's load
extends as well. The launcher would kill a worker that does not end after 30 s."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WHERE = {  # the error's `where` for worker 1
    "forward": r"worker 1 \(pid \d+ on .*\), step 3, micro-batch \d / forward and backward",
    "backward": r"worker 1 \(pid \d+ on .*\), step 3, round \d / layers\.2 / grad",
    "update": r"worker 1 \(pid \d+ on .*\), step 3 / update",
}
WHAT = {
    "raise": r"worker 1 failed: RuntimeError: out of cheese",
    "kill": r"worker 1 was killed by SIGKILL",
    "exit": r"worker 1 exited with",
    "stall": r"worker 1 has stalled: its peers have waited for more than 5 s$",
    "stop": r"worker 1 has stalled: its peers have waited for more than 3 s \(its process is stopped",
}


def training(
    folder: Path,
    transport: str,
    restarts: str = "0",
    workers: str = "2",
    sharding: str = "zero2",
    stall_seconds: int = 600,
) -> list[str]:
    recipe, run_dir = str(SUPPORT / "faulty.toml"), str(folder / "directory")
    options = ["--workers", workers, "--transport", transport, "--sharding", sharding, "--run-dir", run_dir]
    options += ["--set", f"strategy.stall_seconds={stall_seconds}"]
    return [*MANYHANDS, "train", recipe, *options, "--max-restarts", restarts]


def stall_seconds(fault: str) -> int:
    """Return the time after which a worker has stalled: short if the fault is that one stalls."""
    return STALL_SECONDS.get(fault.partition("-")[0].split()[0], 600)


def script(loop: str, transport: str) -> list[str]:
    return [str(SUPPORT / "faulty.py"), loop, transport]


@dataclass
class Run:
    """One run of a command, started by the constructor. folder: of this run only; its name identifies its processes."""

    folder: Path
    command: list[str]
    fault: str = ""
    more: Mapping[str, str] = field(default_factory=dict)  # variables for the first launcher
    seconds: float = field(init=False, default=0.0)  # from the fault until all processes were gone
    limit_seconds: float = field(init=False, default=0.0)  # for `seconds`
    output: str = field(init=False, default="")

    def __post_init__(self) -> None:
        (self.folder / "temporary").mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        self.process = self.start(self.command, self.more)

    def start(self, command: list[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the run's command, or another launcher that takes part in it. more: variables only for this one."""
        environment = {
            **os.environ,
            **(more or {}),
            "FAULT": self.fault,
            "FAULT_TIME": str(self.folder / "fault-time"),
            "TMPDIR": str(self.folder / "temporary"),
        }
        with self.open_output() as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)

    def open_output(self) -> IO[bytes]:
        """Return where the launchers write to."""
        return (self.folder / "output").open("ab")

    def processes(self) -> list[int]:
        """Return the pids of all running processes that it started: they inherit its environment."""
        mark, found = f"FAULT_TIME={self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                pass  # it has ended, or belongs to another user
        return found

    def wait(self, seconds: float = 300.0) -> Run:
        """Wait until all its processes have ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            if time.monotonic() > deadline:
                left = self.processes()
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
                pytest.fail(f"{self.fault}: {left} were still running.\n{self._read()}")
            time.sleep(0.05)
        fault_time = self.folder / "fault-time"
        if fault_time.exists():
            at = float(fault_time.read_text())
            self.seconds = time.time() - at
            self.limit_seconds = WITHIN_SECONDS + at - self.began
            self.limit_seconds += STALL_SECONDS.get(self.fault.split()[0], 0)
        self.output = self._read()
        return self

    def _read(self) -> str:
        # A process that is killed, or whose disk is full, may write a part of a character.
        return (self.folder / "output").read_text(errors="replace")

    def left_behind(self) -> list[str]:
        """Return the temporary files and names in shared memory that exist."""
        shared = [path.name for path in Path("/dev/shm").iterdir() if "manyhands" in path.name]
        temporary = [path.name for path in (self.folder / "temporary").iterdir()]
        return [name for name in temporary if not name.startswith("torchinductor_")] + shared  # torch's own cache


@pytest.mark.parametrize(
    ("transport", "kind", "places"),
    [
        ("shared-memory", "kill", ("update",)),
        pytest.param("shared-memory", "stall", ("forward",), marks=pytest.mark.slow),
        ("distributed", "kill", ("backward",)),
        pytest.param("shared-memory", "raise", ("forward", "backward"), marks=pytest.mark.slow),  # update: see below
        pytest.param("shared-memory", "kill", ("forward", "backward"), marks=pytest.mark.slow),
        pytest.param("shared-memory", "exit", ("forward", "update"), marks=pytest.mark.slow),
        pytest.param("shared-memory", "stall", ("backward", "update"), marks=pytest.mark.slow),
        pytest.param("shared-memory", "stop", ("forward", "backward"), marks=pytest.mark.slow),
        pytest.param("distributed", "raise", ("backward",), marks=pytest.mark.slow),
        pytest.param("distributed", "stall", ("update",), marks=pytest.mark.slow),
        pytest.param("distributed", "stop", ("update",), marks=pytest.mark.slow),
    ],
)
def test_all_end_and_the_root_cause_is_named(
    tmp_path: Path, transport: str, kind: str, places: tuple[str, ...]
) -> None:
    for place in places:  # one after the other, because times are compared
        command = training(tmp_path / place, transport, stall_seconds=stall_seconds(kind))
        check(Run(tmp_path / place, command, f"{kind} {place}").wait(), kind, place)


@pytest.mark.parametrize(
    ("transport", "kind"),
    [
        ("shared-memory", "stall"),  # worker 0 waits for a free buffer of gradients, inside autograd
        *(
            pytest.param(transport, kind, marks=pytest.mark.slow)
            for transport, kind in (("shared-memory", "kill"), ("distributed", "kill"), ("distributed", "stall"))
        ),
    ],
)
def test_all_end_during_a_backward_with_sharded_parameters(tmp_path: Path, transport: str, kind: str) -> None:
    command = training(tmp_path / "run", transport, sharding="zero3", stall_seconds=stall_seconds(kind))
    check(Run(tmp_path / "run", command, f"{kind} backward").wait(), kind)


def check(run: Run, kind: str, place: str = "backward") -> None:
    """Assert that worker 1 is named with its position, that all ended in time, and that nothing is left."""
    message = f"{place}\n{run.output}"
    assert run.process.returncode == 1, message
    assert run.seconds < run.limit_seconds, message
    assert re.search("^" + WHAT[kind], run.output, re.MULTILINE), message
    assert re.search(f"^  where: {WHERE[place]}", run.output, re.MULTILINE), message
    assert run.left_behind() == [], message
    assert "InvariantError" not in run.output, message
    assert "different collective calls" not in run.output, message
    assert run.output.count("Traceback") == (kind == "raise"), message
    if kind == "raise":
        assert "in misbehave" in run.output, message
        assert "/manyhands/engine/" not in run.output, message
    if kind == "stall":  # the stack of its main thread is printed, and no other
        assert "in oversleep" in run.output, message
        assert "in _watch" not in run.output, message
    if kind in ("stall", "stop"):
        assert "; its peers wait in step 3" in run.output, message


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("stall forward 5 0", "worker 0 has made no progress for more than 5 s"),
        pytest.param("exit forward 5 0", "worker 0 exited with code 0 before it had finished", marks=pytest.mark.slow),
        pytest.param(
            "stop forward 5 0",
            r"worker 0 has made no progress .* 3 s \(its process is stopped.*",
            marks=pytest.mark.slow,
        ),
        pytest.param("kill forward 5 0", "worker 0 was killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_worker_without_peers_is_watched_by_its_launcher(tmp_path: Path, fault: str, expected: str) -> None:
    transport = "distributed" if "stall" in fault else "auto"  # a distributed group of one, or a local one
    command = training(tmp_path / "run", transport, workers="1", stall_seconds=stall_seconds(fault))
    run = Run(tmp_path / "run", command, fault).wait()
    assert run.process.returncode == 1, run.output
    assert run.seconds < run.limit_seconds + 5, run.output
    assert re.search(f"^{expected}$", run.output, re.MULTILINE), run.output
    where = r"^  where: worker 0( \(pid \d+\))?, step 2, micro-batch 0 / forward and backward"
    assert re.search(where, run.output, re.MULTILINE), run.output
    assert ("in oversleep" in run.output) == ("stall" in fault), run.output
    assert run.left_behind() == []


@pytest.mark.slow
def test_a_worker_that_is_stopped_before_it_has_joined_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", training(tmp_path / "run", "auto"), "stop start 0 1").wait()
    assert run.seconds < run.limit_seconds + 5, run.output
    assert "worker 1's process has been stopped for 5 s" in run.output


@pytest.mark.slow
def test_failures_under_plain_torchrun(tmp_path: Path) -> None:
    def run(kind: str, place: str, loop: str) -> Run:
        return Run(tmp_path / kind, [*TORCHRUN, *script(loop, "auto")], f"{kind} {place}").wait()

    with ThreadPoolExecutor(2) as pool:
        raised, killed = pool.map(run, ("raise", "kill"), ("backward", "update"), ("train", "loop"))
    for run_, place, reported in (
        (raised, "backward", "worker 1 raised RuntimeError: out of cheese"),
        (killed, "update", "worker 1 exited without an error report (killed?)"),
    ):
        assert run_.process.returncode == 1, run_.output
        assert run_.seconds < run_.limit_seconds, run_.output
        assert reported in run_.output  # reported by worker 0
        assert re.search(WHERE[place], run_.output), run_.output
        assert re.search(r"rank +: 1 ", run_.output.rpartition("Root Cause")[2]), run_.output


def test_an_uncaught_error_of_a_script_is_printed_once(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", [*MANYHANDS, "run", "--workers", "2", *script("loop", "auto")], "raise update").wait()
    assert run.process.returncode == 1
    assert run.seconds < run.limit_seconds
    assert re.match(WHAT["raise"] + r"\n  where: " + WHERE["update"], run.output), run.output
    assert run.output.count("Traceback") == 1, run.output
    assert run.left_behind() == []


@pytest.mark.parametrize("launcher", ["manyhands", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_workers_end_with_a_killed_launcher(tmp_path: Path, launcher: str) -> None:
    command = training(tmp_path / "run", "auto") if launcher == "manyhands" else [*TORCHRUN, *script("loop", "auto")]
    run = Run(tmp_path / "run", [*command], "stall backward")
    while not (tmp_path / "run" / "fault-time").exists():  # it has reached the fault
        assert run.process.poll() is None, run.wait().output
        time.sleep(0.05)
    assert len(run.processes()) >= 3
    killed, starting_seconds = time.monotonic(), time.time() - run.began
    run.process.kill()
    run.wait()
    assert time.monotonic() - killed < WITHIN_SECONDS + starting_seconds
    assert launcher != "manyhands" or run.left_behind() == []
