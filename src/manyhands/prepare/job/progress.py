"""Progress and events of a job.

What happened to an output, and when: lines of JSON in its folder, as a run of training leaves them.

What a person sees while data are prepared: a line per stage that moves on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import Any

from manyhands.formatting import format_bytes, format_count, format_seconds
from manyhands.prepare.task import TaskResult
from manyhands.storage.atomic import write_atomic
from manyhands.storage.files import join_path, read_bytes
from manyhands.storage.location import is_local

EVENTS = "_events"


class JobEvents:
    """Appends to `_events.jsonl` in `folder`; a rank of several, to a file of its own.

    On a local disk each event is there at once; in a store, which can't append, when the job ends (`close`). Not being
    able to write it ends no job: that is the output's own matter.
    """

    def __init__(self, folder: str, rank: int | None = None) -> None:
        self._folder, self._rank = folder, rank
        self._path = join_path(folder, f"{EVENTS}.jsonl" if rank is None else f"{EVENTS}-rank-{rank}.jsonl")
        self._lines: list[bytes] = []

    def add(self, event: str, **facts: Any) -> None:
        """Note an event with the time (seconds since the epoch) and what is to be known of it."""
        line = json.dumps({"seconds": time.time(), "event": event, **facts}, default=str).encode() + b"\n"
        if not is_local(self._folder):
            self._lines.append(line)
            return
        with suppress(OSError), open(self._path, "ab") as file:
            file.write(line)

    def close(self) -> None:
        """Put what is noted into the store."""
        if not self._lines:
            return
        with suppress(OSError):
            before = b""
            with suppress(FileNotFoundError):
                before = read_bytes(self._path)
            write_atomic(self._path, before + b"".join(self._lines))
        self._lines = []


_LINE_SECONDS = 10.0

_REDRAW_SECONDS = 0.1


class JobProgress:
    """Progress of a job's stages, on standard error: a context manager.

    On a terminal, a bar for the stage at hand, and a line for each that is done. Elsewhere, a plain line when a stage
    that took a while is done, and every 10 s. There is no thread. events: where stages and lost workers are noted.
    """

    def __init__(self, stages: int, *, show: bool, events: JobEvents | None = None) -> None:
        self._stages, self._show, self._events = stages, show, events
        self._bar: Any = None
        self._number, self._title = 0, ""
        self._tasks = self._done = self._found = self._records = self._bytes = self._written = self._retries = 0
        self._began = self._shown_at = time.monotonic()

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, number: int, title: str, tasks: int, found: int) -> None:
        """A stage begins; `found` of its tasks were done by an earlier run."""
        self._number, self._title, self._tasks, self._done, self._found = number, title, tasks, found, found
        self._records = self._bytes = self._written = 0
        self._began = self._shown_at = time.monotonic()
        self._note("stage begun", title=title, tasks=tasks, done_before=found)
        if self._show and sys.stderr.isatty():
            self._bar = _new_bar(f"stage {number + 1}/{self._stages}", tasks, found)
            self._bar.start()

    def task_done(self, result: TaskResult, size_bytes: int) -> None:
        """A task is done; `size_bytes`: what it read of files, or wrote."""
        self._done += 1
        self._records += result.records_in
        self._bytes += size_bytes
        self._written += result.bytes_out
        self._refresh()

    def tick(self, retries: int) -> None:
        """Time has passed."""
        if retries > self._retries:
            self._note("tasks begun again", tasks=retries - self._retries, why="their workers were lost")
        self._retries = retries
        self._refresh()

    def end(self) -> None:
        """The stage is done."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        seconds = time.monotonic() - self._began
        figures = {"tasks": self._done, "records_in": self._records, "bytes_written": self._written}
        self._note("stage done", title=self._title, **figures, seconds_taken=seconds)
        if self._show and (sys.stderr.isatty() or seconds >= 1):
            self._line(f"{self._figures(seconds)}  {format_seconds(seconds)}")

    def _note(self, event: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.add(event, stage=self._number + 1, of=self._stages, **facts)

    def _refresh(self) -> None:
        now = time.monotonic()
        if not self._show or now - self._shown_at < (_REDRAW_SECONDS if self._bar is not None else _LINE_SECONDS):
            return
        self._shown_at = now
        seconds = now - self._began
        made = self._done - self._found
        left = (self._tasks - self._done) * seconds / made if made else float("nan")
        figures = f"{self._figures(seconds)}  {format_seconds(left)} left"
        if self._bar is None:
            self._line(figures)
        else:
            self._bar.update(self._bar.task_ids[0], completed=self._done, figures=figures)
            self._bar.refresh()

    def _figures(self, seconds: float) -> str:
        parts = [
            f"{self._done}/{self._tasks} tasks",
            f"{format_count(self._records / max(seconds, 1e-9))} records/s",
            f"{self._bytes / max(seconds, 1e-9) / 1e6:,.1f} MB/s",
        ]
        if self._written:
            parts.append(f"{format_bytes(self._written)} written")
        if self._found:
            parts.append(f"{self._found} were done before")
        if self._retries:
            parts.append(f"{self._retries} retries")
        return "  ".join(parts)

    def _line(self, figures: str) -> None:
        sys.stderr.write(f"stage {self._number + 1}/{self._stages}  {self._title}  {figures}\n")


def _new_bar(name: str, tasks: int, found: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn(name, style="bold"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        expand=True,
        transient=True,
    )
    bar.add_task(name, total=tasks, completed=found, figures="")
    return bar
