"""Workers as real processes: their environment, failures and stops; and that no process or file is left.

The workers' scripts import no torch, so that a worker starts in about 30 ms.
"""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyhands.errors import ConfigError, Interrupted, Position, WorkerError
from manyhands.launching.function import launch
from manyhands.launching.launcher import run_workers
from manyhands.launching.root_cause import explain_failure
from manyhands.launching.supervision import StopRequest, started_workers
from manyhands.members.processes import has_exited_with_0, process_start, process_state
from manyhands.members.reports import Failure, StatusFile, WorkerEnd, read_failure, read_status, write_failure
from support.processes import started

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
here = Path(sys.argv[1])
def wait_for(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)
"""
DRIVER = """
import sys
from manyhands.launching.launcher import run_workers
from manyhands.errors import ManyhandsError
try:
    run_workers(sys.argv[1:], workers=2)
except ManyhandsError as error:
    print(type(error).__name__, error)
"""
HANDLES_SIGNALS = """
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
(here / f"ready-{rank}").touch()
while not received:
    time.sleep(0.01)
"""

WAITS = "(signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]), time.sleep(600), (here / 'waited').touch())"
"""Code of a worker that waits for a peer, and can be stopped. It leaves a file unless the launcher stops it."""

Script = Callable[[str], list[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Return a function that creates a worker's command from the body of its script."""

    def make(body: str) -> list[str]:
        path = tmp_path / "worker.py"
        path.write_text(PRELUDE + body)
        return [sys.executable, str(path), str(tmp_path)]

    return make


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave a temporary file, a process, a signal handler or a variable behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = children()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert "TORCHELASTIC_SIGNALS_TO_HANDLE" not in os.environ
    assert list(temporary.iterdir()) == []
    assert children() <= before  # a library of an earlier test may still have a helper process


def children() -> set[int]:
    """Return the pids of this process's children, including zombies."""
    return children_of(os.getpid())


def children_of(pid: int) -> set[int]:
    found = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(pid) for pid in tasks.read_text().split()}
    return found


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_workers_get_their_ranks_and_run_as_plain_scripts(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    command = script("""
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS MINE".split()
facts = {name: os.environ[name] for name in names}
facts.update(argv=sys.argv[2:], main=__name__, path=sys.path[0], file=__file__)
(here / f"facts-{rank}").write_text(repr(facts))
print("out of", rank); print("err of", rank, file=sys.stderr)
""")
    run_workers([*command, "$$a", "${local_rank}"], workers=2, environment={"MINE": "x"}, log_dir=tmp_path / "logs")
    facts = [eval((tmp_path / f"facts-{rank}").read_text()) for rank in range(2)]
    for rank in range(2):
        assert facts[rank]["RANK"] == facts[rank]["LOCAL_RANK"] == str(rank)
        assert facts[rank]["WORLD_SIZE"] == facts[rank]["LOCAL_WORLD_SIZE"] == "2"
        assert facts[rank]["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert facts[rank]["argv"] == ["$$a", "${local_rank}"]
        assert facts[rank]["main"] == "__main__"
        assert (facts[rank]["path"], facts[rank]["file"]) == (str(tmp_path), command[1])
        assert facts[rank]["MINE"] == "x"
    assert facts[0]["MASTER_ADDR"] == "127.0.0.1"
    assert facts[0]["MASTER_PORT"] == facts[1]["MASTER_PORT"] != "0"
    assert (tmp_path / "logs" / "worker-1.log").read_text() == "out of 1\nerr of 1\n"
    assert os.listdir(tmp_path / "logs") == ["worker-1.log"]
    assert capfd.readouterr() == ("out of 0\n", "err of 0\n")
    assert caplog.records == []


def test_exit_code_names_the_worker_and_shows_its_log(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script("""
print("my last line", flush=True)
if rank == 1:
    wait_for("printed")
    sys.exit(3)
(here / "printed").touch()
time.sleep(600)
""")
    log = tmp_path / "worker-1.log"
    log.write_text("line of an earlier run\n")
    with pytest.raises(WorkerError, match="worker 1 exited with code 3") as caught:
        run_workers(command, workers=2, log_dir=tmp_path)
    assert caught.value.rank == 1
    assert caught.value.detail == "the last lines of worker 1:\nmy last line"
    assert capfd.readouterr() == ("my last line\n", "")


@pytest.mark.parametrize(
    ("workers", "body"),
    [
        (1, "begin_work(); os._exit(0)"),
        (2, "begin_work(); os._exit(0)"),
        (2, f"begin_work(); os._exit(0) if rank == 0 else {WAITS}"),
        (1, "begin_work(); os.fork() or sys.exit(); os.wait(); os._exit(0)"),  # the child's end is not the worker's
    ],
)
def test_a_worker_that_exits_with_code_0_in_the_middle_of_its_work_has_failed(
    script: Script, tmp_path: Path, workers: int, body: str
) -> None:
    command = script(f"from manyhands.members.reports import begin_work, end_work\n{body}")
    with pytest.raises(WorkerError, match="worker 0 exited with code 0 before it had finished") as caught:
        run_workers(command, workers=workers)
    assert caught.value.rank == 0
    assert "os._exit(0)" in str(caught.value.hint)
    assert not (tmp_path / "waited").exists()


@pytest.mark.parametrize("body", ["begin_work()", "begin_work(); sys.exit()", "begin_work(); end_work(); os._exit(0)"])
def test_a_worker_that_ends_its_work_may_exit_as_it_likes(script: Script, body: str) -> None:
    run_workers(script(f"from manyhands.members.reports import begin_work, end_work\n{body}"), workers=2)


def test_a_worker_of_the_train_command_must_report_its_end(script: Script, tmp_path: Path) -> None:
    """Even if it exits while it imports the recipe, before it has joined a group."""
    with pytest.raises(WorkerError, match="worker 1 exited with code 0 before it had finished"):
        run_workers(script(f"os._exit(0) if rank == 1 else {WAITS}"), workers=2, cooperates=True)
    assert not (tmp_path / "waited").exists()


def test_killed_worker_is_named_with_its_peers_report(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script("""
from manyhands.members.reports import record_failure
from manyhands.errors import WorkerError
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"ready-{rank}").touch()
wait_for("ready-0", "ready-1")
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
record_failure(WorkerError("worker 1 was lost at step 12 / layers.3 / grad", rank=1))
sys.exit(1)
""")
    with pytest.raises(WorkerError, match="worker 1 was killed by SIGKILL") as caught:
        run_workers(command, workers=2)
    assert caught.value.rank == 1
    assert "step 12 / layers.3 / grad" in str(caught.value.detail)
    assert capfd.readouterr() == ("", "")


def test_command_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="was not found"):
        run_workers(["/nowhere/python"], workers=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [0, 130])
def test_signal_to_the_parent_lets_workers_finish(script: Script, tmp_path: Path, number: int, code: int) -> None:
    command = script(
        f"""
{HANDLES_SIGNALS}
(here / f"received-{{rank}}").write_text(str(received))
if rank == 0:
    time.sleep(0.5)  # the other worker's exit must not shorten this one's time
(here / f"saved-{{rank}}").touch()
sys.exit({code})
""".replace(
            "while not received",
            f"""
if rank == 0:
    wait_for("ready-1")
    os.kill(os.getppid(), {number})
while not received""",
        )
    )
    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        run_workers(command, workers=2)
    for rank in range(2):
        assert (tmp_path / f"received-{rank}").read_text() == f"[{int(number)}]"  # once
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_second_interrupt_kills_at_once(script: Script) -> None:
    command = script("""
signal.signal(signal.SIGINT, lambda *_: (here / f"received-{rank}").touch())
(here / f"ready-{rank}").touch()
wait_for("ready-0", "ready-1")
if rank == 0:
    os.kill(os.getppid(), signal.SIGINT)
    wait_for("received-1")  # the launcher has passed it on
    time.sleep(0.5)  # a launcher takes two signals in quick succession for one
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
""")
    with pytest.raises(Interrupted, match="killed at the second Ctrl-C"):
        run_workers(command, workers=2, grace_seconds=600)


def test_workers_that_ignore_the_signal_are_killed_after_the_grace_time(script: Script) -> None:
    command = script("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"ready-{rank}").touch()
wait_for("ready-0", "ready-1")
if rank == 0:
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
""")
    with pytest.raises(Interrupted, match="had not exited after 1 s"):
        run_workers(command, workers=2, grace_seconds=1)


def drive(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupt_of_the_process_group_prints_one_line(script: Script, tmp_path: Path) -> None:
    driver = drive(script(HANDLES_SIGNALS))
    assert wait_until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists(), 240)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=240)
    assert (out, err) == ("Interrupted the run was stopped by SIGINT; its workers exited\n", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires prctl")
def test_workers_end_with_a_killed_parent(script: Script, tmp_path: Path) -> None:
    driver = drive(
        script(
            '(here / f"pid-{rank}").write_text(str(os.getpid())); (here / f"ready-{rank}").touch()\n'
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        )
    )
    assert wait_until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists(), 240)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    assert all(is_alive(pid) for pid in pids)
    driver.kill()
    driver.communicate(timeout=240)
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), 240)
    assert wait_until(lambda: not list((tmp_path / "temporary").iterdir()), 240)


def test_files_of_a_job_whose_processes_were_all_killed_are_deleted_by_the_next_launcher(
    script: Script, tmp_path: Path
) -> None:
    driver = drive(script('(here / f"ready-{rank}").touch(); time.sleep(600)'))
    assert wait_until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists(), 240)
    (shell,) = [pid for pid in children_of(driver.pid) if Path(f"/proc/{pid}/comm").read_text() == "sh\n"]
    os.kill(shell, signal.SIGKILL)
    driver.kill()
    driver.communicate(timeout=240)
    (left,) = (tmp_path / "temporary").iterdir()
    other, of_another_host = left.with_name(f"{left.name}x"), left.with_name(left.name.rpartition("-")[0] + "-2-abc")
    for folder in (other, of_another_host):
        folder.mkdir()
    for folder in (left, other, of_another_host):
        os.utime(folder, (0, 0))
    held = os.open(other, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert run_workers(script(""), workers=1) is None
    assert set((tmp_path / "temporary").iterdir()) == {other, of_another_host}
    os.close(held)
    for folder in (other, of_another_host):
        folder.rmdir()


def test_a_process_with_the_pid_of_an_ended_worker_is_no_worker(tmp_path: Path) -> None:
    with started(["sleep", "600"], start_new_session=True) as other:
        start = process_start(other.pid)
        (tmp_path / f"started-0-{other.pid}-{start}").touch()
        assert started_workers(tmp_path) == {0: other.pid}
        (tmp_path / f"started-0-{other.pid}-{start}").rename(tmp_path / f"started-0-{other.pid}-{int(start) - 1}")
        assert started_workers(tmp_path) == {}
        StopRequest(tmp_path, 1, 1.0).kill_rest()
        assert other.poll() is None


def test_launch_returns_results_in_rank_order() -> None:
    offset = 10

    def work(factor: int, *, plus: int) -> tuple[int, str]:
        time.sleep(0.2 if os.environ["RANK"] == "0" else 0.0)
        return offset + factor * int(os.environ["RANK"]) + plus, os.environ["WORLD_SIZE"]

    assert launch(work, 100, workers=3, plus=1) == [(11, "3"), (111, "3"), (211, "3")]


def test_launch_raises_the_error_of_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("no such thing")
        time.sleep(600)

    with pytest.raises(WorkerError, match="worker 1 failed: ValueError: no such thing") as caught:
        launch(work, workers=2)
    assert caught.value.rank == 1
    assert "in work" in str(caught.value.detail)
    assert capfd.readouterr() == ("", "")


def test_launch_refuses_a_function_that_cannot_be_pickled() -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent"):
        launch(lambda: lock, workers=2)


def end(rank: int, exit_code: int, *, own: bool = False, notices: int | None = None, seconds: float = 0.0) -> WorkerEnd:
    failure = None
    if own or notices is not None:
        failure = Failure(
            rank=rank, pid=1, kind="K", message=f"message of {rank}", traceback="", root_cause=notices, notice=not own
        )
    return WorkerEnd(rank=rank, exit_code=exit_code, seconds=seconds, failure=failure)


@pytest.mark.parametrize(
    ("ends", "root_cause"),
    [
        ([end(0, 1, notices=1), end(1, 1, own=True)], 1),
        ([end(0, 1, notices=1), end(1, -signal.SIGSEGV)], 1),
        ([end(0, 1, notices=1), end(1, 1)], 1),
        ([end(0, 1, notices=1), end(1, -signal.SIGTERM)], 1),  # 1 stalled
        ([end(0, 1, own=True), end(1, -signal.SIGKILL)], 1),  # 0 reported the broken connection as its own error
        ([end(0, 1, own=True), end(1, -signal.SIGKILL, seconds=30.0)], 0),  # the launcher killed 1
        ([end(0, 1, own=True), end(1, -signal.SIGABRT)], 0),  # 1 aborted while it exited
        ([end(0, -signal.SIGTERM), end(1, 2)], 1),
    ],
)
def test_the_root_cause(ends: list[WorkerEnd], root_cause: int) -> None:
    error = explain_failure(ends)
    assert isinstance(error, WorkerError)
    assert error.rank == root_cause


def test_a_stalled_worker_is_described_by_its_peers_report() -> None:
    assert explain_failure([end(0, 1, notices=1), end(1, -signal.SIGTERM)]).what == "message of 0"


def test_the_position_of_the_root_cause_is_known_from_any_report(tmp_path: Path) -> None:
    position, path = Position("step 3, micro-batch 1 / data", 3, 1), tmp_path / "status"

    def written_and_read(error: Exception, where: str | None = None) -> Failure | None:
        failure = Failure.from_error(error, rank=0, pid=1, where=where, position=position if where else Position())
        write_failure(tmp_path / "error", failure)
        return read_failure(tmp_path / "error", 0)

    lost = WorkerError("worker 1 exited without an error report", rank=1, where="worker 1, step 3", position=position)
    own = written_and_read(ValueError("no"), "worker 0, step 3")
    notice = written_and_read(lost)
    alone = written_and_read(ValueError("no"))
    status = StatusFile(str(path), 30.0)
    status.record_position(position)
    read = read_status(path)
    assert read is not None
    for ends, raised in (
        ([WorkerEnd(rank=0, exit_code=1, seconds=0.0, failure=own)], "ValueError: no"),
        ([WorkerEnd(rank=0, exit_code=1, seconds=0.0, failure=notice), end(1, -signal.SIGKILL)], ""),
        ([WorkerEnd(rank=0, exit_code=-signal.SIGKILL, seconds=0.0, position=read.position)], ""),
        ([WorkerEnd(rank=0, exit_code=1, seconds=0.0, failure=alone, position=read.position)], "ValueError: no"),
    ):
        error = explain_failure(ends)
        assert isinstance(error, WorkerError)
        assert (error.position, error.raised) == (position, raised)
    status.close()
    closed = read_status(path)
    assert closed is not None
    assert closed.position == Position()


def test_workers_that_stopped_on_request_are_no_failure() -> None:
    assert isinstance(explain_failure([end(0, 130), end(1, 0)]), Interrupted)


_ONLY_THE_FIRST_THREAD_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(300,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit() of the first thread alone
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the system call")
def test_a_killed_process_whose_threads_still_end_has_not_exited() -> None:
    """It looks like a zombie. On a loaded machine, it was taken for a worker that exited with code 0."""
    with subprocess.Popen([sys.executable, "-c", _ONLY_THE_FIRST_THREAD_ENDS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while process_state(process.pid) != "Z":
            time.sleep(0.01)
        assert not has_exited_with_0(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not has_exited_with_0(process.pid)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_exited_with_0(process.pid)


def test_the_run_command_starts_a_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    # One write for each worker, because their writes may interleave.
    (tmp_path / "package" / "script.py").write_text(
        "import os, sys; sys.stdout.write(os.environ['RANK'] + f' {sys.argv[1:]}\\n')"
    )
    command = [sys.executable, "-m", "manyhands", "run", "--workers", "2", "-m", "package.script", "--its-own", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 ['--its-own', 'x']", "1 ['--its-own', 'x']"]
