"""Writes what memory.py measured: tables in docs/memory.md, and a plot next to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
SHARDINGS, OFFLOADS, PRECISIONS = ("ddp", "zero1", "zero2", "zero3"), ("none", "disk"), ("fp32", "bf16")
GROUPS = {"shared-memory": "on shared memory", "distributed": "over torch.distributed"}
COLOURS = {1: "#4c78a8", 2: "#f58518", 4: "#54a24b"}

Row = dict[str, Any]
"""One case, as memory.py recorded it. `predicted_mib`: the formula and the activations."""


def write_report(rows: Iterable[Row]) -> None:
    """Write the tables between the marks in docs/memory.md, and draw docs/memory.svg."""
    several = list(rows)
    alone = {(row["precision"], row["offload"]): row["steps_mib"] for row in several if row["sharding"] == "none"}
    measured = [
        {**row, "predicted_mib": row["formula_mib"]["peak"] + alone[row["precision"], row["offload"]]}
        for row in several
        if row["sharding"] != "none" and (row["precision"], row["offload"]) in alone
    ]
    taken = ", ".join(
        f"{value:,.0f} MiB in {precision}" + (" with state on a disk" if offload == "disk" else "")
        for (precision, offload), value in alone.items()
    )
    text = f"Activations, and one parameter's gradient: {taken}.\n\n{_tables(measured)}"
    page = re.sub(
        r"(<!-- measured -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{text}\n{found[2]}",
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")
    _draw([row for row in measured if row["transport"] == "shared-memory"])


def _tables(rows: list[Row]) -> str:
    found = {(row["transport"], row["precision"], row["sharding"], row["offload"], row["workers"]): row for row in rows}
    parts = []
    for group, precision in product(GROUPS, PRECISIONS):
        workers = sorted({key[4] for key in found if key[:2] == (group, precision)})
        if not workers:
            continue
        names = [f"{count} worker{'s' if count > 1 else ''}" for count in workers]
        parts += [f"**{precision}, {GROUPS[group]}** (MiB per worker: predicted, measured, ratio)\n"]
        parts += ["| sharding | offload | " + " | ".join(f"{name} | | " for name in names) + "|"]
        parts += ["|---|---|" + "---:|---:|---:|" * len(workers)]
        for sharding, offload in product(SHARDINGS, OFFLOADS):
            cells = [_cells(found.get((group, precision, sharding, offload, count))) for count in workers]
            if any(cell != _cells(None) for cell in cells):
                parts.append(f"| `{sharding}` | {offload} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _cells(row: Row | None) -> str:
    if row is None:
        return "- | - | -"
    predicted, measured = row["predicted_mib"], row["steps_mib"]
    return f"{predicted:,.0f} | {measured:,.0f} | {measured / predicted:.2f}"


def _draw(rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "manyhands", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey=True, layout="constrained")
    for (row, precision), (column, offload) in product(enumerate(PRECISIONS), enumerate(OFFLOADS)):
        panel = panels[row][column]
        for position, count in enumerate(COLOURS):
            for sharding in SHARDINGS:
                for found in rows:
                    if (found["precision"], found["offload"], found["sharding"]) == (precision, offload, sharding):
                        if found["workers"] != count:
                            continue
                        left = SHARDINGS.index(sharding) + (position - 1) * 0.27
                        panel.bar(left, found["steps_mib"], 0.24, color=COLOURS[count], zorder=2)
                        ends = (left - 0.12, left + 0.12)
                        panel.hlines(found["predicted_mib"], *ends, color="black", linewidth=1.6, zorder=3)
        panel.set_title(f"{precision}, offload = {offload}", fontsize=10)
        panel.set_xlim(-0.6, len(SHARDINGS) - 0.4)
        panel.set_xticks(range(len(SHARDINGS)), SHARDINGS)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter("{x:,.0f}")
    figure.supylabel("peak of a worker in a step, MiB", fontsize=10)
    bars = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = [f"measured, {count} worker{'s' if count > 1 else ''}" for count in COLOURS]
    line = pyplot.Line2D([], [], color="black", linewidth=1.6)
    figure.legend(
        [*bars, line], [*names, "formula and activations"], loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})
