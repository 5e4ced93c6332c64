"""map, filter, sample and others, one chunk at a time.

Each is a pure function of the chunk and of how many records came before it in the partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import Chunk, num_records, records_of, table_of


class Operation(Protocol):
    """A step inside a stage. `batched`: it sees records together, so that an error isn't one record's."""

    @property
    def batched(self) -> bool: ...

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        """The chunk that comes out. `before`: records of this partition that this step has seen already."""
        ...

    def describe(self) -> str:
        """In a few words, for `explain`."""
        ...


@dataclass(frozen=True)
class Map:
    """`function(record)` in place of each record."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return list(map(self.function, records_of(chunk)))

    def describe(self) -> str:
        return f"map {name_of(self.function)}"


@dataclass(frozen=True)
class FlatMap:
    """All that `function(record)` yields in place of each record."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return list(chain.from_iterable(map(self.function, records_of(chunk))))

    def describe(self) -> str:
        return f"flat_map {name_of(self.function)}"


@dataclass(frozen=True)
class Filter:
    """The records for which `function(record)` is true. A table stays one."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        if isinstance(chunk, list):
            return list(filter(self.function, chunk))
        kept = [index for index, record in enumerate(records_of(chunk)) if self.function(record)]
        return chunk.take(kept) if kept else chunk.slice(0, 0)

    def describe(self) -> str:
        return f"filter {name_of(self.function)}"


@dataclass(frozen=True)
class MapBatches:
    """`function(table)` in place of a chunk: it returns a table, a dict of columns, or a list of records."""

    function: Callable[[Any], Any]
    form: str  # "arrow" or "numpy"
    batched = True

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        if not num_records(chunk):
            return chunk
        table = table_of(chunk)
        if self.form == "numpy":
            table = {name: table.column(name).to_numpy() for name in table.column_names}
        result = self.function(table)
        if isinstance(result, list) or (type(result).__module__.startswith("pyarrow") and hasattr(result, "num_rows")):
            return result if isinstance(result, list) else _as_table(result)
        if isinstance(result, Mapping):
            import pyarrow as pa

            return pa.table(dict(result))
        raise DataError(
            f"{name_of(self.function)} returned something that isn't a batch",
            expected="an Arrow table, a dict of columns, or a list of records",
            got=type(result).__name__,
        )

    def describe(self) -> str:
        return f"map_batches {name_of(self.function)}"


def _as_table(batch: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch


@dataclass(frozen=True)
class KeyBy:
    """`(key, record)` in place of each record."""

    key: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return [(self.key(record), record) for record in records_of(chunk)]

    def describe(self) -> str:
        return f"key_by {name_of(self.key)}"


@dataclass(frozen=True)
class Sample:
    """Each record with probability `fraction`, by a hash of (seed, partition, position): the same ones every time."""

    fraction: float
    seed: int
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        import numpy as np

        from manyhands.numerics.counters import words_at

        words = words_at(self.seed, "sample", partition, before, num_records(chunk))
        kept = np.flatnonzero(words < np.uint64(min(int(self.fraction * 2**64), 2**64 - 1)))
        if isinstance(chunk, list):
            return [chunk[index] for index in kept.tolist()]
        return chunk.take(kept)

    def describe(self) -> str:
        return f"sample {self.fraction:g}"


def name_of(function: Any) -> str:
    """A function's own name, for messages and plans."""
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)
