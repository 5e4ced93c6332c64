"""Engines only decide where tasks run: the output has the same bytes, even if a worker, a host or a rank dies."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.engines.local import Pool
from manyhands.prepare.engines.ranks import Ranks
from manyhands.surroundings import Rank, parse_rank
from support import hosts
from support.preparing import several_shuffles, write_posts

SCRIPT = Path(__file__).resolve().parent / "support" / "preparing.py"
PATIENCE_SECONDS = 0.5
needs_dask = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="the extra `dask` is missing")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` isn't installed")
needs_hosts = pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not())


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(folder)
    return folder


@pytest.fixture(scope="module")
def digest(posts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the output of one worker."""
    pool = Pool(1, 2**30)
    try:
        return several_shuffles(posts).write(str(tmp_path_factory.mktemp("one")), engine=pool, progress=False).digest
    finally:
        pool.close()


def nothing_is_left(folder: Path) -> bool:
    return all(path.name.startswith(("part-", "_manifest", "_events")) for path in folder.iterdir())


def events_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "_events.jsonl").read_text().splitlines()]


def start(posts: Path, folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(posts), str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# Objects of users


class RunsHere:
    """The smallest engine: one method."""

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(task())
        return future


def test_an_object_with_submit_only_is_an_engine() -> None:
    numbers = mh.Dataset.from_records(list(range(5)))
    assert numbers.sort_by(lambda number: -number).take(2, engine=RunsHere()) == [4, 3]
    assert numbers.count(engine=RunsHere()) == 5


def test_an_executor_of_the_standard_library_is_an_engine(posts: Path, tmp_path: Path) -> None:
    read = mh.Dataset.read(f"{posts}/posts-*.jsonl").map(lambda post: post["id"]).sort_by()
    here = read.write(str(tmp_path / "here"), engine=RunsHere(), progress=False)
    assert nothing_is_left(tmp_path / "here")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        written = read.write(str(tmp_path / "out"), engine=executor, progress=False)
    assert written.digest == here.digest == read.write(str(tmp_path / "one"), workers=0, progress=False).digest
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        read.count(engine=executor)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda task: task(), "the engine did not return a future"),
        (lambda task: RunsHere().submit(lambda: None), "the engine did not return the result of a task"),
    ],
)
def test_an_engine_that_returns_something_else_is_refused(made: Callable[[Any], Any], message: str) -> None:
    class Wrong:
        def submit(self, task: Any) -> Any:
            return made(task)

    with pytest.raises(mh.ConfigError, match=message):
        mh.Dataset.from_records([1]).count(engine=Wrong())


# Static ranks


def test_ranks_share_a_job(posts: Path, digest: str, tmp_path: Path) -> None:
    found: dict[int, Any] = {}
    pools = [Pool(1, 2**30) for _ in range(3)]

    def run(number: int) -> None:
        with_rank = Ranks(Rank(number, 3), pools[number], PATIENCE_SECONDS)
        try:
            found[number] = several_shuffles(posts).write(str(tmp_path / "out"), engine=with_rank, progress=False)
        finally:
            with_rank.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number].digest for number in range(3)] == [digest] * 3
    assert nothing_is_left(tmp_path / "out")


def test_a_rank_runs_the_tasks_of_ranks_that_never_start(posts: Path, digest: str, tmp_path: Path) -> None:
    class Counts(Ranks):
        """Counts how often other ranks were found to be absent, each time after all the patience."""

        found_absent = 0

        def _poll(self) -> None:
            before = set(self._absent)
            super()._poll()
            self.found_absent += not self._absent <= before

    engine = Counts(Rank(2, 3), Pool(2, 2**30), PATIENCE_SECONDS)
    try:
        written = several_shuffles(posts).write(str(tmp_path / "out"), engine=engine, progress=False)
    finally:
        engine.close()
    assert written.digest == digest
    assert nothing_is_left(tmp_path / "out")
    assert sum(stage.tasks for stage in written.stages) > 9
    assert 1 <= engine.found_absent <= 2  # waits once for each absent rank, not once per task


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["192MiB", "4GiB"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_any_number_of_ranks_with_any_memory_gives_the_same_bytes(
    posts: Path, digest: str, tmp_path: Path, ranks: int, memory: str
) -> None:
    options = [{"engine": f"rank {number} of {ranks}", "workers": 1, "memory": memory} for number in range(ranks)]
    started = [start(posts, tmp_path / "out", json.dumps(rank)) for rank in options]
    assert [rank.communicate(timeout=240)[0] for rank in started] == [digest] * ranks
    assert nothing_is_left(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("case", range(6))
def test_any_rank_can_be_killed_and_restarted(posts: Path, digest: str, tmp_path: Path, case: int) -> None:
    generator = random.Random(case)
    names = [f"rank {number} of 3" for number in range(3)]
    ranks = [start(posts, tmp_path / "out", name) for name in names]
    time.sleep(generator.uniform(0.5, 5))
    victim = generator.randrange(3)
    ranks[victim].kill()
    ranks[victim].communicate()
    ranks[victim] = start(posts, tmp_path / "out", names[victim])
    assert [rank.communicate(timeout=240)[0] for rank in ranks] == [digest] * 3
    assert nothing_is_left(tmp_path / "out")


def test_ranks_that_run_another_job_are_refused(posts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".manyhands"
    read = mh.Dataset.read(f"{posts}/posts-*.jsonl")
    gate = threading.Event()

    class Waits(InProcess):
        """Blocks each task until the test is over."""

        def submit(self, task: Any) -> Any:
            gate.wait(240)
            return super().submit(task)

    first = Ranks(Rank(0, 2), Waits(2**30), 0.0)
    second = Ranks(Rank(1, 2), Pool(1, 2**30), 0.0)
    thread = threading.Thread(target=lambda: read.write(str(tmp_path / "out"), engine=first, progress=False))
    thread.start()
    try:
        while not list(folder.glob("plan-*[!p]")):
            time.sleep(0.01)
        with pytest.raises(mh.ConfigError, match="the ranks don't run the same job"):
            read.map(len).write(str(tmp_path / "out"), engine=second, progress=False)
        with pytest.raises(mh.ConfigError, match="another run uses this folder"):
            read.write(str(tmp_path / "out"), workers=0, progress=False)
    finally:
        gate.set()
        thread.join()
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"MANYHANDS_RANK": "1", "MANYHANDS_RANKS": "2", "RANK": "5", "WORLD_SIZE": "6"}, (1, 2)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, (6, 8)),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
            (7, 8),
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"JOB_COMPLETION_INDEX": "2", "MANYHANDS_RANKS": "5"}, (2, 5)),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}, (0, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
    ],
)
def test_the_scheduler_sets_the_rank(environment: dict[str, str], rank: tuple[int, int]) -> None:
    assert parse_rank("ranks", environment) == rank


def test_names_of_engines_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mh.Dataset.from_records([1, 2])
    monkeypatch.delenv("RANK", raising=False)
    for name, message in [
        ("spark", "unknown engine"),
        (8786, "unknown engine"),
        ("rank 4 of 4", "the rank is out of range"),
        ("ranks", 'engine="ranks" requires a rank in the environment'),
    ]:
        with pytest.raises(mh.ConfigError, match=re.escape(message)):
            made.count(engine=name)
    assert made.count(engine="rank 1 of 2", workers=1) == 2  # each rank counts by itself
    assert made.cache().take(2, engine="rank 1 of 2", workers=1) == [1, 2]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(mh.ConfigError, match="needs a package that isn't installed"):
        made.count(engine="dask://nowhere:8786")


# Dask


@contextmanager
def dask_cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Run a Dask scheduler and workers on this machine. Yield its address and the processes, the scheduler first."""
    file = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    module = [sys.executable, "-m", "distributed.cli"]
    commands = [[f"{module[-1]}.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]]
    commands += [[f"{module[-1]}.dask_worker", "--no-nanny", "--nthreads", "2", "--no-dashboard"]] * workers
    started = [
        subprocess.Popen([*module[:-1], *command, "--scheduler-file", str(file)], cwd=folder, **quiet)  # type: ignore[call-overload]
        for command in commands
    ]
    try:
        import distributed

        with distributed.Client(scheduler_file=str(file), timeout=240, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=240)
            address = client.scheduler.address
        yield address.replace("tcp", "dask"), started
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


@needs_dask
def test_dask_gives_the_same_bytes_with_a_worker_killed(posts: Path, digest: str, tmp_path: Path) -> None:
    with dask_cluster(tmp_path, 2) as (address, (_, worker, _)):
        driver = start(posts, tmp_path / "out", address)
        stages = tmp_path / "out" / ".manyhands"
        while not list(stages.glob("*/*.done")) and driver.poll() is None:
            time.sleep(0.01)
        worker.kill()
        assert driver.communicate(timeout=240)[0] == digest
        assert nothing_is_left(tmp_path / "out")
        bad = mh.Dataset.read(f"{posts}/posts-1.jsonl").map(lambda post: 1 / (post["id"] - 301))
        with pytest.raises(mh.DataError, match="raised ZeroDivisionError: division by zero") as caught:
            bad.write(str(tmp_path / "bad"), engine=address, progress=False)
        assert caught.value.where == f"{posts}/posts-1.jsonl, line 101"
        dies = mh.Dataset.from_records([1]).map(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(mh.WorkerError, match="a task crashed 3 workers: killed by SIGKILL"):
            dies.write(str(tmp_path / "dies"), engine=address, progress=False)


@needs_dask
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["800MiB", "8GiB"])  # for four workers: 800MiB holds only a few blocks at a time
@pytest.mark.parametrize("workers", [1, 2])
def test_dask_gives_the_same_bytes_with_any_workers_and_memory(
    posts: Path, digest: str, tmp_path: Path, workers: int, memory: str
) -> None:
    with dask_cluster(tmp_path, workers) as (address, _):
        how = json.dumps({"engine": address, "memory": memory})
        assert start(posts, tmp_path / "out", how).communicate(timeout=240)[0] == digest


@needs_dask
@pytest.mark.slow
def test_a_job_resumes_on_another_engine_when_the_dask_scheduler_is_gone(
    posts: Path, digest: str, tmp_path: Path
) -> None:
    with dask_cluster(tmp_path, 1) as (address, (scheduler, _)):
        command = [sys.executable, str(SCRIPT), str(posts), str(tmp_path / "out"), address]
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not list((tmp_path / "out").glob(".manyhands/*/*.done")) and driver.poll() is None:
            time.sleep(0.01)
        scheduler.kill()
        assert "WorkerError: the Dask scheduler is gone" in driver.communicate(timeout=240)[1]
    assert start(posts, tmp_path / "out", "rank 0 of 1").communicate(timeout=240)[0] == digest
    assert nothing_is_left(tmp_path / "out")


def touch_and_wait(path: str) -> str:
    Path(path).touch()
    time.sleep(600)
    return path


@needs_dask
def test_a_job_ends_when_all_dask_workers_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.prepare.engines import dask as dask_engine

    monkeypatch.setattr(dask_engine, "_NO_WORKERS_SECONDS", 1.0)
    task_started = tmp_path / "task-started"
    with dask_cluster(tmp_path, 1) as (address, (_, worker)):

        def kill() -> None:
            while not task_started.exists():
                time.sleep(0.01)
            worker.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        job = mh.Dataset.from_records([str(task_started)]).map(touch_and_wait)
        with pytest.raises(mh.WorkerError, match="Dask has had no workers for 1 s"):
            job.write(str(tmp_path / "out"), engine=address, progress=False)
        killer.join()
    events = {event["event"]: event for event in events_in(tmp_path / "out")}
    assert events["tasks restarted"]["tasks"] == 1
    assert "no workers" in events["job failed"]["why"]


@needs_dask
def test_a_missing_dask_scheduler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.prepare.engines import dask as dask_engine

    monkeypatch.setattr(dask_engine, "_WAIT_SECONDS", 0.5)
    with pytest.raises(mh.ConfigError, match="no Dask scheduler answers"):
        mh.Dataset.from_records([1]).count(engine="dask://127.0.0.1:9")


@needs_dask
@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_dask_gives_the_same_bytes_with_a_host_killed(posts: Path, digest: str, tmp_path: Path, seconds: float) -> None:
    with hosts.hosts(3) as (first, second, third):
        dask = [sys.executable, "-m", "distributed.cli.dask_"]
        scheduler = f"{first.address}:8786"
        first.start([*dask[:-1], dask[-1] + "scheduler", "--no-dashboard"], tmp_path / "scheduler")
        for host in (second, third):
            host.start(
                [
                    *dask[:-1],
                    dask[-1] + "worker",
                    f"tcp://{scheduler}",
                    "--no-dashboard",
                    "--no-nanny",
                    "--nthreads",
                    "2",
                ],
                tmp_path / host.name,
            )
        driver = first.start(
            [sys.executable, str(SCRIPT), str(posts), str(tmp_path / "out"), f"dask://{scheduler}"], tmp_path / "driver"
        )
        while not (tmp_path / "out" / ".manyhands").exists():
            assert driver.poll() is None, (tmp_path / "driver").read_text()
            time.sleep(0.01)
        time.sleep(seconds)
        second.end()
        driver.wait(240)
    assert (tmp_path / "driver").read_text().endswith(digest)
    assert nothing_is_left(tmp_path / "out")


# Ray


def processes_named(name: str, mark: str) -> list[int]:
    """Return the processes whose command line starts with `name` and whose environment contains `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_it = (path / "cmdline").read_bytes().startswith(name.encode())
            if is_it and mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass  # the process ended meanwhile
    return found


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes_with_a_worker_killed(
    posts: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:  # a short path, because Ray puts its sockets there
        monkeypatch.setenv("RAY_TMPDIR", short)
        (Path(short) / "ray").mkdir()
        (Path(short) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")  # a killed cluster leaves such a file
        for name, value in {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "PREPARE_TEST": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        ray_with_a_worker_killed(posts, digest, tmp_path)


def ray_with_a_worker_killed(posts: Path, digest: str, tmp_path: Path) -> None:
    driver = start(posts, tmp_path / "out", "ray")
    while not list((tmp_path / "out").glob(".manyhands/*/*.done")) and driver.poll() is None:
        time.sleep(0.01)
    workers = processes_named("ray::run_on_host", f"PREPARE_TEST={tmp_path}")
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    assert driver.communicate(timeout=240)[0].endswith(digest)  # Ray reports the lost worker on stdout first
    assert "tasks restarted" in [event["event"] for event in events_in(tmp_path / "out")]
    assert nothing_is_left(tmp_path / "out")
    program = """
import os, signal, sys
import manyhands as mh
try:
    mh.Dataset.from_records([1, 0]).map(lambda x: 1 / x).write(sys.argv[1], engine="ray", progress=False)
except mh.DataError as error:
    print(error.where)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "bad")]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    assert completed.stdout.strip() == "given records, partition 0, record 2"
