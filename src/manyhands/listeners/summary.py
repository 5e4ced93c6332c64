"""The result of a run, for one screen and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from manyhands.engine.step.metrics import PHASES, StepMetrics
from manyhands.errors import Interrupted
from manyhands.formatting import GIB, MIB, format_bytes, format_count, format_seconds
from manyhands.storage.json_lines import numbers

_BAR_CELLS = 46

# The character and the colour of each phase in the stacked bar. Neighbouring phases have different characters, so the
# bar is readable without colours.
_STYLES = {
    "data": ("▒", "magenta"),
    "compute": ("█", "green"),
    "communication": ("▓", "blue"),
    "update": ("▒", "cyan"),
    "waiting": ("░", "yellow"),
}

_OTHER_STYLE = ("▚", "white")

_EIGHTHS = " ▏▎▍▌▋▊▉"


class Figures(NamedTuple):
    """Figures about the steps of a run. `Summary` has the same fields."""

    steps: int
    first_loss: float
    last_loss: float
    throughput: float
    throughput_unit: str
    step_seconds_median: float
    seconds_by_phase: dict[str, float]


class IslandFigures(NamedTuple):
    """Figures of a run with islands.

    rounds: the number of rounds. bytes_up, bytes_down: the bytes of rounds' files that this program sent and received.
    agreement: |mean of the islands' changes|^2 / mean of |change|^2 in the last round: 1 if all islands change the
    weights equally, 1 / islands if their changes are unrelated. None if it isn't known. seconds_waited: the time in
    which this program waited for the files of other clusters.
    """

    rounds: int
    bytes_up: int
    bytes_down: int
    agreement: float | None
    seconds_waited: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run.

    steps, first_loss, last_loss, throughput, throughput_unit, step_seconds_median, seconds_by_phase: computed by
    `StepFigures`.
    peak_memory_bytes_per_worker: the peak of each worker, by rank.
    sharding, device, precision: as in the strategy and the recipe. transport: the transport in use (never "auto").
    parameters: the number of elements in the model. sample: the text that recipe.sample returned, if any.
    digest: the digest of the final master weights.
    wall_seconds: the time from the last start of the workers to the end of the run.
    failures, lost_seconds, repeated_steps: as in `Failures`.
    validations: the figures of the last validation of each set. best: the step and the value of the best checkpoint
    for each figure of keep_best.
    islands: with islands, what this program sent and received, and how much the islands agreed in the last round.
    outcome: "completed"; a listener may also receive the summary of a run that was "interrupted" or that "failed".
    error: the error that ended the run. Such a summary has no digest and no peak memory.
    """

    name: str
    steps: int
    first_loss: float
    last_loss: float
    throughput: float
    throughput_unit: str
    step_seconds_median: float
    seconds_by_phase: dict[str, float]
    peak_memory_bytes_per_worker: list[int]
    workers: int
    sharding: str
    transport: str
    device: str
    precision: str
    parameters: int
    sample: str | None
    digest: str
    run_dir: str
    wall_seconds: float
    failures: int = 0
    lost_seconds: float = 0.0
    repeated_steps: int = 0
    validations: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    islands: IslandFigures | None = None
    outcome: str = "completed"
    error: str | None = None


class Failures(NamedTuple):
    """The cost of a run's failures: their number, the time until the run resumed, and the number of repeated steps."""

    failures: int
    lost_seconds: float
    repeated_steps: int


def failures_among(events: Sequence[dict[str, Any]]) -> Failures:
    """Compute `Failures` from the events of a run directory."""
    count, seconds, steps, since = 0, 0.0, 0, None
    for event in events:
        if event["event"] == "failed":
            count += 1
            since = since or event["seconds"]
        elif event["event"] == "started" and since is not None:
            seconds, steps, since = seconds + event["seconds"] - since, steps + event["repeats"], None
    return Failures(count, seconds, steps)


_MOST_SAMPLES = 4096


class StepFigures:
    """Computes `Figures` while steps are added, in a bounded amount of memory.

    first_loss, last_loss: the losses of the first and the last step. throughput: tokens or samples per second;
    `throughput_unit` states which. throughput, step_seconds_median and seconds_by_phase are medians, so that a slow
    first step or a checkpoint does not distort them. After many steps they are medians over evenly spaced steps, at
    least _MOST_SAMPLES of them. All are NaN if there are no steps.
    """

    def __init__(self, metrics: Iterable[StepMetrics] = ()) -> None:
        self._steps, self._stride = 0, 1
        self._first_loss = self._last_loss = math.nan
        self._unit = "samples"
        self._samples: list[tuple[float, ...]] = []  # throughput, seconds, and seconds of each phase
        for each in metrics:
            self.add(each)

    def add(self, metrics: StepMetrics) -> None:
        """Add a completed step. Skipped steps don't count."""
        if metrics.skipped:
            return
        if not self._steps:
            self._first_loss = metrics.loss
        self._last_loss, self._unit = metrics.loss, metrics.unit
        if self._steps % self._stride == 0:
            rate = metrics.amount / metrics.step_seconds if metrics.step_seconds > 0 else math.nan
            phases = (metrics.seconds.get(phase, 0.0) for phase in PHASES)
            self._samples.append((rate, metrics.step_seconds, *phases))
        self._steps += 1
        if len(self._samples) >= 2 * _MOST_SAMPLES:
            self._samples, self._stride = self._samples[::2], 2 * self._stride

    def figures(self) -> Figures:
        """Return the figures of all steps so far."""
        if not self._steps:
            return Figures(0, math.nan, math.nan, math.nan, "samples", math.nan, dict.fromkeys(PHASES, 0.0))
        rate, seconds, *phases = map(median, zip(*self._samples, strict=True))
        by_phase = dict(zip(PHASES, phases, strict=True))
        return Figures(self._steps, self._first_loss, self._last_loss, rate, self._unit, seconds, by_phase)


def unfinished(
    description: dict[str, Any], figures: StepFigures, wall_seconds: float, error: BaseException | None
) -> Summary:
    """Return the summary of a run that `error` ended. description: the fields of `Summary` that describe the run."""
    return Summary(
        **figures.figures()._asdict(),
        **description,
        peak_memory_bytes_per_worker=[],
        sample=None,
        digest="",
        wall_seconds=wall_seconds,
        outcome="interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed",
        error=None if error is None else str(error) or type(error).__name__,
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain numbers and strings.

    `loss` is the last step's loss. Non-finite numbers become null.
    """
    named = {
        "name": summary.name,
        "digest": summary.digest,
        "steps": summary.steps,
        "loss": summary.last_loss,
        "first_loss": summary.first_loss,
        "workers": summary.workers,
        "sharding": summary.sharding,
        "transport": summary.transport,
        "device": summary.device,
        "precision": summary.precision,
        "parameters": summary.parameters,
        f"{summary.throughput_unit}_per_second": summary.throughput,
        "step_seconds_median": summary.step_seconds_median,
        "seconds_by_phase": dict(summary.seconds_by_phase),
        "peak_memory_bytes_per_worker": list(summary.peak_memory_bytes_per_worker),
        "wall_seconds": summary.wall_seconds,
        "failures": summary.failures,
        "lost_seconds": summary.lost_seconds,
        "repeated_steps": summary.repeated_steps,
        "run_dir": summary.run_dir,
        "sample": summary.sample,
        "validations": numbers(summary.validations),
        "best": numbers(summary.best),
        "islands": None if summary.islands is None else summary.islands._asdict(),
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in named.items()
    }


def render(summary: Summary) -> RenderableType:
    """Return the summary for a terminal, to be printed with a rich Console."""
    facts = Table.grid(padding=(0, 3))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("loss", _loss(summary))
    for name, figures in summary.validations.items():
        facts.add_row(name, Text(_figures(figures)))
    for name, best in summary.best.items():
        facts.add_row("best checkpoint", Text(f"step {best['step']}   {name.rpartition(':')[0]} {best['value']:.4f}"))
    if summary.islands is not None:
        facts.add_row("islands", Text(_islands(summary.islands)))
    facts.add_row("speed", _speed(summary))
    facts.add_row("step time", _time_split(summary.seconds_by_phase))
    facts.add_row("peak memory", _memory(summary.peak_memory_bytes_per_worker))
    if summary.failures:
        facts.add_row("failures", Text(_failures(summary), style="yellow"))
    facts.add_row("digest", Text(summary.digest, style="bold"))
    facts.add_row("run directory", Text(summary.run_dir))
    parts: list[RenderableType] = [facts]
    if summary.sample:
        parts += [Text(), Panel(Text(summary.sample.strip()), title="sample", title_align="left", border_style="dim")]
    return Panel(
        Group(*parts),
        title=_title(summary),
        title_align="left",
        subtitle=_strategy(summary),
        subtitle_align="left",
        box=box.ROUNDED,
        border_style="green" if math.isfinite(summary.last_loss) else "red",
        padding=(1, 2),
    )


def _title(summary: Summary) -> Text:
    title = Text(summary.name, style="bold")
    steps = f"{summary.steps:,} step{'' if summary.steps == 1 else 's'}"
    title.append(f"  {steps} in {format_seconds(summary.wall_seconds)}", style="default not bold")
    return title


def _strategy(summary: Summary) -> Text:
    workers = f"{summary.workers} worker{'' if summary.workers == 1 else 's'}"
    parameters = f"{format_count(summary.parameters)} parameters"
    return Text(
        " · ".join((workers, summary.sharding, summary.transport, summary.device, summary.precision, parameters)),
        style="dim",
    )


def _islands(figures: IslandFigures) -> str:
    agreement = "" if figures.agreement is None else f"   agreement {figures.agreement:.2f}"
    exchanged = f"{format_bytes(figures.bytes_up)} up   {format_bytes(figures.bytes_down)} down"
    waited = f"   {format_seconds(figures.seconds_waited)} waited" if figures.seconds_waited >= 1 else ""
    return f"{figures.rounds:,} rounds   {exchanged}{agreement}{waited}"


def _failures(summary: Summary) -> str:
    steps = f"{summary.repeated_steps:,} step{'' if summary.repeated_steps == 1 else 's'} repeated"
    return f"{summary.failures}: {format_seconds(summary.lost_seconds)} until the run resumed, {steps}"


def _loss(summary: Summary) -> Text:
    text = Text(f"{summary.first_loss:.4f}")
    text.append(" → ", style="dim")
    better = summary.last_loss < summary.first_loss
    text.append(f"{summary.last_loss:.4f}", style="bold green" if better else "bold yellow")
    return text


def _speed(summary: Summary) -> Text:
    if math.isnan(summary.throughput):
        return Text("not measured", style="dim")
    speed = Text(f"{format_count(summary.throughput)} {summary.throughput_unit}/s", style="bold")
    return speed.append(f"   {format_seconds(summary.step_seconds_median)}/step (median)", style="default not bold")


def _figures(figures: dict[str, Any]) -> str:
    """Return the loss and the metrics of a validation that are single numbers."""
    shown = {name: value for name, value in figures.items() if name not in ("step", "set", "weight", "samples")}
    return "   ".join(f"{name} {value:.4f}" for name, value in shown.items() if isinstance(value, float))


def _time_split(seconds_by_phase: dict[str, float]) -> RenderableType:
    """Return a stacked bar of all phases and, below it, the time, the share and a bar of each phase."""
    total = sum(seconds_by_phase.values())
    if total <= 0:
        return Text("not measured", style="dim")
    phases = [phase for phase in dict.fromkeys((*PHASES, *seconds_by_phase)) if seconds_by_phase.get(phase, 0.0) > 0]
    stacked, filled, so_far = Text(), 0, 0.0
    rows = Table.grid(padding=(0, 2))
    rows.add_column()
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(no_wrap=True)
    for phase in phases:
        cell, colour = _STYLES.get(phase, _OTHER_STYLE)
        seconds = seconds_by_phase[phase]
        so_far += seconds
        cells = round(_BAR_CELLS * so_far / total) - filled
        stacked.append(cell * cells, style=colour)
        filled += cells
        share = seconds / total
        rows.add_row(
            Text(f"{cell} {phase}", style=colour), format_seconds(seconds), _percent(share), Text(_bar(share), colour)
        )
    return Group(stacked, rows)


def _percent(share: float) -> str:
    return "<1 %" if 0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def _bar(share: float, cells: int = 20) -> str:
    eighths = max(1, round(share * cells * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _memory(peaks: list[int]) -> RenderableType:
    """Return the peak of each worker, all in the same unit."""
    if not any(peaks):  # a run that had nothing to do measures nothing
        return Text("not measured", style="dim")
    unit, name = (GIB, "GiB") if max(peaks) >= 10 * GIB else (MIB, "MiB")
    written = [f"{peak / unit:,.1f}" if unit == GIB else f"{peak / unit:,.0f}" for peak in peaks]
    text = Text(" · ".join(written[:16]), style="bold")
    if len(written) > 16:
        text.append(f" · ... (max: {max(peaks) / unit:,.1f})")
    text.append(f" {name}" + (" by worker" if len(peaks) > 1 else ""), style="default not bold")
    return text
