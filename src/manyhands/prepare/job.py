"""Runs a plan's stages one after the other, in the job's folder; what a run before has left done stays done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from manyhands.errors import Interrupted, ManyhandsError
from manyhands.prepare.bad_records import BadRecord, too_many
from manyhands.prepare.engine import Engine
from manyhands.prepare.engines import open_engine
from manyhands.prepare.job_folder import JobFolder
from manyhands.prepare.options import Options
from manyhands.prepare.plan import Plan, Read, Shuffled, Stage
from manyhands.prepare.progress import JobProgress
from manyhands.prepare.reduce import EVERYTHING, Range
from manyhands.prepare.run_file import cuts_by_size, read_index
from manyhands.prepare.storage import join, read_bytes
from manyhands.prepare.task import Task, TaskResult, finished, runs_path


@dataclass(frozen=True)
class StageResult:
    """What came of a stage: its tasks' results by partition, and its figures."""

    title: str
    folder: str
    results: tuple[TaskResult, ...]
    seconds: float

    @property
    def records(self) -> int:
        """That came out."""
        return sum(result.records for result in self.results)

    @property
    def bad_records(self) -> list[bytes]:
        """Those that were set aside, as lines of JSON, in the order of the partitions."""
        paths = [join(self.folder, f"part-{r.partition:05d}.bad") for r in self.results if r.bad_records]
        return [read_bytes(path) for path in paths]


def run_stages(
    plan: Plan, stages: Sequence[Stage], folder: JobFolder, options: Options, progress: JobProgress
) -> list[StageResult]:
    """Run some first stages of a plan. Raises what tasks raise: the first error ends the others."""
    plan_path = folder.prepare(plan)
    given = options.engine
    engine = open_engine(options) if given is None or isinstance(given, str) else given
    done: list[StageResult] = []
    try:
        for stage in stages:
            tasks = tasks_of(plan, stage, folder, plan_path, done, engine.memory_bytes, options.max_bad_records)
            done.append(_run_stage(stage, tasks, engine, options, progress, sum(_bad(result) for result in done)))
    except KeyboardInterrupt:
        raise Interrupted(
            "preparing was stopped, as asked", where=folder.path, hint="run it again: what is done stays done"
        ) from None
    finally:
        if engine is not given:
            engine.close()
        folder.sweep(plan)
    return done


def tasks_of(
    plan: Plan,
    stage: Stage,
    folder: JobFolder,
    plan_path: str,
    done: Sequence[StageResult],
    memory_bytes: int,
    max_bad_records: int,
) -> list[Task]:
    """A stage's tasks. Behind a shuffle, as many as the arranged records want: that depends on them alone."""
    inputs = tuple(
        tuple(runs_path(folder.stage(plan.stages[number]), result.partition) for result in done[number].results)
        for number in stage.inputs
    )
    ranges = [EVERYTHING] * (stage.partitions or 0)
    if isinstance(stage.source, Shuffled):
        ranges = _ranges(inputs, stage.reduce_bytes, descending=stage.source.reducer.descending)
    return [
        Task(
            plan_path=plan_path,
            folder=folder.stage(stage),
            stage=stage.number,
            partition=partition,
            inputs=inputs,
            wanted=wanted,
            memory_bytes=memory_bytes,
            max_bad_records=max_bad_records,
        )
        for partition, wanted in enumerate(ranges)
    ]


def _ranges(inputs: Sequence[Sequence[str]], reduce_bytes: int, *, descending: bool) -> list[Range]:
    blocks = [block for paths in inputs for path in paths for run in read_index(path) for block in run]
    if not blocks:
        return []
    edges = [None, *cuts_by_size(blocks, reduce_bytes), None]
    ranges = [Range(low, high) for low, high in pairwise(edges)]
    return ranges[::-1] if descending else ranges


def _run_stage(
    stage: Stage, tasks: Sequence[Task], engine: Engine, options: Options, progress: JobProgress, bad_before: int
) -> StageResult:
    began = time.monotonic()
    results: dict[int, TaskResult] = {}
    for task in tasks:
        found = finished(task.folder, task.stage, task.partition)
        if found is not None:
            results[task.partition] = found
    progress.begin(stage.number, stage.title, len(tasks), len(results))
    waiting: set[Future[TaskResult]] = {engine.submit(task) for task in tasks if task.partition not in results}
    bad = bad_before + sum(result.bad_records for result in results.values())
    while waiting:
        ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in ready:
            result = future.result()
            results[result.partition] = result
            bad += result.bad_records
            if bad > options.max_bad_records:
                raise _too_many(tasks[result.partition].folder, result, bad, options.max_bad_records)
            progress.task_done(result, _size_of(stage, result))
        progress.tick(engine.retries)
    progress.end()
    ordered = tuple(results[partition] for partition in sorted(results))
    return StageResult(stage.title, tasks[0].folder if tasks else "", ordered, time.monotonic() - began)


def _bad(result: StageResult) -> int:
    return sum(task.bad_records for task in result.results)


def _size_of(stage: Stage, result: TaskResult) -> int:
    return stage.source.splits[result.partition].size_bytes if isinstance(stage.source, Read) else result.bytes_out


def _too_many(folder: str, result: TaskResult, count: int, limit: int) -> ManyhandsError:
    lines = read_bytes(join(folder, f"part-{result.partition:05d}.bad")).splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return too_many(BadRecord(**last), count, limit)
