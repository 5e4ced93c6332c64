"""Records that can't be read or that a function fails on: set aside with their place and the reason, up to a limit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from manyhands.errors import DataError

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
