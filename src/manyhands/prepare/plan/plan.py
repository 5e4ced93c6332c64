"""Plans a Dataset as stages, cut at shuffles.

    node (what the Dataset's methods make) -> Stage: a source, steps, and an end: an arrangement or an output

Plans know nothing of workers, memory or engines.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from manyhands import __version__
from manyhands.formatting import format_bytes
from manyhands.prepare.io.listing import InputFile, Split
from manyhands.prepare.plan.fingerprint import fingerprint_code
from manyhands.prepare.records.operations import Operation
from manyhands.prepare.shuffle.arrange import Arrangement
from manyhands.prepare.shuffle.reduce import Reduction

if TYPE_CHECKING:
    import pyarrow as pa

PARTITION_BYTES = 2**25  # of input that one task reads, where the format can be split; see Stage.partition_bytes


@dataclass(frozen=True)
class Read:
    """Files, as splits."""

    files: tuple[InputFile, ...]
    splits: tuple[Split, ...]
    columns: tuple[str, ...] | None
    types: Mapping[str, str]
    partition_bytes: int


@dataclass(frozen=True)
class Given:
    """Records that were given, in partitions."""

    partitions: tuple[tuple[Any, ...], ...]
    partition_bytes: int


@dataclass(frozen=True)
class Step:
    """A step on each chunk."""

    parent: Node
    operation: Operation


@dataclass(frozen=True)
class Arranged:
    """A shuffle: the parents' records arranged and reduced."""

    parents: tuple[Node, ...]
    arrangements: tuple[Arrangement, ...]
    reducer: Reduction


@dataclass(frozen=True)
class Cached:
    """The parent's records, kept in files in `folder` from the first time that they are needed."""

    parent: Node
    folder: str


@dataclass(frozen=True)
class Kept:
    """Files of chunks: a Cached node whose records are there."""

    paths: tuple[str, ...]
    identity: str
    partition_bytes: int


@dataclass(frozen=True)
class Shuffled:
    """A range of what the stages of these numbers arranged."""

    stages: tuple[int, ...]
    reducer: Reduction


Node: TypeAlias = Read | Given | Step | Arranged | Cached | Kept

Source: TypeAlias = Read | Given | Kept | Shuffled


@dataclass(frozen=True)
class Output:
    """The end of a plan: a file of this format for each partition."""

    form: str
    schema: pa.Schema | None


@dataclass(frozen=True)
class Counting:
    """The end of a plan that only counts."""


@dataclass(frozen=True)
class Stage:
    """Tasks that don't depend on each other, one a partition. `identity`: hash of all that its results depend on.

    partition_bytes: the size that all others follow. Tasks before a shuffle sort that much at a time; tasks behind one
    read twice as much, in blocks of 1/128. All as estimated from the records.
    """

    number: int
    title: str
    identity: str
    source: Source
    operations: tuple[Operation, ...]
    end: Arrangement | Output | Counting
    partition_bytes: int

    @property
    def reduce_bytes(self) -> int:
        """How much a task behind a shuffle reads."""
        return 2 * self.partition_bytes

    @property
    def block_bytes(self) -> int:
        """How much of a run is read at once."""
        return max(1, self.partition_bytes // 128)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The stages that must be done before."""
        return self.source.stages if isinstance(self.source, Shuffled) else ()

    @property
    def partitions(self) -> int | None:
        """How many tasks; None if that is known only when its inputs are there."""
        if isinstance(self.source, Read):
            return len(self.source.splits)
        if isinstance(self.source, Given):
            return len(self.source.partitions)
        return len(self.source.paths) if isinstance(self.source, Kept) else None


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can be run; the last one makes the result."""

    stages: tuple[Stage, ...]

    @property
    def identity(self) -> str:
        """Of the whole job."""
        return self.stages[-1].identity

    def explain(self) -> str:
        """The stages, one a line, with their partitions and estimated bytes."""
        return "\n".join(f"stage {stage.number}  {stage.title}\n         {_extent(stage)}" for stage in self.stages)


def make_plan(node: Node, end: Output | Counting) -> Plan:
    """The plan that ends a node's records in `end`. `node` has no Cached nodes left."""
    stages: list[Stage] = []
    _close(stages, node, end, min(_partition_bytes(node)))
    return Plan(tuple(stages))


def _partition_bytes(node: Node) -> list[int]:
    """Of all sources of a node."""
    if isinstance(node, Arranged):
        return [size for parent in node.parents for size in _partition_bytes(parent)]
    if isinstance(node, (Step, Cached)):
        return _partition_bytes(node.parent)
    return [node.partition_bytes]


def _close(stages: list[Stage], node: Node, end: Arrangement | Output | Counting, partition_bytes: int) -> int:
    """Add the stage that takes `node` to `end`, and those that it needs; its number."""
    operations: list[Operation] = []
    while isinstance(node, Step):
        operations.append(node.operation)
        node = node.parent
    operations.reverse()
    source: Any = node
    upstream: list[str] = []
    if isinstance(node, Arranged):
        numbers = [_close(stages, *pair, partition_bytes) for pair in zip(node.parents, node.arrangements, strict=True)]
        source = Shuffled(tuple(numbers), node.reducer)
        upstream = [stages[number].identity for number in numbers]
    basis = (__version__, sys.version_info[:2], partition_bytes)
    identity = fingerprint_code([basis, upstream, _known_as(source), operations, _known_as(end)])
    for stage in stages:
        if stage.identity == identity:  # both sides of a join with itself, say
            return stage.number
    title = " → ".join([_source_title(source), *(op.describe() for op in operations), _end_title(end)])
    stages.append(Stage(len(stages), title, identity, source, tuple(operations), end, partition_bytes))
    return len(stages) - 1


def _known_as(value: Any) -> Any:
    """What of a source or an end its results depend on."""
    if isinstance(value, Shuffled):
        return ("shuffled", value.reducer)
    if isinstance(value, Kept):
        return ("kept", value.identity)
    if isinstance(value, Output):
        return ("output", value.form, None if value.schema is None else value.schema.to_string())
    return value


def _source_title(source: Source) -> str:
    if isinstance(source, Read):
        forms = sorted({split.format for split in source.splits})
        return f"read {len(source.files)} {'/'.join(forms)} file{'' if len(source.files) == 1 else 's'}".replace(
            "  ", " "
        )
    if isinstance(source, Given):
        return "given records"
    if isinstance(source, Kept):
        return "cached records"
    return " and ".join(f"stage {number}" for number in source.stages)


def _end_title(end: Arrangement | Output | Counting) -> str:
    if isinstance(end, Output):
        return f"write {end.form}"
    return "count" if isinstance(end, Counting) else end.describe()


def _extent(stage: Stage) -> str:
    if stage.partitions is None:
        return f"partitions as the data come out, about {format_bytes(stage.reduce_bytes)} each"
    text = f"{stage.partitions} partition{'' if stage.partitions == 1 else 's'}"
    return f"{text}, {format_bytes(input_bytes(stage))}" if isinstance(stage.source, Read) else text


def input_bytes(stage: Stage) -> int:
    """How many bytes of files a stage reads; 0 where it reads none."""
    return sum(split.size_bytes for split in stage.source.splits) if isinstance(stage.source, Read) else 0
