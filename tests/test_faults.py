"""A worker that raises, is killed, stalls or is stopped, wherever it is: all end within seconds, with its name.

Real processes, started as a user starts them. See support/faulty.py for what goes wrong.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent / "support"
MANYHANDS = [sys.executable, "-m", "manyhands.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WITHIN_SECONDS, STALL_SECONDS = 5.0, 2.0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

WHERE = {  # what is said of where worker 1 was
    "forward": r"worker 1 \(pid \d+ on .*\), step 2, micro-batch \d / forward and backward",
    "exchange": r"worker 1 \(pid \d+ on .*\), step 2, round \d / layers\.2 / grad",
    "update": r"worker 1 \(pid \d+ on .*\), step 2 / update",
}
WHAT = {
    "raise": r"worker 1 failed: RuntimeError: out of cheese",
    "kill": r"worker 1 was killed by SIGKILL",
    "stall": r"worker 1 has kept the others waiting for more than 2 s$",
    "stop": r"worker 1 has kept the others waiting for more than 2 s \(its process is stopped",
}


def training(folder: Path, group: str, restarts: str = "0", workers: str = "2", sharding: str = "zero2") -> list[str]:
    recipe, run_dir = str(SUPPORT / "faulty.toml"), str(folder / "directory")
    options = ["--workers", workers, "--transport", group, "--sharding", sharding, "--run-dir", run_dir]
    return [*MANYHANDS, "train", recipe, *options, "--max-restarts", restarts]


def script(loop: str, group: str) -> list[str]:
    return [str(SUPPORT / "faulty.py"), loop, group]


@dataclass
class Run:
    """One run of a command, started when made. `folder` is its own: its name tells its processes from others."""

    folder: Path
    command: list[str]
    fault: str = ""
    seconds: float = field(init=False, default=0.0)  # from the fault until all processes were gone
    output: str = field(init=False, default="")

    def __post_init__(self) -> None:
        (self.folder / "temporary").mkdir(parents=True)
        self.process = self.start(self.command)

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """The run's command, or another launcher that takes part in it."""
        environment = {
            **os.environ,
            "FAULT": self.fault,
            "FAULT_TIME": str(self.folder / "fault-time"),
            "TMPDIR": str(self.folder / "temporary"),
        }
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)

    def processes(self) -> list[int]:
        """All that it started and that lives: they inherit its environment."""
        mark, found = f"FAULT_TIME={self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                pass  # it ended meanwhile, or is another user's
        return found

    def wait(self, seconds: float = 60.0) -> Run:
        """Until all its processes are gone."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            if time.monotonic() > deadline:
                left = self.processes()
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
                pytest.fail(f"{self.fault}: {left} lived on.\n{self._read()}")
            time.sleep(0.05)
        noted = self.folder / "fault-time"
        if noted.exists():
            self.seconds = time.time() - float(noted.read_text())
        self.output = self._read()
        return self

    def _read(self) -> str:
        return (self.folder / "output").read_text()

    def left_behind(self) -> list[str]:
        """Temporary files, and names in shared memory."""
        shared = [path.name for path in Path("/dev/shm").iterdir() if "manyhands" in path.name]
        temporary = [path.name for path in (self.folder / "temporary").iterdir()]
        return [name for name in temporary if not name.startswith("torchinductor_")] + shared  # torch's own cache


@pytest.mark.parametrize(
    ("group", "kind", "places"),
    [
        ("shared-memory", "kill", ("update",)),
        pytest.param("shared-memory", "stall", ("forward",), marks=pytest.mark.slow),
        ("distributed", "kill", ("exchange",)),
        pytest.param("shared-memory", "raise", ("forward", "exchange"), marks=pytest.mark.slow),  # update: see below
        pytest.param("shared-memory", "kill", ("forward", "exchange"), marks=pytest.mark.slow),
        pytest.param("shared-memory", "stall", ("exchange", "update"), marks=pytest.mark.slow),
        pytest.param("shared-memory", "stop", ("forward", "exchange"), marks=pytest.mark.slow),
        pytest.param("distributed", "raise", ("exchange",), marks=pytest.mark.slow),
        pytest.param("distributed", "stall", ("update",), marks=pytest.mark.slow),
        pytest.param("distributed", "stop", ("update",), marks=pytest.mark.slow),
    ],
)
def test_all_end_and_the_culprit_is_named(tmp_path: Path, group: str, kind: str, places: tuple[str, ...]) -> None:
    for place in places:  # one after the other, because what is asserted are seconds
        check(Run(tmp_path / place, training(tmp_path / place, group), f"{kind} {place}").wait(), kind, place)


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        ("shared-memory", "stall"),  # worker 0 waits for a place in the ring of gradients, in autograd
        *(
            pytest.param(group, kind, marks=pytest.mark.slow)
            for group, kind in (("shared-memory", "kill"), ("distributed", "kill"), ("distributed", "stall"))
        ),
    ],
)
def test_so_it_is_in_a_backward_with_sharded_parameters(tmp_path: Path, group: str, kind: str) -> None:
    check(Run(tmp_path / "run", training(tmp_path / "run", group, sharding="zero3"), f"{kind} exchange").wait(), kind)


def check(run: Run, kind: str, place: str = "exchange") -> None:
    """That worker 1 is named with its place, and all has ended in time, leaving nothing."""
    told = f"{place}\n{run.output}"
    assert run.process.returncode == 1, told
    assert run.seconds < WITHIN_SECONDS + (STALL_SECONDS if kind in ("stall", "stop") else 0), told
    assert re.search("^" + WHAT[kind], run.output, re.MULTILINE), told
    assert re.search(f"^  where: {WHERE[place]}", run.output, re.MULTILINE), told
    assert run.left_behind() == [], told
    assert "InvariantError" not in run.output, told
    assert run.output.count("Traceback") == (kind == "raise"), told
    if kind == "raise":
        assert "in misbehave" in run.output, told
        assert "/manyhands/engine/" not in run.output, told
    if kind == "stall":  # its stack is shown: the main thread's only
        assert "in oversleep" in run.output, told
        assert "in _watch" not in run.output, told
    if kind in ("stall", "stop"):
        assert "; the others wait in step 2" in run.output, told


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("stall forward 5 0", "worker 0 has been at one thing for more than 2 s"),
        pytest.param(
            "stop forward 5 0", r"worker 0 has been .* 2 s \(its process is stopped.*", marks=pytest.mark.slow
        ),
        pytest.param("kill forward 5 0", "worker 0 was killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_worker_without_peers_is_watched_by_its_parent(tmp_path: Path, fault: str, told: str) -> None:
    group = "distributed" if "stall" in fault else "auto"  # a group of one, or none
    run = Run(tmp_path / "run", training(tmp_path / "run", group, workers="1"), fault).wait()
    assert run.process.returncode == 1, run.output
    assert run.seconds < WITHIN_SECONDS + 5, run.output
    assert re.search(f"^{told}$", run.output, re.MULTILINE), run.output
    where = r"^  where: worker 0( \(pid \d+\))?, step 1, micro-batch 0 / forward and backward"
    assert re.search(where, run.output, re.MULTILINE), run.output
    assert ("in oversleep" in run.output) == ("stall" in fault), run.output
    assert run.left_behind() == []


@pytest.mark.slow
def test_a_worker_that_is_stopped_before_the_others_have_met_it_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", training(tmp_path / "run", "auto"), "stop start 0 1").wait()
    assert run.seconds < WITHIN_SECONDS + 5, run.output
    assert "worker 1's process has been stopped for 5 s" in run.output


@pytest.mark.slow
def test_under_plain_torchrun(tmp_path: Path) -> None:
    def run(kind: str, place: str, loop: str) -> Run:
        return Run(tmp_path / kind, [*TORCHRUN, *script(loop, "auto")], f"{kind} {place}").wait()

    with ThreadPoolExecutor(2) as pool:
        raised, killed = pool.map(run, ("raise", "kill"), ("exchange", "update"), ("train", "loop"))
    for run_, place, noticed in (
        (raised, "exchange", "worker 1 raised RuntimeError: out of cheese"),
        (killed, "update", "worker 1 ended without a word (killed?)"),
    ):
        assert run_.process.returncode == 1, run_.output
        assert run_.seconds < WITHIN_SECONDS, run_.output
        assert noticed in run_.output  # said by worker 0
        assert re.search(WHERE[place], run_.output), run_.output
        assert re.search(r"rank +: 1 ", run_.output.rpartition("Root Cause")[2]), run_.output


def test_an_uncaught_error_of_a_script_is_told_once(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", [*MANYHANDS, "run", "--workers", "2", *script("loop", "auto")], "raise update").wait()
    assert run.process.returncode == 1
    assert run.seconds < WITHIN_SECONDS
    assert re.match(WHAT["raise"] + r"\n  where: " + WHERE["update"], run.output), run.output
    assert run.output.count("Traceback") == 1, run.output
    assert run.left_behind() == []


@pytest.mark.parametrize("launcher", ["manyhands", "torchrun"])
def test_workers_end_with_a_killed_launcher(tmp_path: Path, launcher: str) -> None:
    command = training(tmp_path / "run", "auto") if launcher == "manyhands" else [*TORCHRUN, *script("loop", "auto")]
    run = Run(tmp_path / "run", [*command], "stall exchange")
    while not (tmp_path / "run" / "fault-time").exists():  # it's training
        assert run.process.poll() is None, run.wait().output
        time.sleep(0.05)
    assert len(run.processes()) >= 3
    began = time.monotonic()
    run.process.kill()
    run.wait()
    assert time.monotonic() - began < WITHIN_SECONDS
    assert launcher != "manyhands" or run.left_behind() == []
