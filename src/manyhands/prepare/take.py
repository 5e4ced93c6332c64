"""The first records of a plan, without writing them."""

from __future__ import annotations

from typing import Any

from manyhands.prepare.chunks import records_of
from manyhands.prepare.job import run_stages, tasks_of
from manyhands.prepare.job_folder import JobFolder
from manyhands.prepare.options import Options
from manyhands.prepare.output import run_temporarily
from manyhands.prepare.plan import Plan
from manyhands.prepare.progress import JobProgress
from manyhands.prepare.task import chunks_of


def first_records(plan: Plan, count: int, options: Options) -> list[Any]:
    """The first `count` records. The last stage's tasks run here, one after the other, as far as needed."""

    def read(job: JobFolder, progress: JobProgress) -> list[Any]:
        done = run_stages(plan, plan.stages[:-1], job, options, progress)
        given = options.engine
        memory_bytes = options.total_bytes() if given is None or isinstance(given, str) else given.memory_bytes
        tasks = tasks_of(plan, plan.stages[-1], job, job.plan_path(plan), done, memory_bytes, options.max_bad_records)
        found: list[Any] = []
        for task in tasks:
            for chunk in chunks_of(task):
                found += records_of(chunk)
                if len(found) >= count:
                    return found[:count]
        return found

    result: list[Any] = run_temporarily(plan, options, read)
    return result
