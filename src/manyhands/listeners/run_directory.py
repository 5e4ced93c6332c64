"""The run directory: manifest, metrics, events, digests.

    recipe.json      the recipe as used                  metrics.jsonl   one JSON object per step
    validations.jsonl    one JSON object per validation
    manifest.json    numerics, strategy, versions        events.jsonl    one JSON object per event, with its time
    checkpoints/     digests/     tensorboard/           logs/           worker-0.log, ...
    amendments.json  skipped steps, changed settings     earlier-1/      the record before the run started over
    listeners.json   the ids of the run at W&B, MLflow

Only worker 0 writes here, with three exceptions: every worker has its own log, all workers write checkpoints, and the
launcher records events.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.config import Recipe, Strategy
from manyhands.engine.step.amendments import Amendments
from manyhands.engine.step.metrics import StepMetrics
from manyhands.errors import ConfigError, DataError
from manyhands.listeners.recipe_description import describe
from manyhands.storage.atomic import write_atomic
from manyhands.storage.json_lines import append_line, complete_lines, numbers
from manyhands.storage.run_lock import LOCK
from manyhands.storage.untrusted import open_log, read_inside

RUN_FORMAT = "manyhands run 3"
"""Format 1 had other file names. Format 2 counted the steps of metrics and amendments from 0."""

_LAST_SECONDS = 1 << 35
"""The time of a valid event is below this limit, which is in the year 3058."""

_FOLDERS = ("logs", "checkpoints", "digests", "tensorboard")

ISLANDS = "islands"
"""The folder with the states and files of islands, and the run of their warm steps."""

AMENDMENTS, IDS = "amendments.json", "listeners.json"

_RECORDS = ("metrics.jsonl", "validations.jsonl", IDS, "events.jsonl")

_BEFORE_MANIFEST = (*_FOLDERS, ISLANDS, "scratch", "recipe.json", AMENDMENTS, *_RECORDS, LOCK)
"""The names of the files and folders that a run may write before its manifest."""

MOST_TABLES, LEAST_TABLES, MOST_TABLE_BYTES = 128, 16, 1 << 30
"""The limits of the tables of hashes that a run keeps. A table has 8 bytes for each block of 1,024 parameters."""

_TABLE = re.compile(r"step-(\d{8,})\.npy")


def table_name(step: int) -> str:
    """Return the name of the table with the hashes of all blocks after `step` steps."""
    return f"step-{step:08d}.npy"


def tables_to_keep(steps: Iterable[int], most: int) -> set[int]:
    """Select at most `most` of these steps: the newest steps, and evenly spaced older steps.

    The spacing depends on the steps alone, so runs of about the same length keep tables of the same steps, and the
    steps of a longer run are among those of a shorter one.
    """
    ordered = sorted(steps)
    older, newest = ordered[: -(most // 2)], ordered[-(most // 2) :]
    spacing = math.gcd(*older)
    while len(older) > most - most // 2:
        spacing *= 2
        older = [step for step in older if step % spacing == 0]
    return {*older, *newest}


class RunDirectory:
    """The directory of one run. The constructor creates it, or opens the directory of an earlier run.

    Raises ConfigError if `path` is not a run directory, has another format, or can't be written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _refuse_foreign(self.path)
        _refuse_other_format(self.path)
        try:
            for folder in _FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        for folder in _FOLDERS:
            if folder != "checkpoints" and (self.path / folder).is_symlink():
                raise ConfigError(
                    "a folder of the run directory is a link",
                    where=str((self.path / folder).absolute()),
                    got=os.readlink(self.path / folder),
                    hint="what the run writes would go elsewhere: replace the link with a folder, or choose another "
                    "run_dir",
                )
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise _not_writable(self.path, PermissionError("no permission to write"))

    @classmethod
    def open_existing(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open the run directory at `path` for reading, without creating or changing anything. Raises ConfigError."""
        where = Path(path)
        if not where.exists():
            raise ConfigError("there is no run directory here", where=str(where.absolute()), hint="check the path")
        if not (where.is_dir() and _is_run(where)):
            inside = sorted(p.parent.name for p in where.glob("*/manifest.json") if _is_run(p.parent))
            raise ConfigError(
                "this is not a run directory",
                where=str(where.absolute()),
                expected="a directory with the manifest.json of a run",
                got=f"a directory with the runs {', '.join(inside[:8])}" if inside else "no such manifest.json",
                hint="name one of the runs" if inside else "give the run_dir that the run was started with",
            )
        _refuse_other_format(where)
        run = cls.__new__(cls)
        run.path = where
        return run

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def digests(self) -> Path:
        """Return the folder of the digests of all blocks, for comparing runs."""
        return self.path / "digests"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """Return the file with the metrics of all steps."""
        return self.path / "metrics.jsonl"

    @property
    def validations(self) -> Path:
        """Return the file with the figures of all validations."""
        return self.path / "validations.jsonl"

    def log(self, rank: int) -> Path:
        """Return the log file of one worker."""
        return self.path / "logs" / f"worker-{rank}.log"

    def open_log(self, rank: int) -> io.TextIOWrapper:
        """Open the log file of one worker to append to it. Raises ConfigError, also if it is a link."""
        try:
            return open_log(self.log(rank))
        except OSError as error:
            raise _not_writable(self.log(rank), error) from error

    def write_recipe(self, recipe: Recipe | Mapping[str, Any]) -> None:
        """Write recipe.json, for people to read. It names functions and data, but does not store them."""
        write_json(self.path / "recipe.json", describe(recipe) if isinstance(recipe, Recipe) else dict(recipe))

    def read_recipe(self) -> dict[str, Any]:
        """Return recipe.json as it was written. Raises DataError."""
        return _read_json(self.path / "recipe.json")

    def write_amendments(self, amendments: Amendments) -> None:
        """Write amendments.json if there are amendments: steps to skip, and changed settings. Raises ConfigError."""
        if amendments:
            write_json(self.path / AMENDMENTS, amendments.as_json())

    def read_amendments(self) -> Amendments:
        """Return the amendments of the run. Raises DataError and ConfigError if the file can't be read."""
        path = self.path / AMENDMENTS
        return Amendments.from_json(_read_json(path)) if path.exists() else Amendments()

    def write_manifest(self, numerics: Mapping[str, Any], strategy: Strategy | Mapping[str, Any], **more: Any) -> None:
        """Write manifest.json: numerics identity, strategy, versions, `more`, and the time when the run was created.

        A resumed run keeps its time of creation; `updated_at` is the current time.
        """
        path, now = self.path / "manifest.json", datetime.now(UTC).isoformat(timespec="seconds")
        created_at = self.read_manifest().get("created_at", now) if path.exists() else now
        write_json(
            path,
            {
                "format": RUN_FORMAT,
                "created_at": created_at,
                "updated_at": now,
                "numerics": dict(numerics),
                "strategy": dataclasses.asdict(strategy) if isinstance(strategy, Strategy) else dict(strategy),
                "versions": versions(),
                **more,
            },
        )

    def read_manifest(self) -> dict[str, Any]:
        """Return manifest.json as it was written. Raises DataError."""
        return _read_json(self.path / "manifest.json")

    def move_aside(self) -> Path | None:
        """Move the record of the run so far to a new folder `earlier-N`, and return it; None if there is no record.

        The manifest is copied, because the run keeps its id and the location of its checkpoints. A link to a folder of
        checkpoints stays. The caller holds the run's lock. Raises ConfigError.
        """
        names = list(filter(self._is_recorded, (*_FOLDERS, ISLANDS, "recipe.json", "code.diff", AMENDMENTS, *_RECORDS)))
        if not names:
            return None
        numbers = [int(path.name.partition("-")[2]) for path in self.path.glob("earlier-*") if path.name[8:].isdigit()]
        aside = self.path / f"earlier-{max(numbers, default=0) + 1}"
        manifest = self.read_manifest() if (self.path / "manifest.json").exists() else None
        try:
            aside.mkdir()
            # events.jsonl is last: until it is moved, a run whose checkpoints are missing is refused.
            for name in names:
                (self.path / name).rename(aside / name)
            for folder in _FOLDERS:
                (self.path / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        if manifest is not None:
            write_json(aside / "manifest.json", manifest)
            write_json(self.path / "manifest.json", {k: v for k, v in manifest.items() if k != "created_at"})
        return aside

    def _is_recorded(self, name: str) -> bool:
        path = self.path / name
        if name == "checkpoints" and path.is_symlink():
            return False
        return any(path.iterdir()) if path.is_dir() else path.exists()

    def append_metrics(self, metrics: StepMetrics) -> None:
        """Append the metrics of one step to metrics.jsonl.

        The line survives the end of this process. Raises ConfigError.
        """
        _append(self.metrics, dataclasses.asdict(metrics))

    def append_validation(self, figures: Mapping[str, Any]) -> None:
        """Append the figures of one validation to validations.jsonl. Raises ConfigError."""
        _append(self.validations, figures)

    def read_validations(self) -> list[dict[str, Any]]:
        """Return the figures of all validations in the order in which they were written, without partial lines.

        Raises DataError for a line that does not hold the figures of a validation.
        """
        found = []
        for number, value in complete_lines(self.validations):
            if not isinstance(value, dict) or type(value.get("step")) is not int or "set" not in value:
                raise DataError(
                    "a line of validations.jsonl does not hold the figures of a validation",
                    where=f"{self.validations.absolute()}, line {number}",
                    got=repr(value)[:80],
                    hint="remove the line or the file: it is only a record, and resuming does not need it",
                )
            found.append(value)
        return found

    def truncate_validations(self, step: int, *, validated: bool) -> None:
        """Remove the validations of steps after `step`, for a run that resumes after `step`.

        validated: False if the validations of `step` itself will be made again. Raises DataError and ConfigError.
        """
        later = [
            number
            for number, value in enumerate(self.read_validations(), start=1)
            if value["step"] > step or (value["step"] == step and not validated)
        ]
        _truncate(self.validations, later[0] if later else None)

    def append_event(self, event: str, **facts: Any) -> None:
        """Append an event to events.jsonl, with the time in seconds since the epoch and `facts`. Raises ConfigError.

        event: "started over", "started", "saved", "not saved", "not recorded", "amended", "skipped", "failed",
        "hosts changed", "patience changed", "stopped early", "listener failed", "not sent", "ended" or "stopped".
        """
        _append(self.path / "events.jsonl", {"seconds": time.time(), "event": event, **facts})

    def write_digests(self, step: int, hashes: Any) -> None:
        """Write the hashes of all blocks after `step` steps, as a NumPy array. Raises ConfigError.

        Deletes older tables, so that at most MOST_TABLES tables with about MOST_TABLE_BYTES remain. See
        `tables_to_keep`.
        """
        table = io.BytesIO()
        np.save(table, hashes)
        _write(self.digests / table_name(step), table.getvalue(), durable=False)
        found = {int(match[1]): match[0] for match in map(_TABLE.fullmatch, os.listdir(self.digests)) if match}
        most = max(LEAST_TABLES, min(MOST_TABLES, MOST_TABLE_BYTES // table.tell()))
        try:
            for other in found.keys() - tables_to_keep(found, most):
                if not (self.digests / found[other]).is_symlink():
                    (self.digests / found[other]).unlink(missing_ok=True)
        except OSError as error:
            raise _not_writable(self.digests, error) from error

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events in the order in which they were written, without partial lines."""
        return events_in(self.path)

    def read_metrics(self) -> list[StepMetrics]:
        """Return the metrics of all steps in the order in which they were written, without partial lines.

        Raises DataError for a line that does not hold the metrics of a step.
        """
        return [_parse(value, number, self.metrics) for number, value in complete_lines(self.metrics)]

    def read_step_digests(self) -> dict[int, str]:
        """Return the digest after each step that has one: of a step's metrics, or of the result of a round of islands.

        Raises DataError for a line that does not hold the metrics of a step.
        """
        of_steps = {each.step: each.digest for each in self.read_metrics() if each.digest is not None}
        of_rounds = {
            event["step"]: event["digest"]
            for event in self.read_events()
            if event["event"] == "digest" and type(event.get("step")) is int and isinstance(event.get("digest"), str)
        }
        return of_steps | of_rounds

    def truncate_metrics(self, step: int) -> None:
        """Remove the metrics of steps after `step`, and a partial last line, for a run that resumes after `step`.

        The file is shortened in place, which needs no space on a full disk. Raises DataError and ConfigError.
        """
        lines = complete_lines(self.metrics)
        later = [number for number, value in lines if _parse(value, number, self.metrics).step > step]
        _truncate(self.metrics, later[0] if later else None)


def _truncate(path: Path, line: int | None) -> None:
    """Remove all lines of a file from the given line on, or only a partial last line."""
    if path.exists():
        kept = path.read_bytes().split(b"\n")[: line - 1 if line else -1]
        try:
            os.truncate(path, sum(len(each) + 1 for each in kept))
        except OSError as error:
            raise _not_writable(path, error) from error


def _append(path: Path, value: Mapping[str, Any]) -> None:
    try:
        append_line(path, value)
    except OSError as error:
        raise _not_writable(path, error) from error


def events_in(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the run directory `folder`, or an empty list if there is none. Raises DataError."""
    return [value for _, value in complete_lines(folder / "events.jsonl") if _is_event(value)]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` atomically and durably. Readers see the old file or the new file, even after a crash.

    Numbers that JSON lacks (infinity, NaN) are written as strings. Raises ConfigError if the file can't be written.
    """
    _write(path, json.dumps(numbers(dict(value)), indent=2, allow_nan=False, default=str) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python, torch, numpy, Manyhands and the operating system."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("manyhands", "torch", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _is_event(value: Any) -> bool:
    """Return True if the object has the name of an event, a valid time, and no invalid rank."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    seconds, rank = value.get("seconds"), value.get("rank", -1)
    has_time = isinstance(seconds, (int, float)) and 0 <= seconds < _LAST_SECONDS
    return has_time and type(rank) is int and rank < 1 << 32


def _parse(entry: Any, number: int, path: Path) -> StepMetrics:
    got = repr(entry)[:80]
    try:
        for name in ("loss", "weight", "gradient_norm", "step_seconds"):
            entry[name] = float(entry[name])
        if type(entry["step"]) is not int or not isinstance(entry.get("digest"), str | None):
            raise TypeError("step must be an integer, and digest a text")
        entry["learning_rates"] = tuple(float(rate) for rate in entry["learning_rates"])
        entry["metrics"] = {name: float(value) for name, value in entry.get("metrics", {}).items()}
        entry["seconds"] = {phase: float(seconds) for phase, seconds in entry["seconds"].items()}
        return StepMetrics(**entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            "a line of metrics.jsonl does not hold the metrics of a step",
            where=f"{path.absolute()}, line {number}",
            got=f"{got} ({type(error).__name__}: {error})",
            hint="remove the line or the file: it is only a record, and resuming does not need it",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_inside(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} can't be read: {error}", where=str(path.absolute())) from error
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is not a JSON object", where=str(path.absolute()), got=type(value).__name__)
    return value


def _write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    try:
        write_atomic(path, content, durable=durable)
    except OSError as error:
        raise _not_writable(path, error) from error


def _is_run(path: Path) -> bool:
    try:
        return str(_read_json(path / "manifest.json").get("format", "")).startswith("manyhands run ")
    except DataError:
        return False


def _refuse_foreign(path: Path) -> None:
    """Raise ConfigError if `path` is a file, or holds files that no run wrote. A killed run may lack a manifest."""
    try:
        if not path.exists() or (path.is_dir() and _is_run(path)):
            return
        entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    except OSError as error:
        raise _not_writable(path, error) from error
    ours = all(name in _BEFORE_MANIFEST or (name[0] == "." and name.endswith(".tmp")) for name in entries)
    if not path.is_dir() or not ours:
        raise ConfigError(
            "run_dir exists, but is not a run directory",
            where=str(path.absolute()),
            expected="a new path, an empty directory, or the directory of an earlier run",
            got=f"a directory with {', '.join(sorted(entries)[:5])}" if path.is_dir() else "a file",
            hint="choose another run_dir; nothing was written",
        )


def _refuse_other_format(path: Path) -> None:
    """Raise ConfigError if the run directory `path` has a format other than RUN_FORMAT."""
    if not _is_run(path):
        return
    found = str(_read_json(path / "manifest.json")["format"])
    if found != RUN_FORMAT:
        raise ConfigError(
            "the run directory has another format",
            where=str(path.absolute()),
            expected=RUN_FORMAT,
            got=found,
            hint=(
                "a development version before 0.1.0 wrote it: use that version, or choose another run_dir"
                if found in ("manyhands run 1", "manyhands run 2")
                else "a newer version of Manyhands wrote it: install that version, or choose another run_dir"
            ),
        )


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the run directory can't be written: {error.strerror or error}",
        where=str(path.absolute()),
        hint="choose a run_dir that you may write to, on a disk with free space",
    )
