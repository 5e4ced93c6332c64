"""Applies the steps of a stage to each chunk, and isolates records that fail.

A record that can't be read, or for which a function raises, is set aside with its position and the reason, up to a
limit. If a step raises for a chunk, the chunk's records are processed one by one to find those that fail. A function
may have changed records before a record failed, so each attempt uses new copies of the records, which are read again.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import (
    Chunk,
    concatenate,
    is_table,
    num_records,
    pack,
    part_of,
    shown_record,
    size_bytes,
    unpack,
    with_contiguous_columns,
)
from manyhands.prepare.records.functions import BadResult, describe_error, is_for_user, shown
from manyhands.prepare.records.operations import FlatMap, Map, Operation

# If the results of functions are larger than this, a chunk is processed in several parts, so that its results need not
# be in memory together.
_MOST_RESULT_BYTES = 2**25

_MAX_RECORD_CHARACTERS = 65_536  # the maximum number of characters of a bad record that are stored


@dataclass(frozen=True)
class BadRecord:
    """A record that was set aside.

    where: file and line, or stage, partition and position. what: the reason, in one line. record: its text, truncated.
    """

    where: str
    what: str
    record: str


class BadRecords:
    """The bad records of one task. More than `limit` of them end the task with a DataError.

    absent_chunks: the number of chunks of arrays that the task found to be absent from a zarr store.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.absent_chunks = 0
        self.found: list[BadRecord] = []

    def add(self, where: str, what: str, record: Any, cause: BaseException | None = None) -> None:
        """Set a record aside. Raises DataError if this exceeds the limit."""
        text = record if isinstance(record, str) else shown(record, _MAX_RECORD_CHARACTERS)
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
        hint="correct the data or the function, or set max_bad_records, so that bad records are written to "
        "_bad_records.jsonl next to the output instead",
    )


T = TypeVar("T")


@dataclass(frozen=True)
class SourcedChunk:
    """A chunk that was read from a source. `where` returns the location of a record, given its index in the chunk."""

    chunk: Chunk
    where: Callable[[int], str]


Read: TypeAlias = Callable[[BadRecords], Iterator[SourcedChunk]]
"""A function that reads the same pieces of a task in each call.

Records that can't be parsed are added to the bad records.
"""


class BadKey(ValueError):
    """The error for a record whose key can't be used."""


class _Failed(NamedTuple):
    """A record of a chunk for which a function fails. reached: for each operation, the number of records that reached
    it.
    """

    position: int
    reached: list[int]


class Pipeline(Generic[T]):
    """Applies `operations` to pieces, then a last function, which converts a chunk to the input of the stage's end.

    make_last: returns the last function. This function may count the records of the chunks that it converts, so it gets
    every chunk once, and the search for bad records uses another instance. last_name: the function's name in errors.

    All records of a chunk are processed together, unless their results are large. If this raises, the records are
    processed one by one, to find those that fail and their locations in the source. The failing records are set aside,
    and the other records are processed together again. So the result is the same as for a chunk without the bad
    records. An error in a step that processes records together (map_batches), or in any step after it, can't be
    attributed to a record, so it ends the task.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        partition: int,
        bad: BadRecords,
        make_last: Callable[[], Callable[[Chunk], T]],
        last_name: str = "a function",
    ) -> None:
        self._operations, self._partition, self._bad = operations, partition, bad
        self._make_last, self._last, self._last_name = make_last, make_last(), last_name
        self._seen = [0] * len(operations)  # for each operation, the number of records that reached it
        batched = [index for index, operation in enumerate(operations) if operation.batched]
        self._first_batched = batched[0] if batched else len(operations)
        self._may_grow = any(isinstance(each, (Map, FlatMap)) for each in operations[: self._first_batched])
        self._reached = 0  # the end of the records of the current chunk that were processed, or are being processed
        self._step: Operation | None = None  # the operation that runs, or None for the last function
        self.records_in = 0

    def run(self, read: Read) -> Iterator[T]:
        """Yield the result of each piece. Raises DataError if there are too many bad records."""
        again = _SecondReading(read)
        for number, piece in enumerate(read(self._bad)):
            total = num_records(piece.chunk)
            self.records_in += total
            copies: tuple[Chunk, Chunk] | None = None
            self._reached = 0
            while True:
                start, seen, drawn = self._reached, list(self._seen), random.getstate()
                try:
                    result = self._process(piece.chunk, start)
                except BaseException as error:
                    if not is_for_user(error):
                        raise
                    copies = copies or again.copies(number, total)
                    pristine, other = (part_of(chunk, start, self._reached) for chunk in copies)
                    result = self._process_again(pristine, other, _shifted(piece.where, start), seen, drawn)
                yield result
                if self._reached >= total:
                    break

    def _process(self, chunk: Chunk, start: int) -> T:
        """Process records of a chunk from `start` on. Set `self._reached` to the end of the processed records.

        If the results are large, not all records are processed. This depends only on the sizes of the results.
        """
        total = num_records(chunk)
        parts: list[Chunk] = []
        count = total if not self._may_grow else 1
        while not parts or (self._reached < total and count):
            first, self._reached = self._reached, min(total, self._reached + max(1, count))
            part = chunk if (first, self._reached) == (0, total) else part_of(chunk, first, self._reached)
            parts.append(self._apply(part, 0, self._first_batched))
            each = max(1, sum(map(size_bytes, parts)) // max(1, self._reached - start))
            room = _MOST_RESULT_BYTES // each - (self._reached - start)
            count = max(0, room if room >= total - self._reached else min(room, 4 * (self._reached - first)))
        joined = parts[0] if len(parts) == 1 else with_contiguous_columns(concatenate(parts))
        return self._to_end(self._apply(joined, self._first_batched, len(self._operations)), self._last)

    def _process_again(
        self, pristine: Chunk, other: Chunk, where: Callable[[int], str], seen: list[int], drawn: Any
    ) -> T:
        """Process records that have failed, without those that fail alone.

        pristine, other: two copies of the records. seen, drawn: the state from before the records.
        """
        failed = self._find_failing(pristine, other, where, seen, drawn)
        self._restart(seen, drawn)
        try:
            return self._without(failed, other)
        except BaseException as error:
            if isinstance(error, DataError):
                error.where = error.where or _batch(where, num_records(other))
            if not is_for_user(error) or isinstance(error, DataError):
                raise
            raise self._failed_together(error, where, num_records(other)) from error

    def _restart(self, seen: list[int], drawn: Any) -> None:
        """Restore the numbers of records, and the state of `random`, from before the chunk."""
        self._seen = list(seen)
        random.setstate(drawn)

    def _apply(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        for index in range(start, stop):
            before = self._seen[index]
            self._seen[index] += num_records(chunk)
            operation = self._operations[index]
            self._step = operation
            chunk = operation.apply(chunk, self._partition, before)
        return chunk

    def _to_end(self, chunk: Chunk, last: Callable[[Chunk], T]) -> T:
        self._step = None
        return last(chunk)

    def _find_failing(
        self, chunk: Chunk, pristine: Chunk, where: Callable[[int], str], seen: list[int], drawn: Any
    ) -> list[_Failed]:
        """Process the records of a chunk one by one. Set aside those that fail, and return them.

        pristine: copies of the same records that no function has changed. Raises DataError if a function tries to end
        the process.
        """
        self._restart(seen, drawn)
        last = self._make_last()
        failed = []
        for index in range(num_records(chunk)):
            before = list(self._seen)
            try:
                result = self._apply(part_of(chunk, index, index + 1), 0, self._first_batched)
                if self._first_batched == len(self._operations):
                    self._to_end(result, last)
            except BaseException as error:
                if not is_for_user(error):
                    raise
                # Count a bad record at every step that it reached. So later records have the same positions at these
                # steps as if the record had not failed. `sample` depends on the positions.
                failed.append(_Failed(index, [new - old for old, new in zip(before, self._seen, strict=True)]))
                record = shown_record(part_of(pristine, index, index + 1))
                if not isinstance(error, Exception):
                    raise _ended(self._describe(error), where(index), record) from error
                self._bad.add(where(index), self._describe(error), record, error)
        return failed

    def _without(self, failed: list[_Failed], chunk: Chunk) -> T:
        """Process a chunk without these records."""
        parts: list[Chunk] = []
        start = 0
        for position, reached in failed:
            if start < position:
                parts.append(self._apply(part_of(chunk, start, position), 0, self._first_batched))
            self._seen = [old + new for old, new in zip(self._seen, reached, strict=True)]
            start = position + 1
        if start < num_records(chunk) or not parts:
            parts.append(self._apply(part_of(chunk, start, num_records(chunk)), 0, self._first_batched))
        remaining = with_contiguous_columns(concatenate(parts))
        return self._to_end(self._apply(remaining, self._first_batched, len(self._operations)), self._last)

    def _describe(self, error: BaseException) -> str:
        """Describe an error of the current step in one line."""
        if isinstance(error, (BadKey, BadResult, DataError)):
            return str(error.what if isinstance(error, DataError) else error)
        return describe_error(error, self._last_name if self._step is None else self._step.describe())

    def _failed_together(self, error: BaseException, where: Callable[[int], str], total: int) -> DataError:
        """Return the error of records that fail together, but not one by one."""
        place = _batch(where, total)
        if self._first_batched < len(self._operations):
            operation = self._operations[self._first_batched]
            return DataError(
                f"{operation.describe()} or a step after it raised {type(error).__name__}: {error}",
                where=place,
                hint="a batch can't be set aside: change the function so that it drops the rows that it can't process",
            )
        return DataError(
            f"records fail together, but not one by one: {self._describe(error)}",
            where=place,
            got="; ".join(getattr(error, "__notes__", ())) or None,
            hint="the values of these records don't fit together, such as numbers and text in one sum: convert them "
            "first; or the function depends on more than its arguments",
        )


class _SecondReading:
    """Reads the pieces of a task a second time, to get copies of the records that no function has changed.

    It starts with the first request, and reads only as far as the requested piece.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._pieces: Iterator[SourcedChunk] | None = None
        self._next = 0

    def copies(self, number: int, records: int) -> tuple[Chunk, Chunk]:
        """Return two copies of the chunk of a piece. The numbers must increase from call to call.

        records: the number of records in the chunk. Raises DataError if the chunk now has a different number of
        records.
        """
        if self._pieces is None:
            self._pieces = self._open()
        chunk = self._advance(self._pieces, number - self._next, records)
        self._next = number + 1
        if is_table(chunk):
            return chunk, chunk  # functions get new objects for each row, and can't change the table
        try:
            return unpack(pack(chunk)), chunk
        except Exception:  # the chunk has objects that only a function of this stage can create, such as locks
            return self._advance(self._open(), number, records), chunk

    def _open(self) -> Iterator[SourcedChunk]:
        # The first reading has already counted the records that can't be parsed.
        return self._read(BadRecords(sys.maxsize))

    def _advance(self, pieces: Iterator[SourcedChunk], skipped: int, records: int) -> Chunk:
        for _ in range(skipped):
            next(pieces, None)
        piece = next(pieces, None)
        if piece is None or num_records(piece.chunk) != records:
            raise DataError(
                "the input changed while it was being read",
                expected=f"{records} records",
                got=0 if piece is None else num_records(piece.chunk),
                where=None if piece is None else piece.where(0),
                hint="run the job again when nothing writes to its input",
            )
        return piece.chunk


def _shifted(where: Callable[[int], str], start: int) -> Callable[[int], str]:
    return lambda index: where(start + index)


def _batch(where: Callable[[int], str], total: int) -> str:
    """Return the location of a batch for messages."""
    return f"a batch of {total} records, from {where(0)} to {where(max(0, total - 1))}"


def _ended(what: str, where: str, record: Any) -> DataError:
    return DataError(
        f"a function tried to end the process: {what}",
        where=where,
        got=shown(record),
        hint="raise an exception such as ValueError instead, so that the record becomes a bad record (max_bad_records)",
    )


def unchanged(chunk: Chunk) -> Any:
    """Return the chunk unchanged, for stages whose end accepts chunks directly."""
    return chunk
