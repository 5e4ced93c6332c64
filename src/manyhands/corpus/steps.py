"""The steps that prepare a corpus. Each step is a job, so a killed run can be resumed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from manyhands.output import say
from manyhands.prepare.dataset import Dataset
from manyhands.prepare.io.manifest import read_output_manifest
from manyhands.prepare.job.publishing import BAD_RECORDS
from manyhands.prepare.options import JobOptions


class Steps:
    """Runs the jobs of a corpus, each in its own folder in `folder`. seconds: the duration of each step, by name."""

    _MANY_PARTS, _PART_BYTES = 8, 2**20

    def __init__(self, folder: Path, options: JobOptions) -> None:
        self.options, self.seconds = options, dict[str, float]()
        self._folder = folder
        self._manifests: dict[str, dict[str, Any]] = {}
        self._cached: dict[str, Dataset] = {}
        self._started = time.monotonic()

    def start(self, name: str) -> None:
        """Start a step, and print its name."""
        self._started = time.monotonic()
        if self.options.get("progress", True):
            say(name)

    def end(self, name: str) -> None:
        """Record the duration of the step."""
        self.seconds[name] = time.monotonic() - self._started

    def cache(self, name: str, records: Dataset) -> tuple[Dataset, int]:
        """Compute and cache the records, unless an earlier run did. Return the cached records and their number."""
        self.start(name)
        folder = str(self._folder / re.sub(r"\W+", "-", name))
        cached = records.cache(folder)
        cached.take(1, **self.options)
        self._manifests[name] = read_output_manifest(folder) or {}
        self._cached[name] = cached
        self.end(name)
        return cached, int(self._manifests[name]["records"])

    def divided(self, cached: Dataset, records: Dataset) -> Dataset:
        """Return `records`, in smaller parts if the cached records that they are computed from have few parts.

        A small corpus has one part, so one task would call a slow function for all documents. The parts depend only on
        the data.
        """
        names = [name for name, found in self._cached.items() if found is cached]
        files = self._manifests[names[0]]["files"] if names else []
        if len(files) < self._MANY_PARTS and any(file["bytes"] > self._PART_BYTES for file in files):
            return records.repartition(partition_bytes=self._PART_BYTES)
        return records

    def digest(self, name: str) -> str:
        """Return the digest of the cached records of a step."""
        return str(self._manifests[name]["digest"])

    def bad_records(self) -> bytes:
        """Return the records that all steps set aside, as JSON lines."""
        return b"".join(path.read_bytes() for path in sorted(self._folder.glob(f"*/{BAD_RECORDS}")))
