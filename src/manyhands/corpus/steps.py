"""The steps of preparing a corpus, each a job that a killed run resumes."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from manyhands.prepare.dataset import Dataset
from manyhands.prepare.job.output import BAD_RECORDS, read_output_manifest
from manyhands.prepare.options import JobOptions


class Steps:
    """Runs jobs with one engine, each in a folder of its own in `folder`. seconds: how long each took."""

    def __init__(self, folder: Path, how: JobOptions) -> None:
        self.how, self.seconds = how, dict[str, float]()
        self._folder = folder
        self._manifests: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()

    def begin(self, name: str) -> None:
        """Tell which step begins."""
        self._began = time.monotonic()
        if self.how.get("progress", True):
            sys.stderr.write(f"{name}\n")

    def end(self, name: str) -> None:
        """Note how long the step took."""
        self.seconds[name] = time.monotonic() - self._began

    def keep(self, name: str, records: Dataset) -> tuple[Dataset, int]:
        """The same records, computed now if they aren't there; and how many they are."""
        self.begin(name)
        folder = str(self._folder / re.sub(r"\W+", "-", name))
        kept = records.cache(folder)
        kept.take(1, **self.how)
        self._manifests[name] = read_output_manifest(folder) or {}
        self.end(name)
        return kept, int(self._manifests[name]["records"])

    def digest(self, name: str) -> str:
        """Of all records of a step that was kept."""
        return str(self._manifests[name]["digest"])

    def bad_records(self) -> bytes:
        """Those of all steps that were set aside, as lines of JSON."""
        return b"".join(path.read_bytes() for path in sorted(self._folder.glob(f"*/{BAD_RECORDS}")))
