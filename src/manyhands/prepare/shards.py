"""Iterates over the records of a Dataset in this process, in parts, as a stream of training data needs them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from manyhands.errors import ConfigError
from manyhands.numerics.counters import derive
from manyhands.prepare.io.formats import read_split
from manyhands.prepare.io.listing import check_unchanged
from manyhands.prepare.plan.plan import Plan, Read, Stage
from manyhands.prepare.records.chunks import Chunk, records_of
from manyhands.prepare.records.copies import unpack_records
from manyhands.prepare.records.pipeline import BadRecords, Pipeline, SourcedChunk


class Shard:
    """Some partitions of a Dataset whose records are not shuffled. Iterating over it computes the records in order.

    `state_dict` returns the position of the iteration, and `load_state_dict` lets the next iteration begin there. It
    reads the current partition again.
    """

    def __init__(self, stage: Stage, partitions: range) -> None:
        self._stage, self._partitions = stage, partitions
        self._partition, self._record = partitions.start, 0  # of the next record

    @classmethod
    def whole(cls, plan: Plan) -> Shard:
        """Return all partitions of a plan. Raises ConfigError if it shuffles the records."""
        if len(plan.stages) != 1:
            raise ConfigError(
                "a Dataset that sorts, groups, joins or shuffles its records can't be read record by record",
                expected="a Dataset whose records are read and processed one by one",
                got=plan.stages[-1].title,
                hint="run the job with write(folder), and read its output with Dataset.read(folder)",
            )
        return cls(plan.stages[0], range(plan.stages[0].partitions or 0))

    @property
    def num_shards(self) -> int:
        """Return the largest number of parts into which `shard` divides this."""
        return len(self._partitions)

    def shard(self, num_shards: int, index: int) -> Shard:
        """Return one of `num_shards` parts, each of consecutive partitions."""
        first, count = self._partitions.start, len(self._partitions)
        return Shard(self._stage, range(first + count * index // num_shards, first + count * (index + 1) // num_shards))

    def state_dict(self) -> dict[str, int]:
        """Return the partition and the place in it of the next record of the iteration."""
        return {"partition": self._partition, "record": self._record}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin at a position."""
        self._partition, self._record = int(state["partition"]), int(state["record"])

    def __iter__(self) -> Iterator[Any]:
        first, passed = self._partition, self._record
        for partition in range(first, self._partitions.stop):
            self._partition, self._record = partition, 0
            for record in self._records(partition):
                self._record += 1
                if partition > first or self._record > passed:
                    yield record
        self._partition, self._record = self._partitions.stop, 0

    def _records(self, partition: int) -> Iterator[Any]:
        bad = BadRecords(limit=0)
        pipeline: Pipeline[Chunk] = Pipeline(self._stage.operations, partition, bad, lambda: records_of)
        for chunk in pipeline.run(lambda bad: self._pieces(partition, bad)):
            yield from chunk

    def _pieces(self, partition: int, bad: BadRecords) -> Iterator[SourcedChunk]:
        for number, piece in enumerate(self._read(partition, bad)):
            # Functions may use `random`. The numbers must not depend on where an iteration began.
            random.seed(derive(0, "chunk", self._stage.identity, partition, number))
            yield piece

    def _read(self, partition: int, bad: BadRecords) -> Iterator[SourcedChunk]:
        source: Any = self._stage.source
        if isinstance(source, Read):
            split = source.splits[partition]
            file = next(file for file in source.files if file.path == split.path)
            check_unchanged(file)
            yield from read_split(split, bad, source.columns, source.types)
            check_unchanged(file)  # the file may have changed while it was being read
        else:
            records = unpack_records(source.partitions[partition])
            yield SourcedChunk(records, lambda index: f"given records, partition {partition}, record {index + 1}")
