"""The picture of the example: a forecast on maps, and the scores by lead time."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from emulator import forecasts
from matplotlib.axes import Axes
from numpy.typing import NDArray
from verification import TARGETS, Table, Verified, trained
from world import STEP_HOURS

mpl.use("Agg")
import matplotlib.pyplot as plt

LEAD_STEPS = 6
"""The maps show day 3."""
STYLES = {
    "network": ("#b5402a", 2.4),
    "linear": ("#3f6fa0", 1.6),
    "persistence": ("#7b8a55", 1.6),
    "climatology": ("#8a8a8a", 1.4),
}
INK = "#333333"


def draw(verified: Verified, path: str, mountains: NDArray[Any] | None = None) -> None:
    """Draw the picture. mountains: heights in km [latitude, longitude], which the maps show as contours."""
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": "#999999", "text.color": INK, "axes.labelcolor": INK})
    figure = plt.figure(figsize=(11.5, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    draw_maps(above, verified, mountains)
    draw_scores(below, verified.table)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def day_three(verified: Verified) -> tuple[NDArray[Any], NDArray[Any], int, int]:
    """Return truth and forecast of 500 hPa (m), the trajectory and the start, in the middle of the first trajectory."""
    world = verified.world
    trajectory = world.parts()[2][0]
    states = world.states(trajectory)
    start = (len(states) - LEAD_STEPS) // 2
    *_, last = forecasts(trained(world, verified.models.run), states[start : start + 1], LEAD_STEPS)
    return world.heights(states[start + LEAD_STEPS]), world.heights(last[0]), trajectory, start


def draw_maps(figure: Any, verified: Verified, mountains: NDArray[Any] | None) -> None:
    """Draw truth, forecast and error side by side, in equal-area projection."""
    truth, forecast, trajectory, start = day_three(verified)
    error = forecast - truth
    heights = np.arange(np.floor(truth.min() / 100) * 100, np.floor(truth.max() / 100) * 100, 100)
    spread = np.ceil(np.abs(error).max() / 40) * 40
    errors = np.linspace(-spread, spread, 17)
    rmse = float(np.sqrt((verified.world.weights[:, None] * error**2).mean()))
    axes = figure.subplots(1, 3, subplot_kw={"projection": "mollweide"})
    panels = [
        ("truth", truth, heights, "viridis"),
        (f"forecast, {LEAD_STEPS * STEP_HOURS // 24} days before", forecast, heights, "viridis"),
        (f"error (root mean square {rmse:.0f} m)", error, errors, "RdBu_r"),
    ]
    filled = []
    for axis, (title, field, levels, colors) in zip(axes, panels, strict=True):
        filled.append(draw_map(axis, verified, field, levels, colors, mountains))
        axis.set_title(title, fontsize=10)
    for field, over, levels, label in (
        (filled[0], list(axes[:2]), heights[::4], "height of 500 hPa, m, relative to the global mean"),
        (filled[2], axes[2], errors[::4], "forecast minus truth, m"),
    ):
        bar = figure.colorbar(field, ax=over, orientation="horizontal", shrink=0.6, aspect=40, pad=0.03)
        bar.set_label(label)
        bar.set_ticks(levels)
        bar.outline.set_visible(False)
    noted = "; brown lines: the planet's mountains" if mountains is not None else ""
    figure.suptitle(
        f"A forecast from day {start * STEP_HOURS // 24} of trajectory {trajectory}, which was not trained on{noted}",
        fontsize=11,
        x=0.01,
        ha="left",
    )


def draw_map(
    axis: Axes, verified: Verified, field: NDArray[Any], levels: Any, colors: str, mountains: NDArray[Any] | None
) -> Any:
    """Draw one field [latitude, longitude] and the mountains, and return the filled contours."""
    longitudes = np.radians((np.array(verified.world.longitudes) + 180) % 360 - 180)
    order = np.argsort(longitudes)
    along = np.append(longitudes[order], longitudes[order][0] + 2 * np.pi)
    across = np.radians(verified.world.latitudes)

    def closed(values: NDArray[Any]) -> NDArray[Any]:
        ordered = values[:, order]
        return np.concatenate([ordered, ordered[:, :1]], axis=1)

    found = axis.contourf(along, across, closed(field), levels=levels, cmap=colors, extend="both")
    axis.contour(along, across, closed(field), levels=levels[::3], colors="black", linewidths=0.25, alpha=0.5)
    if mountains is not None:
        axis.contour(along, across, closed(mountains), levels=[0.5, 1.5], colors="#7a3b00", linewidths=(0.8, 1.1))
    axis.set(xticks=np.radians([-120, -60, 0, 60, 120]), yticks=np.radians([-60, -30, 0, 30, 60]))
    axis.set_xticklabels([])
    axis.set_yticklabels([])
    axis.grid(color="white", linewidth=0.4, alpha=0.6)
    return found


def draw_scores(figure: Any, table: Table) -> None:
    """Draw anomaly correlation and RMSE by lead time, with bands of the bootstrap."""
    days = [hours / 24 for hours in table.hours]
    left, right = figure.subplots(1, 2)
    for axis, score in ((left, "acc"), (right, "rmse")):
        for method in table.methods:
            color, width = STYLES[method]
            leads = range(len(days))
            middle = [table.mean(score, method, lead) for lead in leads]
            low, high = zip(*(table.interval(score, method, lead) for lead in leads), strict=True)
            axis.fill_between(days, low, high, color=color, alpha=0.18, linewidth=0)
            axis.plot(days, middle, color=color, linewidth=width, label=method)
        axis.set(xlabel="lead time, days", xlim=(0, days[-1]), xticks=range(int(days[-1]) + 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    for hours, least in TARGETS.items():
        if hours in table.hours:
            left.plot(hours / 24, least, marker="_", color=INK, markersize=13, markeredgewidth=1.6, linestyle="")
    left.set_title("Anomaly correlation of the height of 500 hPa; dashes: targets", loc="left", fontsize=10)
    left.set(ylim=(min(-0.05, left.get_ylim()[0]), 1.02))
    right.set_title("Root mean square error, m", loc="left", fontsize=10)
    right.set(ylim=(0, None))
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(
        f"{table.starts} forecasts; bands: 95 % of bootstrap means over blocks of 10 days",
        fontsize=11,
        x=0.01,
        ha="left",
    )
