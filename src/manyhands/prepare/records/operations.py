"""Operations such as map, filter and sample, applied to one chunk at a time.

Each operation is a pure function of the chunk, the partition's number and the number of records before the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import Chunk, num_records, records_of, table_of


class Operation(Protocol):
    """A step inside a stage."""

    @property
    def batched(self) -> bool:
        """True if it processes records together, so that an error can't be attributed to one record."""
        ...

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        """Return the resulting chunk. `before` is the number of earlier records of this partition at this step."""
        ...

    def describe(self) -> str:
        """Return a short description for `explain`."""
        ...


@dataclass(frozen=True)
class Map:
    """Replaces each record by `function(record)`."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return list(map(self.function, records_of(chunk)))

    def describe(self) -> str:
        return f"map {name_of(self.function)}"


@dataclass(frozen=True)
class FlatMap:
    """Replaces each record by all records that `function(record)` returns or yields."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return list(chain.from_iterable(map(self.function, records_of(chunk))))

    def describe(self) -> str:
        return f"flat_map {name_of(self.function)}"


@dataclass(frozen=True)
class Filter:
    """Selects the records for which `function(record)` is true. A table stays a table."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        if isinstance(chunk, list):
            return list(filter(self.function, chunk))
        selected = [index for index, record in enumerate(records_of(chunk)) if self.function(record)]
        # Arrow can't infer the type of an empty list of indices.
        return chunk.take(selected) if selected else chunk.slice(0, 0)

    def describe(self) -> str:
        return f"filter {name_of(self.function)}"


@dataclass(frozen=True)
class MapBatches:
    """Replaces a chunk by `function(table)`, which returns a table, a dict of columns, or a list of records.

    Raises DataError if it returns anything else.
    """

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
        if isinstance(result, list):
            return result
        if type(result).__module__.startswith("pyarrow") and hasattr(result, "num_rows"):
            return _as_table(result)
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
    """Replaces each record by `(key, record)`."""

    key: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        return [(self.key(record), record) for record in records_of(chunk)]

    def describe(self) -> str:
        return f"key_by {name_of(self.key)}"


@dataclass(frozen=True)
class Sample:
    """Selects each record with probability `fraction`.

    The choice is a hash of (seed, partition, position), so every run selects the same records.
    """

    fraction: float
    seed: int
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        import numpy as np

        from manyhands.numerics.counters import words_at

        words = words_at(self.seed, "sample", partition, before, num_records(chunk))
        # Words are uniform in 0 … 2**64 - 1. A fraction of 1 gives a threshold that exceeds 64 bits, hence the minimum.
        threshold = np.uint64(min(int(self.fraction * 2**64), 2**64 - 1))
        selected = np.flatnonzero(words < threshold)
        if isinstance(chunk, list):
            return [chunk[index] for index in selected.tolist()]
        return chunk.take(selected)

    def describe(self) -> str:
        return f"sample {self.fraction:g}"


def name_of(function: Any) -> str:
    """Return the name of a function for messages and plans: `lambda` for a lambda, the class for other callables."""
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)
