"""Shows progress in a terminal, or as plain lines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from manyhands import output
from manyhands.engine.step.metrics import StepMetrics, WorkerFigures
from manyhands.errors import InvariantError
from manyhands.formatting import format_bytes, format_count, format_seconds
from manyhands.listeners.listener import Listener
from manyhands.listeners.summary import Summary

_RECENT_STEPS = 20

_REDRAW_SECONDS = 0.1

_BAR_CELLS = 4


class TrainingProgress(Listener):
    """Shows the progress of a run on standard error, or on another console.

    On a terminal, it shows a bar with step, loss, throughput, time per step and time left. Throughput and times are
    measured over the last 20 steps. Elsewhere, it prints a plain line at the first step, at the last step, and every
    `line_seconds` in between. There is no thread: the display changes only in `step` and `note`.
    """

    def __init__(self, console: Console | None = None, *, line_seconds: float = 10.0) -> None:
        self._line_seconds = line_seconds
        self._console = console or output.console()
        self._recent: deque[StepMetrics] = deque(maxlen=_RECENT_STEPS)
        self._shown_at = float("-inf")
        self._islands: set[int] = set()  # those that this program computes in turn

    def began(self, facts: Mapping[str, Any]) -> None:
        """Show the bar."""
        self._total_steps, self._last_shown = facts["steps"], facts["step"]
        self._progress = Progress(
            TextColumn(
                "{task.completed:>{task.fields[digits]}}/{task.total}",
                style="bold",
                table_column=Column(no_wrap=True, min_width=2 * len(str(self._total_steps)) + 1),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=self._console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=output.is_terminal(sys.stdout),
            disable=not self._console.is_interactive,
        )
        self._task = self._progress.add_task(
            "step",
            total=self._total_steps,
            completed=self._last_shown,
            digits=len(str(self._total_steps)),
            figures="first step ...",
        )
        self._progress.start()

    def ended(self, summary: Summary) -> None:
        """Show the last step, and leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Show the last step, and leave the bar as it is."""
        if self._recent and self._last_shown != self._recent[-1].step:
            self._show(time.monotonic())
        self._progress.stop()

    def step(self, metrics: StepMetrics, workers: Sequence[WorkerFigures]) -> None:
        """Show a completed step."""
        if metrics.skipped:
            return
        self._recent.append(metrics)
        now = time.monotonic()
        wait = _REDRAW_SECONDS if self._console.is_interactive else self._line_seconds
        if metrics.island is not None:
            self._islands.add(metrics.island)
        if now - self._shown_at >= wait or metrics.step == self._total_steps:
            self._show(now)

    def note(self, text: str) -> None:
        """Print `text` on its own line above the bar, for example about a checkpoint or a failed worker."""
        self._console.print(text, markup=False, highlight=False)

    def _show(self, now: float) -> None:
        done = self._recent[-1].step
        self._shown_at, self._last_shown = now, done
        if self._console.is_interactive:
            # The columns of the count, the figures and a short bar, with a space between them.
            width = self._console.width - 2 * len(str(self._total_steps)) - 1 - _BAR_CELLS - 2
            self._progress.update(self._task, completed=done, figures=self._figures(done, width))
            self._progress.refresh()
        else:
            line = f"step {done}/{self._total_steps}  {self._figures(done)}"
            self._console.print(line, markup=False, soft_wrap=True)

    def _figures(self, done: int, width: int | None = None) -> str:
        """Return the figures, without the less important ones if they don't fit into `width` characters."""
        if not self._recent:
            raise InvariantError("progress was shown before the first step")
        step_seconds = median(metrics.step_seconds for metrics in self._recent)
        seconds = sum(metrics.step_seconds for metrics in self._recent)
        per_second = sum(metrics.amount for metrics in self._recent) / seconds if seconds > 0 else float("nan")
        left = (self._total_steps - done) * step_seconds * max(1, len(self._islands))
        metrics = [f"{name} {value:.4f}" for name, value in self._recent[-1].metrics.items()]
        last = self._recent[-1]
        shown = [
            f"loss {last.loss:.4f}" if last.island is None else f"island {last.island}  loss {last.loss:.4f}",
            *metrics,
            f"{format_count(per_second)} {self._recent[-1].unit}/s",
            f"{format_seconds(step_seconds)}/step",
            f"{format_seconds(left)} left" if left > 0 else "done",
        ]
        for part in (shown[-2], *reversed(metrics), shown[-3], shown[-1]):
            if width is None or len("  ".join(shown)) <= width:
                break
            shown.remove(part)
        return "  ".join(shown)


class BytesProgress:
    """A context manager that shows progress in bytes, with rate and time left, if standard error is a terminal.

    The bar appears with the first bytes, so a call that is refused before them shows no bar.
    """

    def __init__(self, verb: str, console: Console | None = None) -> None:
        console = console or output.console()
        self._progress = Progress(
            TextColumn(verb, style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
            expand=True,
            disable=not console.is_interactive,
        )
        self._task = self._progress.add_task(verb, total=None, figures="")
        self._started = self._shown_at = time.monotonic()

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show that `done_bytes` of `total_bytes` are complete."""
        now = time.monotonic()
        if now - self._shown_at < _REDRAW_SECONDS and done_bytes < total_bytes:
            return
        self._shown_at = now
        per_second = done_bytes / max(now - self._started, 1e-9)
        left = (total_bytes - done_bytes) / per_second if per_second > 0 else float("inf")
        figures = (
            f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}",
            f"{format_bytes(per_second)}/s",
            f"{format_seconds(left)} left" if left > 0 else "done",
        )
        self._progress.start()
        self._progress.update(self._task, total=total_bytes, completed=done_bytes, figures="  ".join(figures))
        self._progress.refresh()
