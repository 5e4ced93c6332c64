"""A task: a pure function of (plan, stage, partition) that writes one file.

The file has the same records however often and wherever the task runs. Only the first published file is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import IO, Any, NamedTuple

import cloudpickle  # type: ignore[import-untyped]

from manyhands.errors import DataError
from manyhands.numerics.counters import derive
from manyhands.prepare.gridded.store_files import FileAssembler, all_owners
from manyhands.prepare.io.formats import CHUNKS, is_of_lines, open_writer, output_file_name, read_split, rewrite_file
from manyhands.prepare.io.listing import InputFile, check_unchanged
from manyhands.prepare.io.run_file import RunFileWriter, is_intact, read_blocks, read_index
from manyhands.prepare.io.store_parts import LISTING, STORE, PartWriter, is_part_intact, owners_in
from manyhands.prepare.io.writing import Writer
from manyhands.prepare.plan.plan import CachedFiles, Counting, InMemory, Output, Plan, Read, Stage, StoreOutput
from manyhands.prepare.records.chunks import Chunk, num_records, records_of
from manyhands.prepare.records.copies import unpack_records
from manyhands.prepare.records.pipeline import BadRecords, Pipeline, SourcedChunk, unchanged
from manyhands.prepare.records.schemas import schema_from_text, schema_to_text
from manyhands.prepare.shuffle.reduce import ALL_KEYS, KeyRange, RangeReader, Reading, lost_records
from manyhands.storage.atomic import open_atomic, write_atomic
from manyhands.storage.files import (
    HashedFile,
    exists,
    is_plain_name,
    join_path,
    names_in,
    open_to_read,
    read_bytes,
    remove,
)

_DONE = ".done"

_BASE_BYTES = 2**27  # the memory of a worker before it holds any records

_EXPANSION = 10  # reading and sorting records takes up to this many times their estimated size


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, with everything that a worker needs to run it.

    inputs: the folder of each stage that the task reads, and the number of its run files. key_range: the keys that the
    task reads from these files. rewrites, schema: the path of a finished output file that the task only rewrites, and
    the new schema (see `schema_to_text`).
    """

    plan_path: str
    folder: str
    stage: int
    partition: int
    inputs: tuple[tuple[str, int], ...] = ()
    key_range: KeyRange = ALL_KEYS
    rewrites: str | None = None
    schema: str | None = None
    memory_bytes: int
    max_bad_records: int

    @property
    def name(self) -> str:
        """Return the task's name for messages."""
        return f"stage {self.stage}, partition {self.partition}"

    def __call__(self) -> TaskResult:
        """Run the task in this process. This makes a task a function for an executor of `concurrent.futures`."""
        return run_task(self)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task's counts, and the name, hash and schema of its output file. Records are not sent through the engine.

    schema: the schema of a Parquet file (see `schema_to_text`), if the records determined the schema.
    records_read: the number of records that a task after a shuffle read from each stage before it; otherwise empty.
    absent_chunks: the number of chunks that were absent from the zarr stores that the task read.
    """

    stage: int
    partition: int
    records_in: int
    records: int
    bytes_out: int
    bad_records: int
    file: str | None
    sha256: str | None
    schema: str | None
    seconds: float
    records_read: tuple[int, ...]
    absent_chunks: int = 0


def run_task(task: Task) -> TaskResult:
    """Run a task unless it is already complete. Raises DataError if the data can't be used or the disk is full."""
    found = finished(task.folder, task.stage, task.partition)
    if found is not None:
        return found
    started = time.monotonic()
    stage = load_plan(task.plan_path).stages[task.stage]
    bad = BadRecords(task.max_bad_records)
    counts = _ReadCounts()
    end = _END_OF.get(type(stage.end), _sort_runs) if task.schema is None else _rewrite
    try:
        made = end(task, stage, bad, counts)
    except DataError as error:
        error.where = error.where or task.name
        raise
    except OSError as error:
        raise DataError(
            f"a task could not read or write: {error}",
            where=f"{task.name}, in {task.folder}",
            hint="if the disk is full, free some space, and run again: completed tasks are not repeated",
        ) from None  # a traceback into this module does not help the user
    if bad.found:
        write_atomic(bad_path(task.folder, task.partition), bad.to_jsonl())
    result = TaskResult(
        stage=task.stage,
        partition=task.partition,
        records_in=made.records_in,
        records=made.records,
        bytes_out=made.bytes_out,
        bad_records=len(bad.found),
        file=made.file,
        sha256=made.sha256,
        schema=made.schema,
        seconds=time.monotonic() - started,
        records_read=counts.records,
        absent_chunks=bad.absent_chunks,
    )
    note = json.dumps(vars(result))
    # Neither the note nor the run file of a task before a shuffle is synced. `remove_torn` checks both files after a
    # crash.
    write_atomic(done_path(task.folder, task.partition), note, first_wins=True, durable=False)
    return result


def finished(folder: str, stage: int, partition: int) -> TaskResult | None:
    """Return the result in the done note of a task, or None if there is no valid note."""
    try:
        note = json.loads(read_bytes(done_path(folder, partition)))
        if note["file"] is not None and not is_plain_name(note["file"]):
            return None
        return TaskResult(**{**note, "stage": stage, "records_read": tuple(note["records_read"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def finished_tasks(tasks: Sequence[Task]) -> dict[int, TaskResult]:
    """Return the results of those tasks of one folder that have valid done notes, by partition.

    The folder is listed only once.
    """
    names = set(names_in(tasks[0].folder)) if tasks else set()
    noted = (task for task in tasks if _name_in(done_path("", task.partition)) in names)
    found = {task.partition: finished(task.folder, task.stage, task.partition) for task in noted}
    return {partition: result for partition, result in found.items() if result is not None}


def remove_torn(folder: str, output_folder: str | None) -> int:
    """Delete damaged task files and their done notes (see `done_path`), so that the tasks run again. Return how many.

    After a power loss, a file may be missing, short, or full of zeros although its note exists. Call this only in a
    process that has exclusive use of the job folder.

    folder: the folder of a stage. output_folder: the folder into which a killed job may have moved output files.
    """
    names = names_in(folder)
    notes = [name for name in names if name.endswith(_DONE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        checked = list(pool.map(lambda name: _intact_files(folder, output_folder, name), notes))
    intact = {name for files in checked for name in files}
    for name in names:
        if name.startswith("part-") and name not in intact:
            remove(join_path(folder, name))
    return sum(not files for files in checked)


def _intact_files(folder: str, output_folder: str | None, note: str) -> list[str]:
    """Return the names of a task's note and files if all of them are intact, and otherwise an empty list."""
    partition = int(note.removeprefix("part-").removesuffix(_DONE))
    result = finished(folder, 0, partition)
    if result is None:
        return []
    files = [note]
    if result.bad_records:
        # This file is synced before it is renamed into place, so it is either complete or absent.
        files.append(_name_in(bad_path(folder, partition)))
    if result.file is not None and result.file.endswith(LISTING):
        places = [join_path(folder, STORE), *([] if output_folder is None else [output_folder])]
        if not is_part_intact(join_path(folder, result.file), result.sha256, places):
            return []
        files.append(result.file)
    elif result.file is not None:
        candidates = [join_path(place, result.file) for place in (folder, output_folder) if place is not None]
        if not any(_has_hash(path, result.bytes_out, result.sha256) for path in candidates):
            return []
        files.append(result.file)
    elif result.bytes_out:
        if not is_intact(runs_path(folder, partition), result.bytes_out):
            return []
        files.append(_name_in(runs_path(folder, partition)))
    if result.bad_records and not exists(bad_path(folder, partition)):
        return []
    return files


def _has_hash(path: str, size: int, sha256: str | None) -> bool:
    try:
        with open_to_read(path) as file:
            return file.seek(0, os.SEEK_END) == size and _hash_of(file) == sha256
    except OSError:
        return False


def _hash_of(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _name_in(path: str) -> str:
    return path.rpartition("/")[2]


def chunks_of(task: Task) -> Generator[Chunk, None, tuple[int, ...]]:
    """Compute the records of a task of the plan's last stage without writing them.

    The generator returns `TaskResult.records_read`.
    """
    stage = load_plan(task.plan_path).stages[task.stage]
    bad = BadRecords(task.max_bad_records)
    counts = _ReadCounts()
    for part in _parts(task, stage):
        pipeline: Pipeline[Chunk] = Pipeline(stage.operations, part.partition, bad, lambda: records_of)
        yield from pipeline.run(partial(_pieces, part, stage, counts))
    return counts.records


@lru_cache(maxsize=1)
def load_plan(path: str) -> Plan:
    """Load the plan of a job. The most recently loaded plan is cached.

    The end of the path is the hash of the plan, as `plan_name` returns it. The path comes from the process that made
    the plan, so a file that anyone else wrote is never unpickled. Raises DataError for such a file.
    """
    packed = read_bytes(path)
    if not path.endswith(_plan_hash(packed)):
        raise DataError(
            "the job's plan file does not hold the plan that the job saved",
            where=path,
            hint="another user or process has written to the job's folder: delete that folder, and write to a folder "
            "of your own",
        )
    plan: Plan = cloudpickle.loads(packed)
    return plan


def plan_name(plan: Plan, packed: bytes) -> str:
    """Return the name of the file of a plan, which ends with the hash of its content."""
    return f"{plan_prefix(plan)}{_plan_hash(packed)}"


def plan_prefix(plan: Plan) -> str:
    """Return the part of `plan_name` that is equal in all ranks. The rest may differ, as pickles of equal plans may."""
    return f"plan-{plan.identity[:20]}-"


def _plan_hash(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()


def done_path(folder: str, partition: int) -> str:
    """Return the path of a task's done note, which holds its result as JSON."""
    return join_path(folder, f"part-{partition:05d}{_DONE}")


def bad_path(folder: str, partition: int) -> str:
    """Return the path of the file that holds a task's bad records as JSON lines."""
    return join_path(folder, f"part-{partition:05d}.bad")


def runs_path(folder: str, partition: int) -> str:
    """Return the path of the file that a task before a shuffle writes."""
    return join_path(folder, f"part-{partition:05d}.runs")


class _ReadCounts:
    """The counts of the records that a task after a shuffle has read, as `TaskResult.records_read` describes."""

    def __init__(self) -> None:
        self.records: tuple[int, ...] = ()


class _Written(NamedTuple):
    """The counts of the records and bytes that a task wrote, and the name, hash and schema of its output file, if
    any.
    """

    records_in: int
    records: int
    bytes_out: int
    file: str | None = None
    sha256: str | None = None
    schema: str | None = None


class _Discarded(Exception):
    """Raised when an output file must be written again with a wider schema."""


def _sort_runs(task: Task, stage: Stage, bad: BadRecords, counts: _ReadCounts) -> _Written:
    arrangement: Any = stage.end
    records_in = expected = 0
    path = runs_path(task.folder, task.partition)
    with open_atomic(path, first_wins=True, durable=False, private=True) as file:
        runs = RunFileWriter(file, stage.block_bytes)
        for part in _parts(task, stage):
            keyer: Callable[[], Callable[[Chunk], Any]] = partial(arrangement.keyer, part.partition)
            pipeline = Pipeline(stage.operations, part.partition, bad, keyer, arrangement.describe())
            writer = arrangement.writer(runs, stage.partition_bytes)
            for chunk in pipeline.run(partial(_pieces, part, stage, counts)):
                writer.add(chunk)
            writer.flush()
            records_in += pipeline.records_in
            expected += writer.records
        runs.close()
        records = sum(block.records for run in runs.runs for block in run)
        if records != expected:  # before the file is published
            raise lost_records(task.name, expected, records)
    return _Written(records_in, records, runs.written_bytes)


def _output(task: Task, stage: Stage, bad: BadRecords, counts: _ReadCounts) -> _Written:
    output: Any = stage.end
    found = _SchemaFound(output.schema)
    try:
        return _write_output(task, stage, bad, found, counts)
    except _Discarded:
        bad.found.clear()
        bad.absent_chunks = 0
        return _write_output(task, stage, bad, found, counts)


@dataclass
class _SchemaFound:
    """The schema of an output file: the job's schema, or the schema that a first attempt found."""

    schema: Any


def _write_output(task: Task, stage: Stage, bad: BadRecords, found: _SchemaFound, counts: _ReadCounts) -> _Written:
    """Write the output file. If it must be written again, set `found.schema` to the new schema and raise _Discarded."""
    output: Any = stage.end
    name = output_file_name(task.partition, output.form)
    records = 0
    (task,) = _parts(task, stage)  # seeds `random`
    # Writers of line-based formats get Python objects, so that a row that Python objects can't represent is reported
    # as a bad record with its location.
    last = records_of if is_of_lines(output.form) else unchanged
    pipeline: Pipeline[Chunk] = Pipeline(stage.operations, task.partition, bad, lambda: last)
    private = output.form == CHUNKS  # its records may be pickles
    with open_atomic(join_path(task.folder, name), first_wins=True, durable=False, private=private) as opened:
        file: Any = HashedFile(opened)
        writer: Writer | None = None
        try:
            for chunk in pipeline.run(partial(_pieces, task, stage, counts)):
                if num_records(chunk):
                    writer = writer or open_writer(output.form, file, found.schema, f"{name}, {task.name}")
                    writer.add(chunk)
                    records += num_records(chunk)
            if writer is not None:
                writer.close()
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
        if writer is not None and writer.is_discarded:
            found.schema = writer.schema
            raise _Discarded
        # Each task syncs its file, so that workers do this in parallel. The job syncs the folder when it publishes the
        # files.
        file.sync()
    if writer is None:
        return _Written(pipeline.records_in, 0, 0)
    inferred = None if output.schema is not None or writer.schema is None else schema_to_text(writer.schema)
    return _Written(pipeline.records_in, records, file.tell(), name, file.hexdigest(), inferred)


def _write_store(task: Task, stage: Stage, bad: BadRecords, counts: _ReadCounts) -> _Written:
    """Write the files of a zarr store whose numbers are in the task's range of keys."""
    output: Any = stage.end
    (task,) = _parts(task, stage)
    part = PartWriter(task.folder, task.partition)
    assembler = FileAssembler(output.layout, owners_in(*task.key_range, all_owners(output.layout)), part.write)
    pipeline: Pipeline[Chunk] = Pipeline(stage.operations, task.partition, bad, lambda: records_of)
    for chunk in pipeline.run(partial(_pieces, task, stage, counts)):
        assembler.add(records_of(chunk))
    assembler.close()
    sha256 = part.close()
    return _Written(pipeline.records_in, assembler.records, part.bytes, part.name, sha256)


def _rewrite(task: Task, stage: Stage, bad: BadRecords, counts: _ReadCounts) -> _Written:
    """Write the records of another task's output file with a schema that holds the records of all files."""
    output: Any = stage.end
    source = str(task.rewrites)
    name = _name_in(source)
    with open_atomic(join_path(task.folder, name), first_wins=True, durable=False) as opened:
        file: Any = HashedFile(opened)
        schema = schema_from_text(str(task.schema))
        records = rewrite_file(output.form, source, file, schema, f"{name}, {task.name}")
        file.sync()
    return _Written(records, records, file.tell(), name, file.hexdigest(), task.schema)


def _count(task: Task, stage: Stage, bad: BadRecords, counts: _ReadCounts) -> _Written:
    records_in = records = 0
    for part in _parts(task, stage):
        pipeline: Pipeline[Chunk] = Pipeline(stage.operations, part.partition, bad, lambda: unchanged)
        records += sum(num_records(chunk) for chunk in pipeline.run(partial(_pieces, part, stage, counts)))
        records_in += pipeline.records_in
    return _Written(records_in, records, 0)


_END_OF: dict[type, Callable[[Task, Stage, BadRecords, _ReadCounts], _Written]] = {
    Output: _output,
    StoreOutput: _write_store,
    Counting: _count,
}


def _parts(task: Task, stage: Stage) -> Iterator[Task]:
    """Yield the task for each of its partitions. Functions that use `random` get the same numbers in every run."""
    for partition in stage.partitions_of(task.partition):
        random.seed(derive(0, "task", stage.identity, partition))
        yield replace(task, partition=partition)


@lru_cache(maxsize=2)
def _input_files(plan_path: str, stage: int) -> dict[str, InputFile]:
    """Return the files that a stage reads, by path."""
    source: Any = load_plan(plan_path).stages[stage].source
    return {file.path: file for file in source.files}


def _pieces(task: Task, stage: Stage, counts: _ReadCounts, bad: BadRecords) -> Iterator[SourcedChunk]:
    source = stage.source
    if isinstance(source, Read):
        split = source.splits[task.partition]
        file = _input_files(task.plan_path, task.stage)[split.path]
        check_unchanged(file)
        yield from read_split(split, bad, source.columns, source.types)
        check_unchanged(file)  # the file may have changed while it was being read
    elif isinstance(source, InMemory):
        records = unpack_records(source.partitions[task.partition])
        yield SourcedChunk(records, _placed("given records", task.partition, 0))
    elif isinstance(source, CachedFiles):
        seen = 0
        path = source.paths[task.partition]
        for run in read_index(path):
            for keyed in read_blocks(path, run, ()):
                yield SourcedChunk(keyed.chunk, _placed(path, task.partition, seen))
                seen += len(keyed)
    else:
        limit = max(4 * stage.block_bytes, (task.memory_bytes - _BASE_BYTES) // _EXPANSION)
        inputs = [[runs_path(folder, number) for number in range(count)] for folder, count in task.inputs]
        readers = [RangeReader(paths, source.reducer.by, task.key_range, limit) for paths in inputs]
        reading = Reading(source.reducer, readers, task.name)
        seen = 0
        for chunk in reading.chunks():
            yield SourcedChunk(chunk, _placed(f"stage {stage.number}", task.partition, seen))
            seen += num_records(chunk)
        counts.records = reading.records


def _placed(what: str, partition: int, before: int) -> Callable[[int], str]:
    return lambda index: f"{what}, partition {partition}, record {before + index + 1}"
