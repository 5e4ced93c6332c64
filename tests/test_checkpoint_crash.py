"""A save that is killed, at each of the system calls by which it changes files or sends something: SIGKILL, as the call
begins. The checkpoint from before or the new one is whole, what was said to be published is there, and the next save
leaves nothing of it. See support/crashing.py for what is there before."""

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
    """What came of it."""
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


def test_killed_at_some_calls(tmp_path: Path) -> None:
    found = crash("same step there", tmp_path, 4)
    assert {"write", "fsync", "rename", "renameat2", "mkdir", "unlink", "rmdir"} <= set(found["calls"])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_call(tmp_path: Path, scenario: str) -> None:
    crash(scenario, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("s3fs", "moto"))), reason="s3fs and moto[server] aren't installed"
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_request_to_a_store(scenario: str) -> None:
    with running() as url:
        found = crash(scenario, f"s3://{BUCKET}/run", 1, **VARIABLES, AWS_ENDPOINT_URL=url)
    assert "sendto" in found["calls"]
