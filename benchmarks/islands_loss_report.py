"""Writes what islands_loss.py measured: the table in docs/islands-loss.md, and a picture next to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "islands-loss.md"
SYNCHRONOUS, ALONE = "synchronous", "one island alone"
LABELS = {
    SYNCHRONOUS: "synchronous, a batch of all islands",
    ALONE: "one island alone, a quarter of the tokens",
    "cold default": "cold, the default: averaging, `every` 10, 4 bits",
    "cold momentum": "cold, `momentum_from` half of the steps: `every` 10, then 30",
    "warm H=30": "warm, momentum, `every` 30, 4 bits",
    "warm H=10": "warm, momentum, `every` 10, 4 bits",
    "warm H=30 32 bits": "warm, momentum, `every` 30, 32 bits",
    "warm H=30 2 bits": "warm, momentum, `every` 30, 2 bits",
    "warm H=30 delay 5": "warm, momentum, `every` 30, 4 bits, `delay` 5",
    "warm H=30 averaging": "warm, averaging, `every` 30, 4 bits",
    "warm H=10 averaging": "warm, averaging, `every` 10, 4 bits",
}

Row = dict[str, Any]
"""One run, as islands_loss.py recorded it."""


class Losses:
    """The losses of all settings, by setting and seed. Only seeds that a comparison has on both sides count."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.seeds = sorted({row["seed"] for row in rows})
        self._found = {(row["case"], row["seed"]): float(row["loss"]) for row in rows}

    def of(self, name: str) -> list[float]:
        """Return the losses of a setting, by seed."""
        return [self._found[name, seed] for seed in self.seeds if (name, seed) in self._found]

    def percent(self, name: str, than: str = SYNCHRONOUS) -> dict[int, float]:
        """Return by how many percent the loss of a setting is above that of another, by seed."""
        both = [seed for seed in self.seeds if {(name, seed), (than, seed)} <= self._found.keys()]
        return {seed: 100 * (self._found[name, seed] / self._found[than, seed] - 1) for seed in both}

    def closed(self, name: str) -> dict[int, float]:
        """Return the share of the gap between one island alone and synchronous that a setting closes, by seed."""
        needed = (name, SYNCHRONOUS, ALONE)
        shares = {}
        for seed in self.seeds:
            if all((each, seed) in self._found for each in needed):
                loss, synchronous, alone = (self._found[each, seed] for each in needed)
                shares[seed] = 100 * (alone - loss) / (alone - synchronous)
        return shares


def cells(losses: Losses, name: str) -> list[str]:
    """Return the cells of a setting's row."""
    found, percents, closed = losses.of(name), losses.percent(name), losses.closed(name)
    is_cold = name.startswith("cold")
    return [
        f"{mean(found):.4f}",
        " / ".join(f"{loss:.4f}" for loss in found),
        "" if name == SYNCHRONOUS or not percents else f"{mean(percents.values()):+.2f} %",
        "" if name == SYNCHRONOUS else " / ".join(f"{each:+.2f}" for each in percents.values()),
        f"{mean(closed.values()):.0f} % ({' / '.join(f'{each:.0f}' for each in closed.values())})"
        if is_cold and closed
        else "",
    ]


def head(losses: Losses) -> list[str]:
    """Return the names of the columns."""
    seeds = " / ".join(map(str, losses.seeds))
    return ["setting", "loss", f"seeds {seeds}", "vs synchronous", f"seeds {seeds}, %", "gap closed"]


def aims(losses: Losses) -> list[tuple[str, str, bool]]:
    """Return what was aimed at, what was found, and whether that is enough: means of the seeds, except for "never"."""
    found: list[tuple[str, str, bool]] = []

    def add(aim: str, values: dict[int, float], enough: Callable[[list[float]], bool], unit: str = "+.2f") -> None:
        if values:
            each = list(values.values())
            seeds = " / ".join(f"{value:{unit}}" for value in each)
            found.append((aim, f"{mean(each):{unit}} % ({seeds})", enough(each)))

    add("warm, `every` 30, 4 bits: within 2 % of synchronous", losses.percent("warm H=30"), lambda x: mean(x) <= 2)
    add("warm, `every` 10, 4 bits: within 1 % of synchronous", losses.percent("warm H=10"), lambda x: mean(x) <= 1)
    add(
        "cold, the default: never worse than one island alone",
        losses.percent("cold default", ALONE),
        lambda x: max(x) <= 0,
    )
    add("cold, the default: closes 60 % of the gap", losses.closed("cold default"), lambda x: mean(x) >= 60, ".0f")
    add(
        "warm, `every` 30: 4 bits at most 0.3 % worse than 32",
        losses.percent("warm H=30", "warm H=30 32 bits"),
        lambda x: mean(x) <= 0.3,
    )
    add(
        "warm, `every` 30: 2 bits at most 1 % worse than 32",
        losses.percent("warm H=30 2 bits", "warm H=30 32 bits"),
        lambda x: mean(x) <= 1,
    )
    return found


def print_report(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print the table and the aims."""
    losses, console = Losses(rows), Console(width=150)
    table = Table(*head(losses))
    for name in names:
        if losses.of(name):
            table.add_row(name, *cells(losses, name))
    console.print(table)
    for aim, value, reached in aims(losses):
        console.print(
            f"{'reached    ' if reached else 'not reached'}  {aim.replace('`', '')}: {value}", highlight=False
        )


def write_report(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write the tables between the marks in docs/islands-loss.md, and draw docs/islands-loss.svg.

    A setting without the results of all seeds is left out.
    """
    losses = Losses(rows)
    names = [name for name in names if len(losses.of(name)) == len(losses.seeds)]
    rows = [row for row in rows if row["case"] in names]
    lines = [_described(rows), "", f"| {' | '.join(head(losses))} |", "|---" * 6 + "|"]
    lines += [f"| {LABELS[name]} | {' | '.join(cells(losses, name))} |" for name in names]
    lines += ["", "| aim | found | |", "|---|---|---|"]
    lines += [f"| {aim} | {value} | {'reached' if ok else '**not reached**'} |" for aim, value, ok in aims(losses)]
    text = "\n".join(lines)
    page = re.sub(
        r"(<!-- measured -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{text}\n\n{found[2]}",
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")
    _draw(rows, losses, names)


def _described(rows: Sequence[Row]) -> str:
    """Describe the runs and the machine in one sentence each."""
    setup, machine = rows[0]["setup"], rows[0]["machine"]
    a_step = setup["islands"] * setup["batch"] * setup["length"]
    cpus = sorted({f"{row['machine']['cpu']} ({row['machine']['cpu_kernels']})" for row in rows})
    return (
        f"Each run has {setup['steps']} steps of {setup['islands']} islands with {setup['batch']} x {setup['length']} "
        f"tokens each, {a_step:,} tokens in a step and {a_step * setup['steps']:,} in total, with AdamW at a peak "
        f"learning rate of {setup['lr']:g}, in fp32. The runs were made with torch {machine['torch']} and one thread "
        f"each, on {machine['cores']} cores of {' and '.join(cpus)}; "
        f"they took {sum(row['cpu_seconds'] for row in rows) / 60:.0f} minutes of CPU time."
    )


def _mean_curve(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """Return the mean over the seeds of a setting's losses while it trained, by step."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row["case"] == name:
            for step, loss in row["curve"]:
                by_step.setdefault(step, []).append(loss)
    return [(step, mean(found)) for step, found in sorted(by_step.items())]


def _draw(rows: Sequence[Row], losses: Losses, names: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "manyhands", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.1), layout="constrained")
    styles = {
        SYNCHRONOUS: ("black", "-"),
        ALONE: ("#888888", "--"),
        "cold default": ("#e45756", "-"),
        "cold momentum": ("#f58518", "-"),
        "warm H=30": ("#4c78a8", "-"),
        "warm H=10": ("#54a24b", "-"),
    }
    for name, (colour, line) in styles.items():
        if curve := _mean_curve(rows, name):
            if name.startswith("warm"):  # until then, it is the synchronous run
                before = [point for point in _mean_curve(rows, SYNCHRONOUS) if point[0] < curve[0][0]]
                curve = before[-1:] + curve
            left.plot(*zip(*curve, strict=True), line, color=colour, linewidth=1.3, label=name)
    left.set(xlabel="step", ylabel="held-out loss, nats a byte, mean of the seeds", yscale="log")
    left.set_title("while training", fontsize=10)
    ticks = [value / 10 for value in range(14, 34, 2) if left.get_ylim()[0] <= value / 10 <= left.get_ylim()[1]]
    left.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    left.minorticks_off()
    left.legend(frameon=False)
    shown = [name for name in names if name != SYNCHRONOUS and losses.percent(name)][::-1]
    for position, name in enumerate(shown):
        values = list(losses.percent(name).values())
        right.barh(position, mean(values), 0.6, color=styles.get(name, ("#b0b0b0", ""))[0], alpha=0.55, zorder=2)
        right.plot(values, [position] * len(values), "o", color="black", markersize=3.5, zorder=3)
    right.set_yticks(range(len(shown)), shown)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("loss at the end, % above synchronous; dots are seeds")
    right.set_title("at the end", fontsize=10)
    for panel, axis in ((left, "both"), (right, "x")):
        panel.grid(axis=axis, color="#dddddd", linewidth=0.6, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})
