"""The worker named when worker 0 is killed while its process has the store (as it does on several hosts)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from manyhands.errors import WorkerError
from manyhands.launching.root_cause import explain_failure
from manyhands.members.reports import ERROR_FILE_VARIABLE, Failure, WorkerEnd, read_failure
from support.shared_runs import folder_of_all_processes, made_once

MEMBER = """
import time
from manyhands.comm.connect import connect
group = connect()
group.status("step 3 / update", 3)
group.barrier("all have joined / control")
print("joined", flush=True)
while True:
    group.barrier("step 3 / control")
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Failure:
    """The error report of worker 1 after worker 0 was killed, and the store with it."""
    folder = made_once(folder_of_all_processes(tmp_path_factory, "root-cause") / "report", kill_worker_0)
    failure = read_failure(folder / "error-1.json", 1)
    assert failure is not None
    return failure


def kill_worker_0(folder: Path) -> None:
    """Let worker 1 write its report into the folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER],
            env={**shared, "RANK": str(rank), ERROR_FILE_VARIABLE: str(folder / f"error-{rank}.json")},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == b"joined\n"
        members[0].kill()
        assert members[1].wait(240) == 1
    finally:
        for member in members:
            member.kill()
            member.communicate()


@pytest.mark.parametrize("exit_code", [None, 0, -signal.SIGSEGV, -signal.SIGKILL], ids=str)
def test_a_killed_worker_0_is_named_from_the_reports_of_its_peers(report: Failure, exit_code: int | None) -> None:
    """exit_code: of worker 0, as its launcher sees it; None: it is on another host."""
    ends = [WorkerEnd(rank=1, exit_code=1, seconds=5.0, failure=report)]
    if exit_code is not None:
        ends.insert(0, WorkerEnd(rank=0, exit_code=exit_code, seconds=4.9))
    error = explain_failure(ends)
    assert isinstance(error, WorkerError)
    assert error.rank == 0
    assert "worker 0" in error.what
    assert error.position.step == 3


def test_a_worker_that_only_saw_a_broken_connection_is_the_last_candidate() -> None:
    broken = Failure.from_error(WorkerError("a worker failed, and the store with its report is lost"), rank=1, pid=1)
    secondhand = WorkerEnd(rank=1, exit_code=1, seconds=4.0, failure=broken)
    for exit_code in (1, -signal.SIGSEGV):
        error = explain_failure([secondhand, WorkerEnd(rank=0, exit_code=exit_code, seconds=5.0)])
        assert isinstance(error, WorkerError)
        assert error.rank == 0
    alone = explain_failure([secondhand])
    assert alone.what == broken.what


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 1 GB"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_an_allocation_error_has_a_hint_about_memory(error: Exception) -> None:
    end = WorkerEnd(rank=0, exit_code=1, seconds=1.0, failure=Failure.from_error(error, rank=0, pid=1))
    assert "memory ran out" in str(explain_failure([end]).hint)
    other = WorkerEnd(rank=0, exit_code=1, seconds=1.0, failure=Failure.from_error(ValueError("no"), rank=0, pid=1))
    assert explain_failure([other]).hint is None
