"""The same bytes out: with any number of workers and any memory, killed anywhere and run again."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.prepare.engines.engine import JobEngine
from manyhands.prepare.engines.local import Pool
from manyhands.prepare.task import Task, TaskResult
from support.preparing import several_shuffles, write_posts

SCRIPT = Path(__file__).resolve().parent / "support" / "preparing.py"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(folder)
    return folder


@pytest.fixture(scope="module")
def digest(posts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As one worker makes it."""
    written = several_shuffles(posts).write(str(tmp_path_factory.mktemp("one")), workers=1, progress=False)
    assert len(written.files) > 1
    assert all(stage.tasks > 1 for stage in written.stages)
    return written.digest


def sha256s(folder: Path) -> dict[str, str]:
    """Of all files but the events, which have times."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "_events.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run(posts: Path, folder: Path, engine: JobEngine) -> str:
    """The digest; nothing but the output is left."""
    try:
        written = several_shuffles(posts).write(str(folder), engine=engine, progress=False)
    finally:
        engine.close()
    assert {path.name for path in folder.iterdir()} == {*written.files, "_manifest.json", "_events.jsonl"}
    return written.digest


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_the_same_bytes_with_any_number_of_workers_and_any_memory(
    posts: Path, digest: str, tmp_path: Path, workers: int
) -> None:
    memory = 2**30 if workers == 5 else 2**27  # the latter: ranges are worked on a few blocks at a time
    assert run(posts, tmp_path / "out", Pool(workers, memory)) == digest


def test_a_task_that_runs_twice_changes_nothing(posts: Path, digest: str, tmp_path: Path) -> None:
    class Twice(Pool):
        """Runs every task twice, some of them at the same time."""

        def submit(self, task: Task) -> Future[TaskResult]:
            super().submit(task)
            return super().submit(task)

    assert run(posts, tmp_path / "out", Twice(3, 2**30)) == digest


def test_killed_workers_are_replaced(posts: Path, digest: str, tmp_path: Path) -> None:
    pool = Pool(2, 2**30)
    over = threading.Event()

    def kill() -> None:
        generator, killed = random.Random(1), set[int]()
        while pool.retries < 2 and not over.wait(generator.uniform(0.05, 0.2)):
            for pid in pool.pids[:1]:
                # The third time would be a task's last. Looked at after the pids: a killed one has been counted before
                # another takes its place.
                if pid not in killed and pool.retries < 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert run(posts, tmp_path / "out", pool) == digest
    finally:
        over.set()
        killer.join()
    assert pool.retries >= 1


def processes_of(mark: str) -> list[int]:
    """Those whose environment has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it ended meanwhile, or is another user's
    return found


def killed_and_run_again(posts: Path, folder: Path, seconds: float, workers: int) -> str:
    """Start the script, kill it after so long, see its workers end, and run it to the end: its digest."""
    command = [sys.executable, str(SCRIPT), str(posts), str(folder / "out"), str(workers)]
    mark = f"PREPARE_TEST={folder}"
    environment = {**os.environ, "PREPARE_TEST": str(folder), "TMPDIR": str(folder)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    deadline = time.monotonic() + 240
    while processes_of(mark):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    assert not processes_of(mark)
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert not [name for name in sha256s(folder / "out") if not name.startswith(("part-", "_manifest"))]
    return done.stdout.strip()


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_a_killed_driver_leaves_no_processes_or_temporary_files_and_its_job_resumes(
    posts: Path, digest: str, tmp_path: Path, seconds: float
) -> None:
    assert killed_and_run_again(posts, tmp_path, seconds, 2) == digest


@pytest.mark.slow
@pytest.mark.parametrize("case", range(40))
def test_a_driver_can_be_killed_at_any_moment(posts: Path, digest: str, tmp_path: Path, case: int) -> None:
    generator = random.Random(case)
    assert killed_and_run_again(posts, tmp_path, generator.uniform(0.2, 6.0), generator.choice([1, 2, 3, 5])) == digest


def test_a_resumed_job_repeats_no_finished_task(posts: Path, digest: str, tmp_path: Path) -> None:
    class Breaks(Pool):
        """Runs the first two stages, then this process's luck ends."""

        def submit(self, task: Task) -> Future[TaskResult]:
            if task.stage > 1:
                raise KeyboardInterrupt
            return super().submit(task)

    class Counts(Pool):
        """Notes which stages have work."""

        stages: set[int] = set()  # noqa: RUF012

        def submit(self, task: Task) -> Future[TaskResult]:
            self.stages.add(task.stage)
            return super().submit(task)

    with pytest.raises(mh.Interrupted, match="the job was stopped on request"):
        run(posts, tmp_path / "out", Breaks(2, 2**30))
    assert run(posts, tmp_path / "out", Counts(2, 2**30)) == digest
    assert Counts.stages
    assert min(Counts.stages) > 1


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda x: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda x: os._exit(0), "exited with code 0"),
    ],
    ids=["killed", "exited"],
)
def test_a_task_that_always_ends_its_worker_is_named(tmp_path: Path, end: Callable[[Any], None], how: str) -> None:
    made = mh.Dataset.from_records([1]).map(end)
    with pytest.raises(mh.WorkerError, match=f"a task crashed 3 workers: {how}") as caught:
        made.write(str(tmp_path / "out"), workers=1, progress=False)
    assert caught.value.where == "stage 0, partition 0"


def test_two_runs_of_one_job_do_not_interfere(posts: Path, digest: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(posts), str(tmp_path / "out"), "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "out" / ".manyhands" / "lock").exists():
            time.sleep(0.01)
        with pytest.raises(mh.ConfigError, match="another run uses this folder"):
            several_shuffles(posts).write(str(tmp_path / "out"), progress=False)
    finally:
        output, _ = first.communicate(timeout=240)
    assert output.strip() == digest


def test_a_worker_that_uses_too_much_memory_is_replaced(tmp_path: Path) -> None:
    pool = Pool(1, 1)
    made = mh.Dataset.from_records(range(4), partition_bytes=16).map(lambda _: os.getpid())
    written = made.write(str(tmp_path / "out"), engine=pool, progress=False)
    pool.close()
    pids = [pid for name in written.files for pid in set((tmp_path / "out" / name).read_text().split())]
    assert len(pids) == len(set(pids)) == len(written.files) == 2
