"""Shows the progress of a job, and records its events.

`JobEvents` writes JSON lines to the output folder. `JobProgress` shows a bar per stage on a terminal, and plain lines
elsewhere.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from manyhands.formatting import format_bytes, format_count, format_seconds
from manyhands.output import console, is_terminal, say
from manyhands.prepare.task import TaskResult
from manyhands.storage.atomic import write_atomic
from manyhands.storage.files import join_path, read_bytes
from manyhands.storage.location import is_local

EVENTS = "_events"


class JobEvents:
    """Appends events to `_events.jsonl` in `folder`. If there are several ranks, each has its own file.

    On a local disk, an event is written immediately. A store can't append, so events are written when the job ends
    (`close`). An event that can't be written does not end the job. If the disk is full, writing the output raises an
    error.

    listeners: the event is also passed to their method `event`. One that raises is reported, and gets no further event.
    """

    def __init__(self, folder: str, rank: int | None = None, listeners: Sequence[Any] = ()) -> None:
        self._folder, self._rank, self._listeners = folder, rank, list(listeners)
        self._path = join_path(folder, f"{EVENTS}.jsonl" if rank is None else f"{EVENTS}-rank-{rank}.jsonl")
        self._lines: list[bytes] = []

    def add(self, event: str, **facts: Any) -> None:
        """Record an event with the time (seconds since the epoch) and `facts`."""
        line = json.dumps({"seconds": time.time(), "event": event, **facts}, default=str).encode() + b"\n"
        self._tell({key: value for key, value in json.loads(line).items() if key != "event"}, event)
        if not is_local(self._folder):
            self._lines.append(line)
            return
        with suppress(OSError), open(self._path, "ab") as file:
            file.write(line)

    def _tell(self, facts: dict[str, Any], event: str) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.event(event, dict(facts))
            except (Exception, SystemExit) as error:
                self._listeners.remove(listener)
                what = f"{type(error).__name__}: {error}".partition("\n")[0]
                say(f"the listener {type(listener).__name__} failed, and the job continues without it: {what}")

    def close(self) -> None:
        """Write pending events to the store."""
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
    """A context manager that shows the progress of a job's stages on standard error.

    On a terminal, it shows a bar for the current stage and a line for each completed stage. Elsewhere, it prints a
    plain line every 10 s, and a line for each completed stage that took a second or more. It uses no thread.

    events: the record of the start and end of each stage, and of lost workers.
    """

    def __init__(self, stages: int, *, show: bool, events: JobEvents | None = None) -> None:
        self._stages, self._show, self._events = stages, show, events
        self._bar: Any = None
        self._number, self._title = 0, ""
        self._tasks = self._done = self._found = self._records = self._bytes = self._written = self._retries = 0
        self._started = self._shown_at = time.monotonic()

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, number: int, title: str, tasks: int, found: int) -> None:
        """Start a stage. An earlier run has completed `found` of its tasks."""
        self._number, self._title, self._tasks, self._done, self._found = number, title, tasks, found, found
        self._records = self._bytes = self._written = 0
        self._started = self._shown_at = time.monotonic()
        self._record("stage started", title=title, tasks=tasks, done_before=found)
        if self._show and is_terminal(sys.stderr):
            self._bar = _new_bar(f"stage {number + 1}/{self._stages}", tasks, found)
            self._bar.start()

    def task_done(self, result: TaskResult, size_bytes: int) -> None:
        """Count a completed task. size_bytes: the bytes that it read from input files, or wrote if it read none."""
        self._done += 1
        self._records += result.records_in
        self._bytes += size_bytes
        self._written += result.bytes_out
        self._refresh()

    def tick(self, retries: int) -> None:
        """Refresh the display. retries: the number of tasks that the engine has restarted so far."""
        if retries > self._retries:
            self._record("tasks restarted", tasks=retries - self._retries, why="their workers were lost")
        self._retries = retries
        self._refresh()

    def end(self) -> None:
        """End the current stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        seconds = time.monotonic() - self._started
        figures = {"tasks": self._done, "records_in": self._records, "bytes_written": self._written}
        self._record("stage done", title=self._title, **figures, seconds_taken=seconds)
        if self._show and (is_terminal(sys.stderr) or seconds >= 1):
            self._line(f"{self._figures(seconds)}  {format_seconds(seconds)}")

    def _record(self, event: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.add(event, stage=self._number + 1, of=self._stages, **facts)

    def _refresh(self) -> None:
        now = time.monotonic()
        if not self._show or now - self._shown_at < (_REDRAW_SECONDS if self._bar is not None else _LINE_SECONDS):
            return
        self._shown_at = now
        seconds = now - self._started
        completed = self._done - self._found
        left = (self._tasks - self._done) * seconds / completed if completed else float("nan")
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
            parts.append(f"{self._found} done before")
        if self._retries:
            parts.append(f"{self._retries} retries")
        return "  ".join(parts)

    def _line(self, figures: str) -> None:
        say(f"stage {self._number + 1}/{self._stages}  {self._title}  {figures}")


def _new_bar(name: str, tasks: int, found: int) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn(name, style="bold"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        console=console(),
        auto_refresh=False,
        expand=True,
        transient=True,
    )
    bar.add_task(name, total=tasks, completed=found, figures="")
    return bar
