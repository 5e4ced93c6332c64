"""Applies the steps of a stage to each chunk, and isolates records that fail.

A record that can't be read, or for which a function raises, is set aside with its position and the reason, up to a
limit. If a step raises for a chunk, its records are processed one by one to find those that fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from manyhands.errors import DataError, InvariantError
from manyhands.prepare.records.chunks import Chunk, concatenate, num_records, part_of, records_of
from manyhands.prepare.records.operations import Operation, name_of

_MAX_RECORD_CHARACTERS = 65_536  # at most this many characters of a bad record are stored


@dataclass(frozen=True)
class BadRecord:
    """A record that was set aside.

    where: file and line, or stage, partition and position. what: the reason, in one line. record: its text, truncated.
    """

    where: str
    what: str
    record: str


class BadRecords:
    """The bad records of one task. More than `limit` of them end the task with a DataError."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: list[BadRecord] = []

    def add(self, where: str, what: str, record: Any, cause: BaseException | None = None) -> None:
        """Set a record aside. Raises DataError if this exceeds the limit."""
        text = record if isinstance(record, str) else repr(record)
        self.found.append(BadRecord(where, what, text[:_MAX_RECORD_CHARACTERS]))
        if len(self.found) > self._limit:
            raise too_many_bad_records(self.found[-1], len(self.found), self._limit) from cause

    def to_jsonl(self) -> bytes:
        """Return the bad records as JSON, one object per line."""
        return b"".join(json.dumps(asdict(bad), ensure_ascii=False).encode() + b"\n" for bad in self.found)


def too_many_bad_records(last: BadRecord, count: int, limit: int) -> DataError:
    """Return the error of a job with more bad records than its limit. If the limit is 0, return the record's error."""
    return DataError(
        last.what if not limit else f"{count} bad records are more than max_bad_records allows; the last: {last.what}",
        where=last.where,
        expected=None if not limit else f"at most {limit}",
        got=last.record[:200],
        hint="fix the data or the function; or set max_bad_records, so that bad records are written to "
        "_bad_records.jsonl next to the output instead",
    )


T = TypeVar("T")


@dataclass(frozen=True)
class SourcedChunk:
    """A chunk as read from a source. `where` returns the location of a record, given its index in the chunk."""

    chunk: Chunk
    where: Callable[[int], str]


class BadKey(ValueError):
    """A record whose key can't be used."""


class Pipeline(Generic[T]):
    """Applies `operations` to pieces, then `last`, which converts a chunk to the input of the stage's end.

    All records of a chunk are processed together. If that raises, the same chunk is processed record by record, to find
    the records that fail and their locations in the source. Records that fail are set aside, and the others continue.
    The first step that processes records together (map_batches) and all steps after it receive the remaining records as
    one chunk. An error in these steps ends the task.
    """

    def __init__(
        self, operations: Sequence[Operation], partition: int, bad: BadRecords, last: Callable[[Chunk], T]
    ) -> None:
        self._operations, self._partition, self._bad, self._last = operations, partition, bad, last
        self._seen = [0] * len(operations)  # for each operation, the number of records that reached it
        batched = [index for index, operation in enumerate(operations) if operation.batched]
        self._first_batched = batched[0] if batched else len(operations)
        self.records_in = 0

    def run(self, pieces: Iterable[SourcedChunk]) -> Iterator[T]:
        """Yield the results of each piece. Raises DataError if there are too many bad records."""
        for piece in pieces:
            self.records_in += num_records(piece.chunk)
            yield from self._process(piece)

    def _process(self, piece: SourcedChunk) -> list[T]:
        seen = list(self._seen)
        try:
            return [self._last(self._apply(piece.chunk, 0, len(self._operations)))]
        except InvariantError:  # a defect of Manyhands, not of a record
            raise
        except Exception:
            self._seen = seen
            return self._record_by_record(piece)

    def _apply(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        for index in range(start, stop):
            before = self._seen[index]
            self._seen[index] += num_records(chunk)
            chunk = self._operations[index].apply(chunk, self._partition, before)
        return chunk

    def _record_by_record(self, piece: SourcedChunk) -> list[T]:
        all_per_record = self._first_batched == len(self._operations)
        results: list[T] = []
        remaining: list[Chunk] = []
        for index in range(num_records(piece.chunk)):
            seen = list(self._seen)
            one = part_of(piece.chunk, index, index + 1)
            try:
                chunk = self._apply(one, 0, self._first_batched)
                if all_per_record:
                    results.append(self._last(chunk))
                else:
                    remaining.append(chunk)
            except Exception as error:
                # A bad record counts at every step that it reached. So later records have the same positions at these
                # steps as if it had not failed; `sample` depends on the positions.
                self._seen = [max(old, new) for old, new in zip(seen, self._seen, strict=True)]
                self._bad.add(piece.where(index), _reason(error, self._operations), records_of(one)[0], error)
        if all_per_record:
            return results
        return [self._finish_batched(piece, concatenate(remaining) if remaining else [])]

    def _finish_batched(self, piece: SourcedChunk, chunk: Chunk) -> T:
        try:
            return self._last(self._apply(chunk, self._first_batched, len(self._operations)))
        except DataError:
            raise
        except Exception as error:
            operation = self._operations[self._first_batched]
            last = max(0, num_records(piece.chunk) - 1)
            raise DataError(
                f"{operation.describe()} or a step after it raised {type(error).__name__}: {error}",
                where=f"a batch of {num_records(chunk)} records, from {piece.where(0)} to {piece.where(last)}",
                hint="a batch can't be set aside: change the function so that it drops the rows that it can't process",
            ) from error


def _reason(error: Exception, operations: Sequence[Operation]) -> str:
    """Describe an error in one line: the user's function that raised it, the error, file and line."""
    if isinstance(error, (BadKey, DataError)):
        return str(error.what if isinstance(error, DataError) else error)
    raised = f"{type(error).__name__}: {error}"
    names = {name_of(function): function for operation in operations for function in vars(operation).values()}
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        for name, function in names.items():
            if getattr(function, "__code__", None) is code:
                # cloudpickle retains __file__, but not co_filename.
                file = trace.tb_frame.f_globals.get("__file__", code.co_filename)
                return f"{name} raised {raised} ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"a function raised {raised}"


def unchanged(chunk: Chunk) -> Any:
    """Return the chunk unchanged, for stages whose end accepts chunks directly."""
    return chunk
