"""Runs stages in order in a locked job folder, without repeating completed tasks.

The job folder holds the files that tasks write for each other and for the next run:

    .manyhands/
      lock             the lock, which one run holds, or its ranks share
      plan-IDENTITY-HASH   the plan, which workers load; ranks may have a file each
      IDENTITY/        the files of a stage: part-N.runs or output files, part-N.done, part-N.bad
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from manyhands.errors import ConfigError, InvariantError, ManyhandsError
from manyhands.prepare.engines.engine import OwnedEngine
from manyhands.prepare.io.run_file import cuts_by_size, read_index
from manyhands.prepare.job.one_schema import is_rewritten_folder, one_schema_tasks, renamed
from manyhands.prepare.job.progress import JobProgress
from manyhands.prepare.options import Options, rank_of
from manyhands.prepare.plan.plan import CachedFiles, Plan, Read, Shuffled, Stage, StoreOutput
from manyhands.prepare.records.pickling import pickled
from manyhands.prepare.records.pipeline import BadRecord, too_many_bad_records
from manyhands.prepare.shuffle.reduce import ALL_KEYS, KeyRange, lost_records
from manyhands.prepare.task import (
    Task,
    TaskResult,
    bad_path,
    finished_tasks,
    plan_name,
    plan_prefix,
    remove_torn,
    runs_path,
)
from manyhands.storage.atomic import TEMPORARY, remove_temporary_files, write_atomic
from manyhands.storage.files import exists, join_path, make_folder, names_in, read_bytes, remove
from manyhands.storage.location import is_local
from manyhands.storage.private import make_private_folder
from manyhands.storage.run_lock import FileLock

_CLEARING = "clearing"
"""The content of the lock file while a rank clears the folder. The rank shares the lock afterwards."""

_CLEARING_SECONDS = 20.0
"""The time that a rank waits before it checks again whether the holder of the lock is a rank."""

_TICK_SECONDS = 0.2


class JobFolder:
    """A job's folder, locked while it is open. Raises ConfigError if another run holds the lock.

    together: True if several ranks open the folder at the same time. The first rank clears the folder, and later ranks
    find the files of earlier ranks. output: the folder to which the job publishes its files, if there is one.
    """

    def __init__(self, path: str, *, together: bool = False, output: str | None = None) -> None:
        self.path, self.together, self._output = path, together, output
        self._alone = not together
        self.plan_path = ""  # empty until `prepare` has saved a plan
        if is_local(path):
            make_private_folder(Path(path))
        else:
            make_folder(path)
        self._lock: FileLock | None = None
        if is_local(path):
            self._lock = FileLock(join_path(path, "lock"))
            self._alone = self._lock.take()
            if self._alone:
                try:
                    self._lock.write(_CLEARING if together else "")
                except OSError:  # the disk is full
                    self._lock.close()
                    raise
                # If the file system has no locks, other ranks may be active, so nothing is cleared.
                self._alone = self._lock.is_supported or not together
            elif not (together and self._wait_for_first_rank(self._lock)):
                self._lock.close()
                raise ConfigError(
                    "another run uses this folder", where=path, hint="wait for it to end, or write to another folder"
                )

    @staticmethod
    def _wait_for_first_rank(lock: FileLock) -> bool:
        """Share the lock once the first rank has cleared the folder. Return False if another run holds the lock."""
        while not lock.take(shared=True, patience_seconds=_CLEARING_SECONDS):
            if lock.read() != _CLEARING:
                return False
        return True

    def prepare(self, plan: Plan) -> str:
        """Remove the files of killed runs and other plans, save the plan, and return its path.

        Raises ConfigError if other ranks run another plan.
        """
        if self._alone:
            self._clear(plan)
        else:
            self._refuse_other_plans(plan)
        for stage in plan.stages:
            make_folder(self.stage(stage))
        packed = pickled(plan)
        self.plan_path = join_path(self.path, plan_name(plan, packed))
        write_atomic(self.plan_path, packed)
        if self.together and self._lock is not None:
            self._lock.take(shared=True)
            self._alone = False
        return self.plan_path

    def _clear(self, plan: Plan) -> None:
        current = {self.stage(stage).rpartition("/")[2] for stage in plan.stages}
        for name in names_in(self.path):
            if name not in current and name != "lock" and not is_rewritten_folder(name, current):
                remove(join_path(self.path, name))
        self.sweep(plan)
        if is_local(self.path):
            for folder in self._folders(plan):
                remove_torn(folder, self._output)
            if self._output is not None:
                remove_temporary_files(Path(self._output))

    def _refuse_other_plans(self, plan: Plan) -> None:
        mine = plan_prefix(plan)
        others = [name for name in names_in(self.path) if name.startswith("plan-") and not name.endswith(TEMPORARY)]
        if not all(name.startswith(mine) for name in others):
            raise ConfigError(
                "the ranks don't run the same job",
                where=self.path,
                expected=mine,
                got=", ".join(others),
                hint="all ranks must run the same script with the same Python and Manyhands, and see the same input "
                "files; if an earlier version of the job was killed, start one rank first, or remove the folder",
            )

    def sweep(self, plan: Plan) -> None:
        """Remove the temporary files of killed tasks."""
        for folder in self._folders(plan) if not self.together or self._alone else ():
            for name in names_in(folder):
                if name.endswith(TEMPORARY):
                    remove(join_path(folder, name))

    def _folders(self, plan: Plan) -> list[str]:
        """Return the folders of all stages, and the folders of files that were written again."""
        stages = {self.stage(stage).rpartition("/")[2] for stage in plan.stages}
        again = [name for name in names_in(self.path) if is_rewritten_folder(name, stages)]
        return [self.stage(stage) for stage in plan.stages] + [join_path(self.path, name) for name in again]

    def stage(self, stage: Stage) -> str:
        """Return the folder of a stage's files."""
        return join_path(self.path, stage.identity[:20])

    def close(self, *, delete: bool) -> None:
        """Release the lock. delete: if True, remove the folder and its contents."""
        if delete and exists(self.path):
            remove(self.path)
        if self._lock is not None:
            self._lock.close()


def open_engine(options: Options) -> OwnedEngine:
    """Return the engine of `options`, which by default runs processes on this machine.

    Raises ConfigError if it can't be reached.
    """
    from manyhands.prepare.engines.engine import GivenEngine, InProcess
    from manyhands.prepare.engines.local import persistent_pool
    from manyhands.prepare.engines.ranks import Ranks

    name = options.engine if isinstance(options.engine, str) else ""
    total, given = options.total_bytes(), None if options.memory is None else options.total_bytes()
    default = options.task_bytes()
    if options.engine is not None and not isinstance(options.engine, str):
        return GivenEngine(options.engine, options.num_workers(), default)
    if name.startswith("dask://"):
        from manyhands.prepare.engines.dask import DaskEngine

        return DaskEngine(name.replace("dask://", "tcp://", 1), given, default)
    if name.startswith("ray"):
        from manyhands.prepare.engines.ray import RayEngine

        return RayEngine(name if name.startswith("ray://") else None, given, default)
    here: OwnedEngine = InProcess(total) if options.workers == 0 else persistent_pool(options.num_workers(), default)
    rank = rank_of(options)
    return here if rank is None else Ranks(rank, here)


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: the results of its tasks, in the order of partitions, and its figures.

    rewritten: the partitions whose output files were written again, into the folder `rewritten_folder`.
    """

    title: str
    folder: str
    results: tuple[TaskResult, ...]
    seconds: float
    rewritten: frozenset[int] = frozenset()
    rewritten_folder: str = ""

    def path_of(self, result: TaskResult) -> str:
        """Return the path of a task's output file."""
        return join_path(self.rewritten_folder if result.partition in self.rewritten else self.folder, str(result.file))

    @property
    def records(self) -> int:
        """Return the number of records that the stage wrote."""
        return sum(result.records for result in self.results)

    @property
    def bad_records(self) -> list[bytes]:
        """Return the records that were set aside, as JSON lines, in the order of partitions."""
        paths = [bad_path(self.folder, r.partition) for r in self.results if r.bad_records]
        return [read_bytes(path) for path in paths]


def run_stages(
    plan: Plan, stages: Sequence[Stage], folder: JobFolder, options: Options, progress: JobProgress
) -> list[StageResult]:
    """Run `stages`, the first stages of a plan. The first error of a task ends the other tasks, and is raised."""
    bad = cached_bad_records(plan)
    cached = len(bad)
    if cached > options.max_bad_records:
        raise too_many_bad_records(BadRecord(**json.loads(bad[-1])), cached, options.max_bad_records)
    plan_path = folder.prepare(plan)
    engine = open_engine(options)
    done: list[StageResult] = []
    try:
        for stage in stages:
            tasks = tasks_of(plan, stage, folder, plan_path, done, engine.memory_bytes, options.max_bad_records)
            result = _run_stage(stage, tasks, engine, options, progress, cached + sum(_bad(result) for result in done))
            check_counts(stage, done, [task.records_read for task in result.results])
            rewriting = one_schema_tasks(result.results, tasks)
            if rewriting:
                make_folder(rewriting[0].folder)
                again = _run_stage(renamed(stage), rewriting, engine, options, progress, 0)
                result = _with_rewritten(result, again)
            done.append(result)
    finally:
        engine.close()
        folder.sweep(plan)
    return done


def cached_bad_records(plan: Plan) -> list[bytes]:
    """Return the records that were set aside when the caches of a plan were computed, as JSON lines."""
    sources = [stage.source for stage in plan.stages]
    paths = dict.fromkeys(source.bad_path for source in sources if isinstance(source, CachedFiles) and source.bad_path)
    return [line for path in paths for line in read_bytes(path).splitlines(keepends=True)]


def check_counts(stage: Stage, done: Sequence[StageResult], records_read: Sequence[Sequence[int]]) -> None:
    """Check that the tasks of a stage together read each record of the stages before it exactly once.

    records_read: the `records_read` of each task of the stage (see `TaskResult`). Raises DataError.
    """
    for position, number in enumerate(stage.inputs):
        read = sum(records[position] for records in records_read)
        if read != done[number].records:
            raise lost_records(f"stage {stage.number}, which reads stage {number}", done[number].records, read)


def _with_rewritten(result: StageResult, again: StageResult) -> StageResult:
    """Replace the files that were written again. The bad records are still those of the first tasks."""
    files = {each.partition: each for each in again.results}
    results = tuple(
        replace(old, bytes_out=files[old.partition].bytes_out, sha256=files[old.partition].sha256)
        if old.partition in files
        else old
        for old in result.results
    )
    for old in result.results:
        if old.partition in files and files[old.partition].records != old.records:
            raise InvariantError(
                "a file has different records than the one that it replaces",
                where=again.folder,
                expected=old.records,
                got=files[old.partition].records,
            )
    seconds = result.seconds + again.seconds
    return replace(result, results=results, seconds=seconds, rewritten=frozenset(files), rewritten_folder=again.folder)


def tasks_of(
    plan: Plan,
    stage: Stage,
    folder: JobFolder,
    plan_path: str,
    done: Sequence[StageResult],
    memory_bytes: int,
    max_bad_records: int,
) -> list[Task]:
    """Return the tasks of a stage. After a shuffle, their number depends only on the size of the shuffled records."""
    # Pass the number of files instead of their paths, because each task is sent to a worker, and all tasks read all
    # files.
    inputs = tuple((folder.stage(plan.stages[number]), len(done[number].results)) for number in stage.inputs)
    ranges = [ALL_KEYS] * (stage.tasks or 0)
    if isinstance(stage.source, Shuffled):
        ranges = _ranges(inputs, stage.reduce_bytes, descending=stage.source.reducer.descending)
        if isinstance(stage.end, StoreOutput):
            ranges = ranges or [ALL_KEYS]  # without records, a store still has its metadata
    return [
        Task(
            plan_path=plan_path,
            folder=folder.stage(stage),
            stage=stage.number,
            partition=partition,
            inputs=inputs,
            key_range=key_range,
            memory_bytes=memory_bytes,
            max_bad_records=max_bad_records,
        )
        for partition, key_range in enumerate(ranges)
    ]


def _ranges(inputs: Iterable[tuple[str, int]], reduce_bytes: int, *, descending: bool) -> list[KeyRange]:
    paths = (runs_path(folder, partition) for folder, count in inputs for partition in range(count))
    blocks = [block for path in paths for run in read_index(path) for block in run]
    if not blocks:
        return []
    edges = [None, *cuts_by_size(blocks, reduce_bytes), None]
    ranges = [KeyRange(low, high) for low, high in pairwise(edges)]
    return ranges[::-1] if descending else ranges


def _run_stage(
    stage: Stage, tasks: Sequence[Task], engine: OwnedEngine, options: Options, progress: JobProgress, bad_before: int
) -> StageResult:
    started = time.monotonic()
    results = finished_tasks(tasks)
    progress.start(stage.number, stage.title, len(tasks), len(results))
    bad = bad_before + sum(result.bad_records for result in results.values())
    left = [task for task in tasks if task.partition not in results]
    for result in _completed(engine, left, lambda: progress.tick(engine.retries)):
        results[result.partition] = result
        bad += result.bad_records
        if bad > options.max_bad_records:
            raise _too_many(tasks[0].folder, result, bad, options.max_bad_records)
        progress.task_done(result, _size_of(stage, result))
    progress.end()
    ordered = tuple(results[partition] for partition in sorted(results))
    return StageResult(stage.title, tasks[0].folder if tasks else "", ordered, time.monotonic() - started)


def _completed(engine: OwnedEngine, tasks: Iterable[Task], tick: Callable[[], None]) -> Iterator[TaskResult]:
    """Run tasks and yield their results as they complete. Raises the error of the first task that fails.

    Futures add themselves to a queue when they are done, so the time per future does not depend on their number.
    """
    done: SimpleQueue[Future[TaskResult]] = SimpleQueue()
    running = 0
    for task in tasks:
        engine.submit(task).add_done_callback(done.put)
        running += 1
        while not done.empty():  # an engine may complete the task in `submit`
            yield done.get().result()
            running -= 1
    while running:
        tick()
        try:
            future = done.get(timeout=_TICK_SECONDS)
        except Empty:
            continue
        yield future.result()
        running -= 1


def _bad(result: StageResult) -> int:
    return sum(task.bad_records for task in result.results)


def _size_of(stage: Stage, result: TaskResult) -> int:
    if not isinstance(stage.source, Read):
        return result.bytes_out
    return sum(stage.source.splits[index].size_bytes for index in stage.partitions_of(result.partition))


def _too_many(folder: str, result: TaskResult, count: int, limit: int) -> ManyhandsError:
    lines = read_bytes(bad_path(folder, result.partition)).splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return too_many_bad_records(BadRecord(**last), count, limit)
