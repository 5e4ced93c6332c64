"""Hosts whose clocks jump: the reports name the clocks, and nobody is said to have stopped the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc

from manyhands.launching.rendezvous_state import Clocks
from manyhands.listeners.run_directory import RunDirectory
from support.fake_clock import FakeClock, why_not
from support.processes import started
from test_faults import MANYHANDS, SUPPORT
from test_rendezvous_attacks import free_port


def test_clocks_that_differ_are_found_in_heartbeats() -> None:
    """Whenever a host looks. Heartbeats that stay away, and looks that come late, are no difference."""
    midnight, own, other = datetime(2026, 1, 1, tzinfo=UTC), _NodeDesc("a", 1, 0), _NodeDesc("b", 2, 0)

    def found(*looks: tuple[float, float, float, float]) -> float:
        """looks: the seconds on the monotonic clock, on this host's clock, and in both last heartbeats."""
        clocks = Clocks()
        for monotonic, now, *heartbeats in looks:
            times = [midnight + timedelta(seconds=each) for each in heartbeats]
            clocks.compare(dict(zip((own, other), times, strict=True)), midnight + timedelta(seconds=now), monotonic)
        return clocks.difference

    assert found((100, 50, 50, 50), (101, 51, 51, 50.5), (131, 81, 81, 50.5), (191, 141, 81, 100)) == 0
    assert found((100, 50, 50, 50), (101, 51, 51, 61)) == 10  # the other host's clock has jumped ahead
    assert found((100, 50, 50, 50), (101, 51, 51, 50.5), (102, 52, 52, 41.5)) == 9.5  # and back
    assert found((100, 50, 50, 50), (101, 51, 51, 51), (102, 62, 51, 51)) == 9  # this host's clock has jumped ahead
    assert found((100, 50, 50, 50), (101, 51, 51, 51), (102, 42, 51, 51)) == 10  # and back
    assert found((100, 50, 50, 0)) == 0  # a host that this one has never seen may be lost


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "clocks can be faked")
def test_a_host_that_leaves_because_of_a_jumping_clock_is_not_said_to_be_stopped(tmp_path: Path) -> None:
    """The first host's clock jumps by 10 s, so that each host seems lost to the other."""
    clock, run_dir = FakeClock(tmp_path / "clock"), tmp_path / "run"
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--workers", "1", "--set", "batch.micro_size=1", "--steps", "1000", "--run-dir", str(run_dir)]
    command = [str(SUPPORT / "faulty.toml"), *options, "--set", "strategy.stall_seconds=600"]
    environment = {**os.environ, "STEP_SECONDS": "0.05", "PYTHONPATH": os.pathsep.join(sys.path)}

    def is_training() -> bool:
        events = RunDirectory(run_dir).read_events() if (run_dir / "events.jsonl").exists() else []
        both = [event for event in events if event["event"] == "started" and event["workers"] == 2]
        return bool(both) and len(RunDirectory(run_dir).read_metrics()) > 0

    first_command = [*MANYHANDS, "train", *command, "--hosts", "2", "--rendezvous", endpoint]
    with started(first_command, env=environment | clock.environment()) as first:
        with started([*MANYHANDS, "join", endpoint, *command], env=environment) as other:
            wait_until(is_training, first)
            clock.jump(10)
            wait_until(lambda: (run_dir / "events.jsonl").read_text().count("hosts changed") > 0, first)
            time.sleep(1)
            first.kill()  # if it were stopped, it would be true that the run was
            clock.forget(first.pid)
            _, errors = other.communicate(timeout=120)
        assert other.returncode == 1, errors
        assert re.search("the clocks of the hosts differ by (8|9|10) s or more", errors), errors
        assert "as requested" not in errors
