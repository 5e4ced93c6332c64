"""What preparing data came to."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from manyhands.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """Of one stage: its tasks, the records and bytes that they wrote, and how long it took."""

    title: str
    tasks: int
    records: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `Dataset.write` has written.

    path, files: the folder, and the names of its files in order. records, bytes: in all of them. bad_records: how many
    were set aside, in `_bad_records.jsonl`. digest: SHA-256 over all files: equal whatever the workers, the memory and
    the engine. seconds: of this call. stages: none if the output was there already.
    """

    path: str
    files: tuple[str, ...]
    records: int
    bytes: int
    bad_records: int
    digest: str
    seconds: float
    stages: tuple[StageFigures, ...]

    def __str__(self) -> str:
        """For people, on a few lines."""
        bad = f", {format_count(self.bad_records)} bad records set aside" if self.bad_records else ""
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        lines = [
            f"{format_count(self.records)} records in {files}, {format_bytes(self.bytes)}{bad}: {self.path}",
            *(
                f"  {format_seconds(stage.seconds):>9}  {stage.title}: "
                f"{stage.tasks} task{'' if stage.tasks == 1 else 's'}, "
                f"{format_count(stage.records)} records, {format_bytes(stage.bytes)} written"
                for stage in self.stages
            ),
            f"  {format_seconds(self.seconds):>9}  in all" if self.stages else "  was there already",
            f"  digest     {self.digest}",
        ]
        return "\n".join(lines)


def show(summary: PrepareSummary, *, progress: bool) -> None:
    """On the terminal, if there is one and `progress` is wanted: a program's own output stays what it is."""
    if progress and sys.stderr.isatty():
        sys.stderr.write(f"{summary}\n")
