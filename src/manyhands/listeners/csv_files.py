"""CSV files with the figures of steps and validations."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.listeners.listener import Listener
from manyhands.storage.atomic import write_atomic


class CSVListener(Listener):
    """Writes steps.csv, with a row for each step, and validations.csv, with a row (step, name, value) for each figure.

    folder: where to write. A run that resumes continues the files, and rows of steps that it repeats are replaced.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._columns: list[str] = []

    def began(self, facts: Mapping[str, Any]) -> None:
        """Create the folder, and remove rows of steps that will be repeated, or of an earlier run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in ("steps.csv", "validations.csv"):
            path = self._folder / name
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    header, *rows = list(csv.reader(file)) or [[]]
                # A process that was killed may have left a partial row.
                kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= facts["step"] > 0]
                write_atomic(path, _text([header, *kept]) if kept else "")
                if kept and name == "steps.csv":
                    self._columns = header

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Append a row to steps.csv."""
        if metrics.skipped:
            return
        numbers = metrics.numbers
        self._columns = self._columns or list(numbers)
        self._append("steps.csv", self._columns, [[numbers.get(name, "") for name in self._columns]])

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append the figures of a validation to validations.csv."""
        figures = [(evaluation.step, name, value) for name, value in evaluation.numbers.items() if value is not None]
        self._append("validations.csv", ["step", "name", "value"], figures)

    def _append(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        path = self._folder / name
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            data = _text(rows if size else [header, *rows]).encode()
            try:
                while data:  # if the disk has space for only a part, writing the remaining part raises the error
                    data = data[file.write(data) :]
            except OSError:
                os.truncate(path, size)
                raise


def _text(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
