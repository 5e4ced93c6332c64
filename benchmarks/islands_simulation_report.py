"""Writes what islands_simulation.py computes: the tables in docs/islands.md, and the picture next to it.

    .venv/bin/python benchmarks/islands_simulation_report.py [--seeds 12]

All figures are means over the seeds, with clusters and steps that are unevenly fast.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

from islands_simulation import LEASES, WAITING, Setup, simulate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "islands.md"

HOUR, GBIT = 3600.0, 1000.0
ISLANDS, DELAYS, LINKS = (4, 8, 16, 32, 64), (0, 12, 25), (100.0, GBIT)
RESET = 0
"""The row of a run with inner_state = "reset", which needs no states."""

STATE_EVERY = (1, 5, 10, 20, RESET)
LOSSES = [(24 * HOUR, 900.0), (24 * HOUR, 2 * HOUR), (6 * HOUR, 900.0), (6 * HOUR, 2 * HOUR)]
LOSS_HOURS = (2, 4, 8, 16, 32)
PLANS = {
    "waiting": {"policy": WAITING},
    "leases": {"policy": LEASES},
    "1 spare": {"policy": LEASES, "spares": 1},
    "2 spares": {"policy": LEASES, "spares": 2},
}
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")

UNEVEN = Setup(cluster_spread=0.05, step_spread=0.1)
LONG = replace(UNEVEN, islands=8, delay=25, state_every=5, steps=18_000)
"""Eight islands on links of 100 Mbit/s, for six hours."""

MANY = replace(UNEVEN, islands=64, mbit=GBIT, delay=25, loss_every=24 * HOUR, spares=2, steps=6000)

Found = Mapping[Setup, float]
"""Goodput by setup."""


def without_losses(islands: int, mbit: float, delay: int) -> Setup:
    """A run without losses."""
    return replace(UNEVEN, islands=islands, mbit=mbit, delay=delay)


def with_losses(plan: str, loss_every: float, down: float) -> Setup:
    """A run with losses, in which the others do something meanwhile."""
    return replace(LONG, loss_every=loss_every, down=down, **PLANS[plan])  # type: ignore[arg-type]


def with_states(few: bool, state_every: int) -> Setup:
    """A run of few islands or of many, with losses and spares."""
    setup = replace(LONG, loss_every=6 * HOUR, spares=1) if few else MANY
    if state_every == RESET:
        return replace(setup, state_every=1, state_bytes=0.0)
    return replace(setup, state_every=state_every)


def setups() -> list[Setup]:
    """All runs that the tables and the picture show."""
    found = [without_losses(*each) for each in product(ISLANDS, LINKS, DELAYS)]
    found += [with_losses(plan, *loss) for plan, loss in product(PLANS, LOSSES)]
    found += [with_losses(plan, hours * HOUR, HOUR) for plan, hours in product(PLANS, LOSS_HOURS)]
    found += [with_states(few, every) for few, every in product((True, False), STATE_EVERY)]
    return list(dict.fromkeys(found))


def goodput_of(setup: Setup, seeds: int) -> float:
    """The mean goodput of a setup. Runs without losses differ little, and runs of many islands have many losses."""
    return fmean(simulate(setup, seed).goodput for seed in range(seeds if setup.islands < 64 else max(1, seeds // 4)))


def tables(found: Found) -> str:
    """The tables of the page."""
    columns = list(product(LINKS, DELAYS))
    first = _table(
        ["islands", *(f"{_link(mbit)}, delay {delay}" for mbit, delay in columns)],
        ([str(count), *(_percent(found[without_losses(count, *each)]) for each in columns)] for count in ISLANDS),
    )
    second = _table(
        ["a cluster is lost every", "and is away for", *PLANS],
        (
            [f"{loss[0] / HOUR:.0f} h", _time(loss[1]), *(_percent(found[with_losses(plan, *loss)]) for plan in PLANS)]
            for loss in LOSSES
        ),
    )
    third = _table(
        ["states every", "states sent, per byte of files", "8 islands, 1 spare", "64 islands, 2 spares"],
        (
            [
                '`inner_state = "reset"`' if every == RESET else f"{every} round{'' if every == 1 else 's'}",
                "0" if every == RESET else f"{UNEVEN.state_seconds / UNEVEN.file_seconds / every:.1f}",
                *(_percent(found[with_states(few, every)]) for few in (True, False)),
            ]
            for every in STATE_EVERY
        ),
    )
    with_states_of = (
        "States, for eight islands on links of 100 Mbit/s whose clusters are lost every 6 h, and for 64 islands on "
        "links of 1 Gbit/s whose clusters are lost every 24 h. They are away for 15 min:"
    )
    with_losses_of = "With losses, for eight islands on links of 100 Mbit/s, a delay of 25, and states every 5 rounds:"
    parts = ["Without losses:", first, with_losses_of, second, with_states_of, third]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _link(mbit: float) -> str:
    return f"{mbit:.0f} Mbit/s" if mbit < GBIT else f"{mbit / GBIT:.0f} Gbit/s"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < HOUR else f"{seconds / HOUR:.0f} h"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def draw(found: Found) -> None:
    """Draw docs/islands.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "manyhands", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for mbit, style in zip(LINKS, (":", "-"), strict=True):
        for delay, colour in zip(DELAYS, COLOURS, strict=False):
            shares = [100 * found[without_losses(count, mbit, delay)] for count in ISLANDS]
            name = f"delay {delay}, {_link(mbit)}"
            left.plot(ISLANDS, shares, style, color=colour, marker="o", markersize=3, label=name)
    left.set(xscale="log", xlabel="islands", ylim=(0, 100))
    left.set_xticks(ISLANDS, map(str, ISLANDS))
    for plan, colour in zip(PLANS, COLOURS, strict=True):
        shares = [100 * found[with_losses(plan, hours * HOUR, HOUR)] for hours in LOSS_HOURS]
        right.plot(LOSS_HOURS, shares, color=colour, marker="o", markersize=3, label=plan)
    right.set(xscale="log", xlabel="hours between two losses of a cluster, away for 1 h")
    right.set_xticks(LOSS_HOURS, map(str, LOSS_HOURS))
    right.set_title("8 islands, 100 Mbit/s, delay 25", fontsize=10)
    left.set_title("no losses", fontsize=10)
    for panel in (left, right):
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.supylabel("useful share of the clusters' speed, %", fontsize=10)
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Simulate everything, and write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    seeds = parser.parse_args().seeds
    several = setups()
    with ProcessPoolExecutor() as pool:
        found = dict(zip(several, pool.map(goodput_of, several, [seeds] * len(several)), strict=True))
    text = tables(found)
    page = re.sub(
        r"(<!-- simulated -->\n).*?(<!-- end -->)",
        lambda marks: f"{marks[1]}\n{text}\n{marks[2]}",
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")
    draw(found)
    print(text)


if __name__ == "__main__":
    main()
