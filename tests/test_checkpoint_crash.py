"""A save killed (SIGKILL) before any of its system calls that change files or send data leaves a complete checkpoint.

It is the previous or the new one. A checkpoint that was reported as published exists, and the next save deletes all
leftovers. See support/crashing.py for the initial state of each scenario."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.crashing import SCENARIOS
from support.s3 import BUCKET, VARIABLES, running
from support.tracer import IS_SUPPORTED, MAY_NOT_TRACE

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="the tracer knows Linux on x86-64 and aarch64")


def crash(scenario: str, root: object, stride: int, **variables: str) -> dict[str, Any]:
    """Run a scenario in a subprocess and return its result."""
    command = [sys.executable, "-W", "error", str(TESTS / "support" / "crashing.py"), scenario, str(root), str(stride)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if MAY_NOT_TRACE in done.stderr:
        pytest.skip(MAY_NOT_TRACE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["tries"] > sum(found["calls"].values()) / stride  # the last one wasn't killed
    return found


def test_a_save_killed_at_some_system_calls_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    found = crash("same step there", tmp_path, 4)
    assert {"write", "fsync", "rename", "renameat2", "mkdir", "unlink", "rmdir"} <= set(found["calls"])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_killed_at_every_system_call_leaves_a_valid_checkpoint(tmp_path: Path, scenario: str) -> None:
    crash(scenario, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("s3fs", "moto"))), reason="s3fs and moto[server] aren't installed"
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_killed_at_every_request_to_a_store_leaves_a_valid_checkpoint(scenario: str) -> None:
    with running() as url:
        found = crash(scenario, f"s3://{BUCKET}/run", 1, **VARIABLES, AWS_ENDPOINT_URL=url)
    assert "sendto" in found["calls"]
