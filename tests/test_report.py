"""What people see: progress, summary, curves, and numbers with their units."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyhands.engine.step.metrics import PHASES, StepMetrics
from manyhands.formatting import GIB, MIB, format_bytes, format_count, format_seconds
from manyhands.listeners.summary import StepFigures, Summary, render, to_json
from manyhands.listeners.tensorboard import TensorBoardListener
from manyhands.listeners.terminal import BytesProgress, TrainingProgress

SECONDS = {"data": 0.01, "compute": 0.6, "communication": 0.2, "update": 0.1, "waiting": 0.09}


def step_metrics(step: int, step_seconds: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=5.0 / step,
        weight=2000.0,
        samples=8,
        weighted=True,
        gradient_norm=0.5,
        learning_rates=(0.1, 0.2),
        step_seconds=step_seconds,
        seconds=SECONDS,
    )


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "name": "gpt",
        **StepFigures(step_metrics(step, 9.0 if step == 1 else 1.0) for step in range(1, 6)).figures()._asdict(),
        "peak_memory_bytes_per_worker": [1191 * MIB, 1187 * MIB],
        "workers": 2,
        "sharding": "zero2",
        "transport": "shared-memory",
        "device": "cpu",
        "precision": "bf16",
        "parameters": 69_400_000,
        "sample": "To be, [bold]or not[/] to be",
        "digest": "9f" * 32,
        "run_dir": "runs/first",
        "wall_seconds": 48.2,
    }
    return Summary(**(values | changes))


def rendered(value: Summary, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(render(value))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (7, "7"), (2.345, "2.35"), (950, "950"), (999.7, "1.00 k"), (12_345, "12.3 k"), (999_999, "1.00 M"),
        (69_400_000, "69.4 M"), (1_500_000_000, "1.50 B"), (2e12, "2.00 T"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"), (85e-6, "85 µs"), (0.0123, "12.3 ms"), (0.9999, "1.00 s"), (1.742, "1.74 s"),
        (59.99, "1 min 00 s"), (125, "2 min 05 s"), (11220, "3 h 07 min"), (52 * 3600, "2 d 04 h"), (math.inf, "?"),
        (math.nan, "?"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (950, "950 B"), (12_345, "12.1 KiB"), (2 * MIB, "2.00 MiB"), (5e9, "4.66 GiB")],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_figures_are_medians_so_a_slow_first_step_does_not_distort_them() -> None:
    found = StepFigures([step_metrics(1, 9.0), step_metrics(2), step_metrics(3)]).figures()
    assert found.steps == 3
    assert (found.first_loss, found.last_loss) == (5.0, 5.0 / 3)
    assert (found.throughput, found.step_seconds_median) == (2000.0, 1.0)
    assert found.seconds_by_phase == SECONDS
    nothing = StepFigures().figures()
    assert nothing.steps == 0
    assert math.isnan(nothing.last_loss)
    assert set(nothing.seconds_by_phase) == set(PHASES)


def test_figures_take_bounded_memory_however_many_steps_there_are() -> None:
    found = StepFigures()
    for step in range(1, 20_001):
        found.add(step_metrics(step, 1.0 + step % 2))
    shown, few = found.figures(), StepFigures(step_metrics(step, 1.0) for step in range(1, 10)).figures()
    assert len(found._samples) < 8192
    assert (shown.steps, shown.first_loss, shown.last_loss) == (
        20_000,
        step_metrics(1).loss,
        step_metrics(20_000).loss,
    )
    assert shown.seconds_by_phase.keys() == few.seconds_by_phase.keys()


def test_the_summary_shows_all_figures() -> None:
    text = rendered(summary())
    for part in (
        "gpt", "5 steps in 48.2 s", "5.0000 → 1.0000", "2.00 k tokens/s", "1.00 s/step", "compute", "600 ms", "60 %",
        "1 %", "1,191 · 1,187 MiB by worker", "To be, [bold]or not[/] to be", "9f" * 32, "runs/first",
        "2 workers · zero2 · shared-memory · cpu · bf16 · 69.4 M parameters",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_summary_fits_every_terminal(width: int) -> None:
    assert all(len(line) <= width for line in rendered(summary(), width).splitlines())


def test_the_summary_is_shown_with_missing_figures() -> None:
    nothing = StepFigures().figures()._asdict()
    text = rendered(summary(**nothing, sample=None, peak_memory_bytes_per_worker=[], workers=1))
    assert text.count("not measured") == 3
    assert rendered(summary(peak_memory_bytes_per_worker=[0, 0])).count("not measured") == 1
    assert "sample" not in text
    assert "1 worker ·" in text
    many = rendered(summary(peak_memory_bytes_per_worker=[(20 + rank) * GIB for rank in range(64)]))
    assert "20.0 · 21.0" in many
    assert "max: 83.0" in many


def test_the_stacked_bar_has_one_length_and_unknown_phases_are_shown() -> None:
    text = rendered(summary(seconds_by_phase={"compute": 1.0, "prefetch": 1.0}))
    bar = next(line for line in text.splitlines() if "step time" in line)
    assert bar.count("█") == bar.count("▚") == 23
    assert "prefetch" in text


def test_the_json_has_the_figures_and_is_strict() -> None:
    value = to_json(summary(last_loss=math.nan))
    keys = "digest steps loss workers sharding transport tokens_per_second step_seconds_median"
    keys += " peak_memory_bytes_per_worker"
    assert set(keys.split()) <= set(value)
    assert value["loss"] is None
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def bytes_progress_of(console: Console) -> str:
    with BytesProgress("exporting", console) as bar:
        for done in range(1, 6):
            bar.update(done * MIB, 5 * MIB)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_byte_progress_is_shown_on_a_terminal_only() -> None:
    text = bytes_progress_of(
        Console(file=StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    )
    for part in ("exporting", "5.00 MiB of 5.00 MiB", "/s  done"):
        assert part in text
    assert bytes_progress_of(Console(file=StringIO())) == ""


def progress_of(console: Console, steps: int, **options: Any) -> str:
    bar = TrainingProgress(console, **options)
    bar.began({"step": 40, "steps": 100})
    bar.note("resuming after step 40 [from a checkpoint]")
    for step in range(41, 41 + steps):
        bar.step(step_metrics(step), [])
    bar.ended(summary())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_progress_on_a_terminal_is_a_bar() -> None:
    console = Console(file=StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    text = progress_of(console, 60)
    assert "resuming after step 40 [from a checkpoint]" in text
    assert " 41/100" in text
    last = [line for line in text.splitlines() if "/100" in line][-1]
    assert "100/100" in last
    assert "loss 0.0500  2.00 k tokens/s  1.00 s/step  done" in last


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
@pytest.mark.parametrize("metrics", [{}, {"accuracy": 0.5, "perplexity": 1.25}], ids=["loss", "metrics"])
def test_progress_drops_figures_that_do_not_fit(width: int, metrics: dict[str, float]) -> None:
    file = StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=width, color_system=None)
    bar = TrainingProgress(console)
    bar.began({"step": 99_990, "steps": 123_456})
    bar.step(replace(step_metrics(1), step=99_999, metrics=metrics), [])
    last = [line for line in file.getvalue().splitlines() if "99999/123456" in line][-1].rpartition("\r")[2]
    bar.ended(summary())
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", last)
    assert len(shown) <= width
    assert "…" not in shown
    parts = [f"{name} {value:.4f}" for name, value in metrics.items()]
    expected = ["loss 5.0000", *parts, "2.00 k tokens/s", "1.00 s/step", "6 h 30 min left"]
    found = [part for part in expected if part in shown]
    assert found == (expected if width == 120 else found)
    assert width < 40 or "loss 5.0000" in found
    assert width < 60 or "6 h 30 min left" in found


def test_the_unit_of_the_throughput_is_the_one_of_the_data() -> None:
    tokens = step_metrics(1)
    for metrics, unit, rate in (
        (tokens, "tokens", 2000.0),
        (replace(tokens, weighted=False, weight=4.0), "samples", 8.0),
        (replace(tokens, weight=8.0), "samples", 8.0),
        (replace(tokens, weight=2000.5), "samples", 8.0),
    ):
        assert metrics.numbers[f"{unit}_per_second"] == rate
        found = summary(**StepFigures([metrics]).figures()._asdict())
        assert to_json(found)[f"{unit}_per_second"] == rate
        assert len([key for key in to_json(found) if key.endswith("_per_second")]) == 1
        assert f"{unit}/s" in rendered(found)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    lines = progress_of(Console(file=StringIO(), width=60), 30).splitlines()
    assert lines == [
        "resuming after step 40 [from a checkpoint]",
        "step 41/100  loss 0.1220  2.00 k tokens/s  1.00 s/step  59.0 s left",
        "step 70/100  loss 0.0714  2.00 k tokens/s  1.00 s/step  30.0 s left",
    ]
    lines = progress_of(Console(file=StringIO()), 60, line_seconds=0.0).splitlines()
    assert len(lines) == 61
    assert lines[-1] == "step 100/100  loss 0.0500  2.00 k tokens/s  1.00 s/step  done"


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    bar = TrainingProgress()
    bar.began({"step": 0, "steps": 1})
    bar.step(step_metrics(1), [])
    bar.ended(summary())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 1/1  loss 5.0000")
    bar = TrainingProgress()
    bar.began({"step": 0, "steps": 1})
    bar.ended(summary())
    assert capsys.readouterr() == ("", "")


def test_curves_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (1, 3):  # the second process repeats step 3
        log = TensorBoardListener(tmp_path)
        log.began({"step": first - 1})
        for step in range(first, 4):
            log.step(step_metrics(step), [])
        log.ended(summary())
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"loss", "gradient_norm", "learning_rate", "learning_rate/group_1", "throughput/tokens_per_second"}
    assert names | {f"seconds/{phase}" for phase in PHASES} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("throughput/tokens_per_second")[0].value == 2000.0


def test_without_tensorboard_nothing_is_written_or_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TensorBoardListener(tmp_path / "curves")
    log.began({"step": 0})
    log.step(step_metrics(1), [])
    assert not (tmp_path / "curves").exists()
