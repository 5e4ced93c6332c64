"""The output folder and its manifest, caches and previews, and the summary of a job.

Tasks write output files in the hidden job folder. When all tasks are complete, the files are moved to the output
folder, and the manifest that lists them is written last. A cache is also an output, in a format that is read without
parsing. `take` computes the first records without writing output.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from manyhands.data.token_format import MANIFEST
from manyhands.errors import ConfigError, Interrupted, ManyhandsError
from manyhands.formatting import format_bytes, format_count, format_seconds
from manyhands.output import is_terminal, say
from manyhands.prepare.io.formats import CHUNKS
from manyhands.prepare.io.manifest import read_output_manifest
from manyhands.prepare.job.progress import EVENTS, JobEvents, JobProgress
from manyhands.prepare.job.publishing import BAD_RECORDS, JOB, own_names, publish
from manyhands.prepare.job.stages import JobFolder, StageResult, check_counts, run_stages, tasks_of
from manyhands.prepare.job.stopping import stopping_on_request
from manyhands.prepare.options import Options, patience_seconds, rank_of
from manyhands.prepare.plan.plan import (
    Arranged,
    Cached,
    CachedFiles,
    Node,
    Output,
    Plan,
    Step,
    input_paths,
    make_plan,
)
from manyhands.prepare.records.chunks import records_of
from manyhands.prepare.task import chunks_of
from manyhands.storage.atomic import is_temporary
from manyhands.storage.files import exists, join_path, names_in, path_below
from manyhands.storage.location import is_local
from manyhands.storage.private import make_private_folder


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """The figures of one stage: the number of its tasks, the records and bytes that they wrote, and its duration."""

    title: str
    tasks: int
    records: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """The result of `Dataset.write`.

    path, files: the output folder, and the names of its files in order. records, bytes: totals of all files.
    bad_records: the number of records that were set aside in `_bad_records.jsonl`. digest: the SHA-256 over all files,
    which is the same for any workers, memory and engine. seconds: the duration of this call. stages: the figures of
    each stage; empty if the output existed already. absent_chunks: the number of chunks that were never written, in
    the zarr stores that the job read. Their cells have the fill value of their array.
    """

    path: str
    files: tuple[str, ...]
    records: int
    bytes: int
    bad_records: int
    digest: str
    seconds: float
    stages: tuple[StageFigures, ...]
    absent_chunks: int = 0

    def __str__(self) -> str:
        """Return a summary for people, in a few lines."""
        bad = f", {format_count(self.bad_records)} bad records set aside" if self.bad_records else ""
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        bad += f", {format_count(self.absent_chunks)} chunks absent from the input" if self.absent_chunks else ""
        lines = [
            f"{format_count(self.records)} records in {files}, {format_bytes(self.bytes)}{bad}: {self.path}",
            *(
                f"  {format_seconds(stage.seconds):>9}  {stage.title}: "
                f"{stage.tasks} task{'' if stage.tasks == 1 else 's'}, "
                f"{format_count(stage.records)} records, {format_bytes(stage.bytes)} written"
                for stage in self.stages
            ),
            f"  {format_seconds(self.seconds):>9}  in all" if self.stages else "  existed already",
            f"  digest     {self.digest}",
        ]
        return "\n".join(lines)


def show(summary: PrepareSummary, *, progress: bool) -> None:
    """Print the summary on standard error if it is a terminal and `progress` is true."""
    if progress and is_terminal(sys.stderr):
        say(str(summary))


_POLL_SECONDS = 0.3


@contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Raise ConfigError in place of an OSError of the block, which writes to an output folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the output folder can't be written: {error.strerror or error}",
            where=folder,
            hint="free some space or choose another folder, and run again: completed tasks are not repeated",
        ) from error


def write_output(plan: Plan, folder: str, options: Options, *, overwrite: bool) -> PrepareSummary:
    """Run a plan and publish its files in `folder`. Reuses the complete or partial output of the same plan.

    Raises ConfigError if the folder holds other files, and any error that a task raises. After an error, no file is
    published, and the same call resumes the job.
    """
    started = time.monotonic()
    folder = folder if not is_local(folder) else os.path.abspath(folder)
    _refuse_own_input(plan, folder)
    existing = read_output_manifest(folder)
    if existing is not None and existing.get("identity") == plan.identity and _is_complete(existing, folder):
        return _summary(existing, folder, [], time.monotonic() - started)
    _refuse_foreign(folder, existing, plan, overwrite=overwrite)
    rank = rank_of(options)
    with _writing(folder):
        job = JobFolder(join_path(folder, JOB), together=rank is not None, output=folder)
    events = JobEvents(folder, None if rank is None else rank.number, options.listeners)
    events.add("job started", identity=plan.identity, stages=len(plan.stages), **options.described())
    complete = False
    stages: list[StageResult] = []
    try:
        with _writing(folder), stopping_on_request(job.path, "run it again: completed tasks are not repeated"):
            manifest = _of_other_ranks(plan, folder, options)
            if manifest is None:
                stages, manifest = _run(plan, folder, job, options, existing, events)
        complete, took = True, time.monotonic() - started
        events.add("published", digest=manifest["digest"], records=manifest["records"], seconds_taken=took)
    except ManyhandsError as error:
        events.add("job stopped" if isinstance(error, Interrupted) else "job failed", why=error)
        raise
    finally:
        job.close(delete=complete)
        events.close()
    summary = _summary(manifest, folder, stages, time.monotonic() - started)
    show(summary, progress=options.progress)
    return summary


def _run(
    plan: Plan, folder: str, job: JobFolder, options: Options, existing: dict[str, Any] | None, events: JobEvents
) -> tuple[list[StageResult], dict[str, Any]]:
    """Run the stages and publish their output, unless another rank has published it.

    Return the stages that ran in this process, and the manifest.
    """
    try:
        with JobProgress(len(plan.stages), show=options.progress, events=events) as progress:
            stages = run_stages(plan, plan.stages, job, options, progress)
    except (ManyhandsError, OSError):
        manifest = _of_other_ranks(plan, folder, options)
        if manifest is None:
            raise
        return [], manifest  # another rank completed the job and removed its folder
    rank = rank_of(options)
    # Rank 0 publishes the output; if it does not do so in time, any other rank does.
    if rank is not None and rank.number > 0:
        deadline = time.monotonic() + patience_seconds(options)
        while time.monotonic() < deadline:
            manifest = _of_other_ranks(plan, folder, options)
            if manifest is not None:
                return stages, manifest
            time.sleep(_POLL_SECONDS)
    return stages, publish(plan, folder, stages, existing)


def _of_other_ranks(plan: Plan, folder: str, options: Options) -> dict[str, Any] | None:
    """Return the manifest of this job's output if this process is a rank, and another rank has published it."""
    if rank_of(options) is None:
        return None
    found = read_output_manifest(folder)
    is_ours = found is not None and found.get("identity") == plan.identity
    return found if found is not None and is_ours and _has_its_files(found, folder) else None


def _has_its_files(manifest: dict[str, Any], folder: str) -> bool:
    return set(names_in(folder)) >= {file["name"] for file in manifest["files"]}


def _is_complete(manifest: dict[str, Any], folder: str) -> bool:
    """Return True if all files exist, and no job is still moving them."""
    return _has_its_files(manifest, folder) and not exists(join_path(folder, JOB))


def run_temporarily(plan: Plan, options: Options, use: Any) -> Any:
    """Call `use(folder, progress)` with a job folder in the system's temporary folder, and remove it afterwards.

    The folder is named after the plan, so the next run reuses and then removes the files of a killed run.
    """
    try:
        return _run_temporarily(plan, options, use)
    except OSError as error:
        raise ConfigError(
            f"the folder for temporary files can't be written: {error.strerror or error}",
            where=str(_root()),
            hint="free some space, or set TMPDIR to another folder",
        ) from error


def _run_temporarily(plan: Plan, options: Options, use: Any) -> Any:
    root = str(private_folder())
    for attempt in range(1000):
        try:
            job = JobFolder(join_path(root, f"{plan.identity[:20]}-{attempt}"))
            break
        except ConfigError:
            continue  # another process runs the same plan in this folder
    else:
        raise ConfigError("another run uses this folder", where=root, hint="wait for it to end")
    try:
        with (
            stopping_on_request(job.path, "run it again"),
            JobProgress(len(plan.stages), show=options.progress) as progress,
        ):
            return use(job, progress)
    finally:
        job.close(delete=True)


def _refuse_foreign(folder: str, existing: dict[str, Any] | None, plan: Plan, *, overwrite: bool) -> None:
    """Raise ConfigError unless the folder is empty, may be overwritten, or holds this plan's output or a partial
    job.
    """
    names = [name for name in names_in(folder) if not name.startswith(EVENTS) and not is_temporary(name)]
    if existing is not None and not overwrite and existing.get("identity") != plan.identity:
        raise ConfigError(
            "the output folder holds the output of another job",
            where=folder,
            hint="the functions, the input or the format have changed: write to a new folder, or use overwrite=True",
        )
    listed = [] if existing is None else [file["name"] for file in existing["files"]]
    ours = {JOB, MANIFEST, BAD_RECORDS, *own_names(plan), *listed}
    foreign = [name for name in names if not (name in ours or name.startswith("part-"))]
    if foreign or (names and existing is None and JOB not in names):
        raise ConfigError(
            "the output folder holds something that is not an output",
            where=folder,
            expected="a new folder, an empty folder, or the folder of an earlier run",
            got=f"a folder with {', '.join((foreign or names)[:5])}",
            hint="choose another folder; nothing was written",
        )
    if is_local(folder) and os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError("the output folder is a file", where=folder, hint="choose another path")


def _refuse_own_input(plan: Plan, folder: str) -> None:
    """Raise ConfigError if the folder holds an input of the job, which publishing would replace.

    A job that was killed while it published would otherwise read its own output, and compute it twice.
    """
    for stage in plan.stages:
        paths = input_paths(stage)
        found = path_below(folder, paths) if paths else None
        if found is not None:
            raise ConfigError(
                "the output folder holds an input of the job",
                where=folder,
                got=found,
                hint="write to another folder; if a glob such as ** has matched earlier output, narrow it",
            )


def _summary(manifest: dict[str, Any], folder: str, stages: list[StageResult], seconds: float) -> PrepareSummary:
    return PrepareSummary(
        path=folder,
        files=tuple(file["name"] for file in manifest["files"]),
        records=manifest["records"],
        bytes=sum(file["bytes"] for file in manifest["files"]),
        bad_records=manifest["bad_records"],
        digest=manifest["digest"],
        seconds=seconds,
        absent_chunks=manifest.get("absent_chunks", 0),
        stages=tuple(
            StageFigures(
                title=stage.title,
                tasks=len(stage.results),
                records=stage.records,
                bytes=sum(result.bytes_out for result in stage.results),
                seconds=stage.seconds,
            )
            for stage in stages
        ),
    )


_numbers = count()


def with_caches(node: Node, options: Options) -> Node:
    """Replace cached nodes by the files of their records. Computes caches that do not exist yet.

    Raises ConfigError if two different caches have the same folder, because the second would replace the first one's
    records.
    """
    return _with_caches(node, options, {})


def _with_caches(node: Node, options: Options, used: dict[str, str]) -> Node:
    """Do the same as `with_caches`. used: the folders of the caches so far, and the identities of their contents."""
    if isinstance(node, Step):
        return Step(_with_caches(node.parent, options, used), node.operation)
    if isinstance(node, Arranged):
        parents = tuple(_with_caches(parent, options, used) for parent in node.parents)
        return replace(node, parents=parents)
    if not isinstance(node, Cached):
        return node
    plan = make_plan(_with_caches(node.parent, options, used), Output(CHUNKS, None))
    place = os.path.realpath(node.folder) if is_local(node.folder) else node.folder.rstrip("/")
    if used.setdefault(place, plan.identity) != plan.identity:
        raise ConfigError(
            "two caches of one job have the same folder",
            where=node.folder,
            hint="each cache needs a folder of its own: cache(folder)",
        )
    write_output(plan, node.folder, options.alone() if _is_temporary(node.folder) else options, overwrite=True)
    manifest = read_output_manifest(node.folder) or {}
    return CachedFiles(
        tuple(join_path(node.folder, file["name"]) for file in manifest["files"]),
        plan.identity,
        plan.stages[-1].partition_bytes,
        join_path(node.folder, BAD_RECORDS) if manifest.get("bad_records") else None,
    )


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"manyhands-{os.getuid()}"


def private_folder() -> Path:
    """Create the user's folder in the system's temporary folder, and return it.

    Raises ConfigError if it is not private.
    """
    return make_private_folder(_root())


def _is_temporary(folder: str) -> bool:
    """Return True if the folder holds a cache that only this process uses."""
    return Path(folder).parent == _root()


def temporary_job_folder() -> str:
    """Create a folder for a cache.

    The folder is removed when this process ends. If this process is killed, the next process that creates such a folder
    removes it.
    """
    root = private_folder()
    for path in root.glob("cache-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
    folder = root / f"cache-{os.getpid()}-{next(_numbers)}"
    folder.mkdir(parents=True)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def first_records(plan: Plan, count: int, options: Options) -> list[Any]:
    """Return the first `count` records.

    Run the tasks of the last stage in order in this process until there are enough.
    """

    def read(job: JobFolder, progress: JobProgress) -> list[Any]:
        done = run_stages(plan, plan.stages[:-1], job, options, progress)
        # These tasks run in this process, one at a time, whatever engine ran the other tasks.
        memory_bytes = getattr(options.engine, "memory_bytes", options.total_bytes())
        tasks = tasks_of(plan, plan.stages[-1], job, job.plan_path, done, memory_bytes, options.max_bad_records)
        found: list[Any] = []
        records_read: list[tuple[int, ...]] = []
        for task in tasks:
            chunks = chunks_of(task)
            while True:
                try:
                    found += records_of(next(chunks))
                except StopIteration as end:
                    records_read.append(end.value)
                    break
                if len(found) >= count:
                    return found[:count]
        check_counts(plan.stages[-1], done, records_read)
        return found

    result: list[Any] = run_temporarily(plan, options, read)
    return result
