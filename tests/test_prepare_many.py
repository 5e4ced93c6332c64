"""Data jobs of very many tasks and files: order, time that grows with their number, errors, restarts."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
import pytest

import manyhands as mh
from manyhands.corpus.duplicates import MinHash, near_duplicates
from manyhands.corpus.steps import Steps
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.engines.local import Pool
from manyhands.prepare.task import Task, TaskResult, run_task

QUIET: Any = {"workers": 0, "progress": False}


def numbers(count: int) -> mh.Dataset:
    """The numbers up to `count`, one in each partition."""
    return mh.Dataset.from_records(range(count), partition_bytes=1)


@pytest.mark.parametrize("place", ["folder", "glob", "store"])
def test_output_files_beyond_99999_are_read_in_their_order(tmp_path: Path, place: str) -> None:
    found = (9, 10, 99998, 99999, 100000, 100001, 999999, 1000000)
    files = {f"part-{number:05d}.jsonl": f"{number}\n" for number in found}
    if place == "store":
        system, where = fsspec.filesystem("memory"), "memory://beyond"
        for name, text in files.items():
            system.pipe(f"/beyond/{name}", text.encode())
    else:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        where = str(tmp_path / "part-*" if place == "glob" else tmp_path)
    assert mh.Dataset.read(where).take(10, **QUIET) == list(found)


def test_other_names_are_read_in_the_order_of_their_text(tmp_path: Path) -> None:
    names = [
        "10.jsonl",
        "9.jsonl",
        "part-000001.jsonl",
        "part-00001-b.jsonl",
        "part-00001.jsonl",
        "part-100000-b.jsonl",
    ]
    for name in names:
        (tmp_path / name).write_text(json.dumps(name) + "\n")
    assert mh.Dataset.read(str(tmp_path)).take(10, **QUIET) == names


class _OneByOne:
    """An engine whose tasks complete one after the other in a thread, after all were submitted."""

    workers, memory_bytes, retries = 1, 2**30, 0

    def __init__(self, count: int) -> None:
        self._count, self._tasks = count, list[tuple[Task, Future[TaskResult]]]()

    def submit(self, task: Task) -> Future[TaskResult]:
        self._tasks.append((task, Future()))
        if len(self._tasks) == self._count:
            threading.Thread(target=self._run).start()
        return self._tasks[-1][1]

    def _run(self) -> None:
        for task, future in self._tasks:
            future.set_result(run_task(task))

    def close(self) -> None:
        pass


def test_the_driver_looks_at_each_task_equally_often_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def look(future: Future[TaskResult]) -> str:
        nonlocal looks
        looks += 1
        return future.__dict__["_state"]

    state = property(look, lambda future, value: future.__dict__.update(_state=value))
    monkeypatch.setattr(Future, "_state", state, raising=False)
    found = []
    for count in (100, 400):
        looks = 0
        assert numbers(count).count(engine=_OneByOne(count), progress=False) == count
        found.append(looks)
    assert found[1] == 4 * found[0]


def test_a_task_does_not_hold_the_paths_of_all_its_inputs() -> None:
    tasks: list[Task] = []

    class Kept(InProcess):
        def submit(self, task: Task) -> Future[TaskResult]:
            tasks.append(task)
            return super().submit(task)

    assert numbers(300).map(lambda n: n % 2).distinct().count(engine=Kept(2**30), progress=False) == 2
    assert [count for _, count in tasks[-1].inputs] == [300]
    assert tasks[-1].inputs[0][0] == tasks[0].folder


def test_without_workers_a_job_ends_at_the_first_error(tmp_path: Path) -> None:
    def fails(n: int) -> int:
        (tmp_path / str(n)).touch()
        return 1 // (n - 3)

    with pytest.raises(mh.DataError):
        numbers(50).map(fails).count(**QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_the_task_that_crashes_its_workers_is_named_among_many_short_ones(tmp_path: Path) -> None:
    """A worker has been sent the next task already when it crashes."""

    def crashes(n: int) -> int:
        if n == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    pool = Pool(2, 2**30)
    try:
        with pytest.raises(mh.WorkerError, match="a task crashed 3 workers") as raised:
            numbers(60).map(crashes).write(str(tmp_path / "out"), engine=pool, progress=False)
        assert raised.value.where == "stage 0, partition 30"
        assert pool.retries == 2
    finally:
        pool.close()


def test_a_task_that_was_sent_ahead_runs_elsewhere_if_its_worker_is_replaced(tmp_path: Path) -> None:
    def grows(n: int) -> int:
        if n == 5:
            vars(mh)["kept"] = b"x" * 2**28
        return n

    pool = Pool(1, 2**28)
    try:
        summary = numbers(10).map(grows).write(str(tmp_path / "out"), engine=pool, progress=False)
        assert pool.retries == 0
    finally:
        pool.close()
    assert mh.Dataset.read(str(tmp_path / "out")).take(11, **QUIET) == list(range(10))
    assert summary.digest == numbers(10).write(str(tmp_path / "same"), **QUIET).digest


def test_an_interrupt_ends_the_wait_for_tasks() -> None:
    class Endless(InProcess):
        """Its tasks never end. The interrupt comes when the job waits for them, or just before."""

        is_first = True

        def submit(self, task: Task) -> Future[TaskResult]:
            if self.is_first:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            self.is_first = False
            return Future()

    with pytest.raises(mh.Interrupted):
        numbers(10).count(engine=Endless(2**30), progress=False)


def test_repartition_divides_records_into_parts_of_the_given_size(tmp_path: Path) -> None:
    records = [{"n": n, "text": "x" * 1000} for n in range(1000)]
    made = mh.Dataset.from_records(records).repartition(partition_bytes=100_000)
    summary = made.write(str(tmp_path / "out"), **QUIET)
    assert mh.Dataset.read(str(tmp_path / "out")).take(1001, **QUIET) == records
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("part-*"))]
    assert len(sizes) == len(summary.files)
    assert 10 <= len(sizes) <= 12
    assert mh.Dataset.from_records(records).repartition().write(str(tmp_path / "one"), **QUIET).files == (
        "part-00000.jsonl",
    )
    with pytest.raises(mh.ConfigError, match="partition_bytes is not an integer of at least 1"):
        made.repartition(partition_bytes=0)


def test_several_tasks_compute_the_signatures_of_a_small_corpus(tmp_path: Path) -> None:
    texts = [f"{n} " + " ".join(f"{n * 7919 % 99991}-{i}" for i in range(600)) for n in range(400)]
    texts += [text + " more" for text in texts[:40]]
    steps = Steps(tmp_path, QUIET)
    documents, _ = steps.cache(
        "documents", mh.Dataset.from_records([{"id": b"%06d" % n, "text": text} for n, text in enumerate(texts)])
    )
    found, count = near_duplicates(documents, MinHash(bands=4, rows=2), steps)
    events = (tmp_path / "near-duplicates-pairs" / "_events.jsonl").read_text().splitlines()
    tasks = [event["tasks"] for event in map(json.loads, events) if event["event"] == "stage started"]
    assert tasks == [1, 3, 1, 1]
    assert count == 40
    assert found.take(1, **QUIET) == [(b"000400", b"000000")]
