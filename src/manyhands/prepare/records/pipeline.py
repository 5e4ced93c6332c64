"""Applies the steps of a stage to each chunk, and isolates records that fail.

Records that can't be read or that a function fails on: set aside with their place and the reason, up to a limit.

A stage's steps, applied to one chunk after the other; and which record is to blame when one of them raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from manyhands.errors import DataError, InvariantError
from manyhands.prepare.records.chunks import Chunk, concatenate, num_records, part_of, records_of
from manyhands.prepare.records.operations import Operation, name_of

_LONGEST = 65_536  # characters of a record that are kept


@dataclass(frozen=True)
class BadRecord:
    """A record that was set aside. `where`: file and line, or stage, partition and position; `what`: in one line."""

    where: str
    what: str
    record: str


class BadRecords:
    """Those of one task. More than `limit` of them end it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: list[BadRecord] = []

    def add(self, where: str, what: str, record: Any, cause: BaseException | None = None) -> None:
        """Set a record aside. Raises DataError if there are too many by now."""
        text = record if isinstance(record, str) else repr(record)
        self.found.append(BadRecord(where, what, text[:_LONGEST]))
        if len(self.found) > self._limit:
            raise too_many(self.found[-1], len(self.found), self._limit) from cause

    def to_jsonl(self) -> bytes:
        """One JSON object a line."""
        return b"".join(json.dumps(asdict(bad), ensure_ascii=False).encode() + b"\n" for bad in self.found)


def too_many(last: BadRecord, count: int, limit: int) -> DataError:
    """What to say when a job has more bad records than it may have."""
    return DataError(
        last.what if not limit else f"{count} bad records are more than max_bad_records allows; the last: {last.what}",
        where=last.where,
        expected=None if not limit else f"at most {limit}",
        got=last.record[:200],
        hint="mend the data or the function; or set max_bad_records, and bad records are written to "
        "_bad_records.jsonl beside the output instead",
    )


T = TypeVar("T")


@dataclass(frozen=True)
class SourcedChunk:
    """A chunk as it comes from a source, and where each of its records is from."""

    chunk: Chunk
    where: Callable[[int], str]


class BadKey(ValueError):
    """A record whose key can't be used."""


class Pipeline(Generic[T]):
    """Applies `operations` to pieces, then `last`, which makes of a chunk what the stage's end wants.

    Chunks are worked on as a whole. If that raises, the same chunk is worked on record by record, so that the one
    to blame is known by its place in the source: it is set aside, and the others go on. Steps that see records together
    (map_batches) and all after them take what is left as a whole, and an error there ends the task.
    """

    def __init__(
        self, operations: Sequence[Operation], partition: int, bad: BadRecords, last: Callable[[Chunk], T]
    ) -> None:
        self._operations, self._partition, self._bad, self._last = operations, partition, bad, last
        self._seen = [0] * len(operations)
        together = [index for index, operation in enumerate(operations) if operation.batched]
        self._first_batched = together[0] if together else len(operations)
        self.records_in = 0

    def run(self, pieces: Iterable[SourcedChunk]) -> Iterator[T]:
        """What becomes of each piece. Raises DataError for too many bad records."""
        for piece in pieces:
            self.records_in += num_records(piece.chunk)
            yield from self._one(piece)

    def _one(self, piece: SourcedChunk) -> list[T]:
        seen = list(self._seen)
        try:
            return [self._last(self._through(piece.chunk, 0, len(self._operations)))]
        except InvariantError:
            raise
        except Exception:
            self._seen = seen
            return self._record_by_record(piece)

    def _through(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        for index in range(start, stop):
            before = self._seen[index]
            self._seen[index] += num_records(chunk)
            chunk = self._operations[index].apply(chunk, self._partition, before)
        return chunk

    def _record_by_record(self, piece: SourcedChunk) -> list[T]:
        alone = self._first_batched == len(self._operations)
        done: list[T] = []
        kept: list[Chunk] = []
        for index in range(num_records(piece.chunk)):
            seen = list(self._seen)
            one = part_of(piece.chunk, index, index + 1)
            try:
                chunk = self._through(one, 0, self._first_batched)
                if alone:
                    done.append(self._last(chunk))
                else:
                    kept.append(chunk)
            except Exception as error:
                # A bad record counts for the steps that have seen it: positions of those after it stay what they are.
                self._seen = [max(old, new) for old, new in zip(seen, self._seen, strict=True)]
                self._bad.add(piece.where(index), _reason(error, self._operations), records_of(one)[0], error)
        if alone:
            return done
        return [self._together(piece, concatenate(kept) if kept else [])]

    def _together(self, piece: SourcedChunk, chunk: Chunk) -> T:
        try:
            return self._last(self._through(chunk, self._first_batched, len(self._operations)))
        except DataError:
            raise
        except Exception as error:
            operation = self._operations[self._first_batched]
            last = max(0, num_records(piece.chunk) - 1)
            raise DataError(
                f"{operation.describe()} or a step after it raised {type(error).__name__}: {error}",
                where=f"a batch of {num_records(chunk)} records, from {piece.where(0)} to {piece.where(last)}",
                hint="a batch can't be set aside: let the function leave out the rows that it can't take",
            ) from error


def _reason(error: Exception, operations: Sequence[Operation]) -> str:
    """In one line: what raised what."""
    if isinstance(error, (BadKey, DataError)):
        return str(error.what if isinstance(error, DataError) else error)
    raised = f"{type(error).__name__}: {error}"
    names = {name_of(function): function for operation in operations for function in vars(operation).values()}
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        for name, function in names.items():
            if getattr(function, "__code__", None) is code:
                file = trace.tb_frame.f_globals.get("__file__", code.co_filename)  # cloudpickle keeps only the former
                return f"{name} raised {raised} ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"a function raised {raised}"


def whole(chunk: Chunk) -> Any:
    """The `last` of stages that want chunks as they are."""
    return chunk
