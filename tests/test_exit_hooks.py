"""Exit hooks report the errors of the latest group, and keep no closed group in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from manyhands.members.reports import ERROR_FILE_VARIABLE, PARENT_REPORTS_VARIABLE, read_failure

ROUNDS = """
import gc, os, sys
from torch.distributed import HashStore
from manyhands.members.exit_hooks import ExitHooks
from manyhands.members.membership import Membership
from manyhands.comm.process_arena import ProcessArena

first = sys.excepthook
for _ in range(20):
    membership = Membership(HashStore(), 0, 1, ProcessArena(), stall_seconds=60, abandon=lambda error: None)
    ExitHooks(membership)
    membership.close()
    del membership
gc.collect()
print(sum(type(each) is Membership for each in gc.get_objects()), sys.excepthook.__self__._previous_hook is first)
raise ValueError("after all groups")
"""


def test_closed_groups_are_freed_and_later_errors_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    variables = {**os.environ, PARENT_REPORTS_VARIABLE: "1", ERROR_FILE_VARIABLE: str(path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", ROUNDS], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "0 True\n", "")
    failure = read_failure(path, 0)
    assert failure is not None
    assert failure.message == "after all groups"
