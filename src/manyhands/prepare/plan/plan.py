"""Divides a Dataset into stages at its shuffles.

    node (built by the methods of Dataset) -> Stage: a source, steps, and an end (an arrangement or an output)

A plan does not depend on workers, memory or engines, so the same Dataset has the same stages everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from manyhands import __version__
from manyhands.formatting import format_bytes
from manyhands.prepare.io.listing import InputFile, Split
from manyhands.prepare.plan.fingerprint import fingerprint_code
from manyhands.prepare.records.copies import unpack_records
from manyhands.prepare.records.operations import Operation
from manyhands.prepare.records.schemas import schema_digest, schema_from_text
from manyhands.prepare.shuffle.reduce import Reduction, Sorted
from manyhands.prepare.shuffle.sort_runs import Arrangement, ByKey

if TYPE_CHECKING:
    import pyarrow as pa

    from manyhands.prepare.gridded.layout import ZarrLayout

_PACKING = (256, 64)
"""The minimum number of tasks, and the maximum number of partitions in a task, if small partitions are packed.

The limits exist because a function may take long for each record.
"""

PARTITION_BYTES = 2**25  # the default input of one task, if the format can be split; see Stage.partition_bytes


@dataclass(frozen=True)
class Read:
    """Input files, divided into splits. Each split is a partition."""

    files: tuple[InputFile, ...]
    splits: tuple[Split, ...]
    columns: tuple[str, ...] | None
    types: Mapping[str, str]
    partition_bytes: int


@dataclass(frozen=True)
class InMemory:
    """Records that the caller passed in memory, divided into partitions.

    `pack_records` packs each partition, and each reading unpacks it. So a function that changes a record changes
    neither the caller's objects nor the records of another task.
    """

    partitions: tuple[bytes, ...]
    partition_bytes: int


@dataclass(frozen=True)
class Step:
    """An operation on each chunk of the parent."""

    parent: Node
    operation: Operation


@dataclass(frozen=True)
class Arranged:
    """A shuffle: the records of the parents, arranged and then reduced.

    partition_bytes: the size of the partitions of the result (None: twice the plan's `partition_bytes`).
    """

    parents: tuple[Node, ...]
    arrangements: tuple[Arrangement, ...]
    reducer: Reduction
    partition_bytes: int | None = None


@dataclass(frozen=True)
class Cached:
    """The records of the parent, stored as files in `folder` when they are first computed."""

    parent: Node
    folder: str


@dataclass(frozen=True)
class CachedFiles:
    """Files of chunks, which replace a Cached node once its records are stored.

    bad_path: the file of the records that were set aside when the cache was computed, or None if there are none.
    """

    paths: tuple[str, ...]
    identity: str
    partition_bytes: int
    bad_path: str | None


@dataclass(frozen=True)
class Shuffled:
    """A range of the records that the stages with these numbers arranged. partition_bytes: as in `Arranged`."""

    stages: tuple[int, ...]
    reducer: Reduction
    partition_bytes: int | None = None


Node: TypeAlias = Read | InMemory | Step | Arranged | Cached | CachedFiles

Source: TypeAlias = Read | InMemory | CachedFiles | Shuffled


@dataclass(frozen=True)
class Output:
    """The end of a plan that writes one file of this format per partition."""

    form: str
    schema: pa.Schema | None


@dataclass(frozen=True)
class StoreOutput(Output):
    """The end of a plan that writes the files of one zarr store. Its records are pieces, sorted by their owners."""

    layout: ZarrLayout


def store_output(node: Node, layout: ZarrLayout) -> tuple[Node, StoreOutput]:
    """Return the node that brings the pieces of a node's records to the task that writes their file, and its end."""
    from manyhands.prepare.gridded.pieces import CutIntoPieces

    by_owner = ByKey(itemgetter(0), "bring to their files")
    pieces = Step(node, CutIntoPieces(layout))
    return Arranged((pieces,), (by_owner,), Sorted(())), StoreOutput("zarr", None, layout)


@dataclass(frozen=True)
class Counting:
    """The end of a plan that only counts records."""


@dataclass(frozen=True)
class Stage:
    """Independent tasks, one per partition.

    identity: the hash of everything that the results depend on. partition_bytes: the size from which other sizes are
    derived. A task before a shuffle sorts `partition_bytes` at a time. A task after a shuffle reads twice as many
    bytes, in blocks of `partition_bytes` / 128. Sizes are estimated from the records. next_bytes: the size of the
    partitions of the next stage, if the shuffle to it sets one.
    """

    number: int
    title: str
    identity: str
    source: Source
    operations: tuple[Operation, ...]
    end: Arrangement | Output | Counting
    partition_bytes: int
    next_bytes: int | None = None

    @property
    def reduce_bytes(self) -> int:
        """Return the number of bytes that a task after a shuffle reads."""
        given = self.source.partition_bytes if isinstance(self.source, Shuffled) else None
        return given or 2 * self.partition_bytes

    @property
    def block_bytes(self) -> int:
        """Return the number of bytes of a run that are read at a time. A partition consists of several blocks."""
        block_bytes = self.partition_bytes // 128
        return max(1, block_bytes if self.next_bytes is None else min(block_bytes, self.next_bytes // 16))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return the numbers of the stages that must be complete before this one starts."""
        return self.source.stages if isinstance(self.source, Shuffled) else ()

    @property
    def tasks(self) -> int | None:
        """Return the number of tasks, or None if the number depends on the results of earlier stages."""
        return self.partitions if self._packed is None else len(self._packed)

    def partitions_of(self, task: int) -> range:
        """Return the partitions that a task computes, one after the other."""
        return range(task, task + 1) if self._packed is None else self._packed[task]

    @cached_property
    def _packed(self) -> tuple[range, ...] | None:
        """Return the partitions of each task if small files are packed, or None if each task has one partition.

        Each partition has its own positions, random numbers and runs, so packing does not change the output. A task
        that writes
        an output file is never packed.
        """
        least_tasks, most_partitions = _PACKING
        if not isinstance(self.source, Read) or isinstance(self.end, Output):
            return None
        splits = self.source.splits
        most = min(most_partitions, len(splits) // least_tasks)
        if most < 2:
            return None
        packed, start, size = [], 0, 0
        for index, split in enumerate(splits):
            if index > start and (index - start == most or size + split.size_bytes > self.partition_bytes):
                packed.append(range(start, index))
                start, size = index, 0
            size += split.size_bytes
        return (*packed, range(start, len(splits)))

    @property
    def partitions(self) -> int | None:
        """Return the number of partitions, or None if the number depends on the results of earlier stages."""
        if isinstance(self.source, Read):
            return len(self.source.splits)
        if isinstance(self.source, InMemory):
            return len(self.source.partitions)
        return len(self.source.paths) if isinstance(self.source, CachedFiles) else None


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can run. The last stage computes the result."""

    stages: tuple[Stage, ...]

    @property
    def identity(self) -> str:
        """Return the identity of the complete job, which is the identity of its last stage."""
        return self.stages[-1].identity

    def explain(self) -> str:
        """Return a description of each stage with its partitions and bytes, as text."""
        return "\n".join(f"stage {stage.number}  {stage.title}\n         {_extent(stage)}" for stage in self.stages)


def make_plan(node: Node, end: Output | Counting) -> Plan:
    """Plan the stages that compute `node`. The last stage has the given `end`. `node` must not contain Cached nodes."""
    stages: list[Stage] = []
    _add_stages(stages, node, end, min(_partition_bytes(node)))
    return Plan(tuple(stages))


def _partition_bytes(node: Node) -> list[int]:
    """Return the partition sizes of all sources of a node."""
    if isinstance(node, Arranged):
        return [size for parent in node.parents for size in _partition_bytes(parent)]
    if isinstance(node, (Step, Cached)):
        return _partition_bytes(node.parent)
    return [node.partition_bytes]


def _add_stages(
    stages: list[Stage],
    node: Node,
    end: Arrangement | Output | Counting,
    partition_bytes: int,
    next_bytes: int | None = None,
) -> int:
    """Add the stage that computes `node` and has this `end`, after all stages that it needs. Return its number."""
    operations: list[Operation] = []
    while isinstance(node, Step):
        operations.append(node.operation)
        node = node.parent
    operations.reverse()
    source: Any = node
    upstream: list[str] = []
    if isinstance(node, Arranged):
        numbers = [
            _add_stages(stages, parent, arrangement, partition_bytes, node.partition_bytes)
            for parent, arrangement in zip(node.parents, node.arrangements, strict=True)
        ]
        source = Shuffled(tuple(numbers), node.reducer, node.partition_bytes)
        upstream = [stages[number].identity for number in numbers]
    # Other versions of Manyhands or Python may compute different results, so they must not reuse these results.
    basis = (__version__, sys.version_info[:2], partition_bytes, *([] if next_bytes is None else [next_bytes]))
    identity = fingerprint_code([basis, upstream, _identifying(source), operations, _identifying(end)])
    for stage in stages:
        if stage.identity == identity:  # this happens, for example, if a dataset is joined with itself
            return stage.number
    title = " → ".join([_source_title(source), *(op.describe() for op in operations), _end_title(end)])
    stages.append(Stage(len(stages), title, identity, source, tuple(operations), end, partition_bytes, next_bytes))
    return len(stages) - 1


def _with_digests(splits: tuple[Split, ...]) -> tuple[Split, ...]:
    """Return the splits with digests for schemas. Digests are short, and don't depend on the version of zlib."""
    texts = {split.schema for split in splits if split.schema is not None}
    digests = {text: schema_digest(schema_from_text(text)) for text in texts}
    return tuple(split if split.schema is None else replace(split, schema=digests[split.schema]) for split in splits)


def _identifying(value: Any) -> Any:
    """Return the parts of a source or an end that the results depend on.

    Stage numbers and the paths of cached files may differ between runs with the same results.
    """
    if isinstance(value, Shuffled):
        return ("shuffled", value.reducer)
    if isinstance(value, Read):  # return text, because hashing thousands of files and splits one by one takes seconds
        files = repr((value.files, _with_digests(value.splits)))
        return ("read", files, value.columns, value.types, value.partition_bytes, _PACKING)
    if isinstance(value, CachedFiles):
        return ("kept", value.identity)
    if isinstance(value, InMemory):  # use the records, because equal records may have different pickles
        records: Any = tuple(tuple(unpack_records(packed)) for packed in value.partitions)
        return InMemory(records, value.partition_bytes)
    if isinstance(value, Output):
        return ("output", value.form, None if value.schema is None else value.schema.to_string())
    return value


def _source_title(source: Source) -> str:
    if isinstance(source, Read):
        forms = sorted({split.format for split in source.splits})
        noun = ("store" if forms == ["zarr"] else "file") + ("" if len(source.files) == 1 else "s")
        # Without splits, no format is named, which would leave two spaces.
        return f"read {len(source.files)} {'/'.join(forms)} {noun}".replace("  ", " ")
    if isinstance(source, InMemory):
        return "given records"
    if isinstance(source, CachedFiles):
        return "cached records"
    return " and ".join(f"stage {number}" for number in source.stages)


def _end_title(end: Arrangement | Output | Counting) -> str:
    if isinstance(end, Output):
        return f"write {end.form}"
    return "count" if isinstance(end, Counting) else end.describe()


def _extent(stage: Stage) -> str:
    """Return a text with the number of partitions and the bytes of a stage."""
    if stage.partitions is None:
        return f"number of partitions depends on the data, about {format_bytes(stage.reduce_bytes)} each"
    text = f"{stage.partitions} partition{'' if stage.partitions == 1 else 's'}"
    return f"{text}, {format_bytes(input_bytes(stage))}" if isinstance(stage.source, Read) else text


def input_paths(stage: Stage) -> tuple[str, ...]:
    """Return the paths of the files that a stage reads, except those of earlier stages."""
    if isinstance(stage.source, Read):
        return tuple(file.path for file in stage.source.files)
    return stage.source.paths if isinstance(stage.source, CachedFiles) else ()


def input_bytes(stage: Stage) -> int:
    """Return the number of bytes of the files that a stage reads; 0 if it reads no files."""
    return sum(split.size_bytes for split in stage.source.splits) if isinstance(stage.source, Read) else 0
