"""Preparing data: Ctrl-C ends a script with one line and exit code 130, leaves nothing behind, and the job resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.members.processes import process_state

SCRIPT = """
import sys, time
from pathlib import Path
import manyhands as mh

def slow(number):
    if number == 30 and not Path("go").exists():
        Path("here").touch()
        time.sleep(1000)
    return number

records = mh.Dataset.from_records(range(40), partition_bytes=80).map(slow)
options = dict(workers=int(sys.argv[2]), progress=False)
print(records.write("out", **options).digest if sys.argv[1] == "write" else records.take(40, **options))
"""


def is_alive(group: int) -> bool:
    """True if a process of this group exists. The test's time limit ends the wait for one that never ends."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("method", "workers"), [("write", 2), ("write", 0), ("take", 0)])
def test_ctrl_c_ends_a_script_with_one_line(method: str, workers: int, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "job.py").write_text(SCRIPT)
    command = [sys.executable, "job.py", method, str(workers)]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "here").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert said.startswith("the job was stopped on request (")
    assert said.count("\n") == 1
    while is_alive(process.pid):
        time.sleep(0.05)
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    if method == "write":
        undisturbed = mh.Dataset.from_records(range(40), partition_bytes=80).map(int)
        expected = undisturbed.write(tmp_path / "expected", workers=0, progress=False).digest
        assert again.stdout.strip() == expected
    else:
        assert again.stdout.strip() == str(list(range(40)))


BUSY = """
import ctypes, os, sys
from pathlib import Path
import manyhands as mh

def busy(number):
    if number == 3 and not Path("go").exists():
        Path("holds.new").write_text(str(os.getpid()))
        os.replace("holds.new", "holds")
        ctypes.PyDLL(None).sleep(1000)  # holds Python's lock
    return number

print(mh.Dataset.from_records(range(40), partition_bytes=80).map(busy).write("out", workers=2, progress=False).digest)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_a_worker_in_a_long_call_ends_with_its_driver_and_a_stopped_one_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(BUSY)
    holds, command = tmp_path / "holds", [sys.executable, "job.py"]

    def start() -> subprocess.Popen[str]:
        holds.unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        while not holds.exists():
            assert process.poll() is None
            time.sleep(0.05)
        return process

    killed = start()
    worker = int(holds.read_text())
    killed.kill()
    killed.communicate()
    while process_state(worker) not in ("", "Z"):
        time.sleep(0.05)
    stopped = start()
    os.kill(int(holds.read_text()), signal.SIGSTOP)
    (tmp_path / "go").touch()
    said, _ = stopped.communicate(timeout=240)
    assert stopped.returncode == 0
    assert len(said.strip()) == 64
