"""Operations such as map, filter and sample, applied to one chunk at a time.

Each operation is a pure function of the chunk, the partition's number and the number of records before the chunk.

Functions of users are called in comprehensions and loops, never by `map` or `filter`. These would mistake a
StopIteration that a function raises for the end of the records, and lose the remaining records of the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Protocol

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import Chunk, num_records, records_of, table_of
from manyhands.prepare.records.copies import own_items, separated
from manyhands.prepare.records.functions import ENDS_EARLY, check_results, complete, name_of


class Operation(Protocol):
    """A step inside a stage."""

    @property
    def batched(self) -> bool:
        """Return True if the step processes records together, so that an error can't be attributed to one record."""
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
        function = self.function
        results = [function(record) for record in records_of(chunk)]
        check_results(results, function)
        return results

    def describe(self) -> str:
        return f"map {name_of(self.function)}"


@dataclass(frozen=True)
class FlatMap:
    """Replaces each record by all records that `function(record)` returns or yields.

    An object that is returned or yielded several times becomes several records, which share nothing. An object that is
    yielded becomes a record with the values that it has at that moment, because a generator may change it afterwards.
    """

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        function = self.function
        items: list[Any] = []
        for record in records_of(chunk):
            result = function(record)
            if type(result) in ENDS_EARLY:
                result = complete(result)
            items.extend(result if type(result) is list else _items_of(result))
        return separated(items)

    def describe(self) -> str:
        return f"flat_map {name_of(self.function)}"


def _items_of(result: Any) -> Iterator[Any] | list[Any]:
    """Return the items of a result of `flat_map`, or copies of the items if they are produced one after the other.

    A generator may change any object that it has yielded, and yield it again. A container, which has a length, has all
    its items before the first item is read.
    """
    iterator: Iterator[Any] = iter(result)
    is_container = hasattr(result, "__len__") and not isinstance(iterator, GeneratorType)
    return iterator if is_container else own_items(iterator)


@dataclass(frozen=True)
class Filter:
    """Selects the records for which `function(record)` is true. A table stays a table."""

    function: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        function = self.function
        trues: list[Any] = []  # results that are true; they include coroutines, which would never be run
        keep = trues.append  # `append` returns None, so `not keep(...)` is true
        if isinstance(chunk, list):
            records = [record for record in chunk if (found := function(record)) is True or (found and not keep(found))]
            check_results(trues, function, is_read=True)
            return records
        selected = [
            index
            for index, record in enumerate(records_of(chunk))
            if (found := function(record)) is True or (found and not keep(found))
        ]
        check_results(trues, function, is_read=True)
        # Arrow can't infer the type of an empty list of indices.
        return chunk.take(selected) if selected else chunk.slice(0, 0)

    def describe(self) -> str:
        return f"filter {name_of(self.function)}"


@dataclass(frozen=True)
class MapBatches:
    """Replaces a chunk by `function(table)`, which returns a table, a dict of columns, or a list of records.

    Raises DataError if the function returns anything else.
    """

    function: Callable[[Any], Any]
    form: str  # "arrow" or "numpy"
    batched = True

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        if not num_records(chunk):
            return chunk
        from manyhands.prepare.records.numpy_form import numpy_columns, table_of_columns

        table = table_of(chunk)
        if self.form == "numpy":
            table = numpy_columns(table)
        result = self.function(table)
        if isinstance(result, list):
            return result
        if type(result).__module__.startswith("pyarrow") and hasattr(result, "num_rows"):
            return self._checked(_as_table(result))
        if isinstance(result, Mapping):
            return self._checked(table_of_columns(result))
        raise DataError(
            f"{name_of(self.function)} returned something that isn't a batch",
            expected="an Arrow table, a dict of columns, or a list of records",
            got=type(result).__name__,
        )

    def describe(self) -> str:
        return f"map_batches {name_of(self.function)}"

    def _checked(self, table: Any) -> Any:
        """Return the table.

        Raises DataError if its rows can't be records, which have exactly one value of each name.
        """
        names = table.column_names
        if not names or len(set(names)) < len(names):
            raise DataError(
                f"{name_of(self.function)} returned a batch whose rows are not records",
                expected="at least one column, and different names of columns",
                got=f"columns {', '.join(names) or 'none'}"[:200],
            )
        return table


def _as_table(batch: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch


@dataclass(frozen=True)
class KeyBy:
    """Replaces each record by `(key, record)`."""

    key: Callable[[Any], Any]
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        key, records = self.key, records_of(chunk)
        keys = [key(record) for record in records]
        check_results(keys, key, is_read=True)
        return list(zip(keys, records, strict=True))

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
        # Words are uniform in 0 … 2**64 - 1. Limit the threshold, because it exceeds 64 bits for a fraction of 1.
        threshold = np.uint64(min(int(self.fraction * 2**64), 2**64 - 1))
        selected = np.flatnonzero(words < threshold)
        if isinstance(chunk, list):
            return [chunk[index] for index in selected.tolist()]
        return chunk.take(selected)

    def describe(self) -> str:
        return f"sample {self.fraction:g}"
