"""The pictures of a drive: the line on its track, the steering, what the camera saw, and an animation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from car import HALF_WIDTH, HOLD, Expert, Track, car
from network import Driver
from numpy.typing import NDArray

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Polygon
from PIL import Image, ImageDraw, ImageFont

SECONDS = HOLD / 50
"""The duration of an action."""
DARK, ORANGE, BLUE = "#33383d", "#c06020", "#40709c"
OFFSETS = LinearSegmentedColormap.from_list("offsets", ["#2f6ca3", "#63a6b5", "#f2c14e", "#e0702b", "#a31621"])
"""From the middle of the road to its edge."""


@dataclass(frozen=True)
class Drive:
    """A drive of the network, action by action.

    places: [actions, 2] in metres. offsets: [actions], distances from the middle in metres. steering: [actions, 2], of
    the network, and what the expert would have done. pictures: [actions, 42, 48] uint8. photos: [actions, 400, 600, 3].
    """

    episode: int
    track: Track
    score: float
    lap: bool
    places: NDArray[np.float64]
    offsets: NDArray[np.float64]
    steering: NDArray[np.float64]
    pictures: NDArray[np.uint8]
    photos: NDArray[np.uint8]

    @classmethod
    def of(cls, driver: Driver, episode: int) -> Drive:
        """Drive an episode as `Trial` does, and keep what it saw and did."""
        auto, expert = car(), Expert()
        places, offsets, steering, pictures, photos = [], [], [], [], []
        auto.start(episode)
        while not auto.done:
            picture, speed, yaw_rate = auto.observation()
            chosen, pedal = driver(picture, speed, yaw_rate)
            places.append(auto.place)
            offsets.append(abs(auto.offset))
            steering.append((chosen, expert(auto)[0]))
            pictures.append(picture)
            photos.append(auto.env.photo())
            auto.act(chosen, pedal)
        kept = map(np.array, (places, offsets, steering, pictures, photos))
        return cls(episode, auto.track, auto.score, auto.lap, *kept)


def draw(drive: Drive, path: str) -> None:
    """Draw the track with the driven line, three pictures of the camera, and the steering over time."""
    figure = plt.figure(figsize=(9.6, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 1])
    left, right = top.subfigures(1, 2, width_ratios=[3.1, 1])
    moments = _moments(drive)
    _draw_track(left, drive, moments)
    _draw_pictures(right, drive, moments)
    _draw_steering(bottom, drive, moments)
    end = f"lap completed after {len(drive.places) * SECONDS:.1f} s" if drive.lap else "lap not completed"
    title = f"A track that the network has never seen: {drive.score:.0f} points, {end}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _moments(drive: Drive) -> list[int]:
    """Three actions to show: those with the strongest steering of the expert in each third of the drive."""
    bounds = np.linspace(15, len(drive.places), 4).astype(int)  # the camera moves to the car in the first second
    thirds = pairwise(bounds.tolist())
    return [start + int(np.argmax(np.abs(drive.steering[start:end, 1]))) for start, end in thirds]


def _draw_track(figure: Any, drive: Drive, moments: list[int]) -> None:
    axes = figure.subplots()
    points, headings = drive.track.points, drive.track.headings
    across = HALF_WIDTH * np.stack([-np.sin(headings), np.cos(headings)], axis=1)
    for side in (points + across, points - across):
        closed = np.vstack([side, side[:1]])
        axes.plot(*closed.T, color="#8a8f94", linewidth=0.8)
    road = np.vstack([points + across, (points + across)[:1], (points - across)[:1], (points - across)[::-1]])
    axes.add_patch(Polygon(road, closed=True, facecolor="#e9ebed", edgecolor="none"))
    segments = np.stack([drive.places[:-1], drive.places[1:]], axis=1)
    line = LineCollection(segments, cmap=OFFSETS, norm=Normalize(0, HALF_WIDTH), linewidth=2.6)
    line.set_array(drive.offsets[:-1])
    axes.add_collection(line)
    for name, moment in zip("ABC", moments, strict=True):
        _mark(axes, drive.places[moment], name)
    axes.plot(*drive.places[0], "o", color=DARK, markersize=5)
    axes.annotate("start", drive.places[0], xytext=(4, -13), textcoords="offset points", fontsize=9, color=DARK)
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.axis("off")
    bar = figure.colorbar(line, ax=axes, location="bottom", shrink=0.55, pad=0.02, aspect=34)
    bar.set_label(f"distance from the middle of the road in m (the edge is at {HALF_WIDTH:.1f} m)", fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def _mark(axes: Any, place: Any, name: str) -> None:
    style = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": DARK, "linewidth": 0.9}
    axes.annotate(name, place, ha="center", va="center", fontsize=8.5, color=DARK, bbox=style)


def _draw_pictures(figure: Any, drive: Drive, moments: list[int]) -> None:
    for name, moment, axes in zip("ABC", moments, figure.subplots(3, 1), strict=True):
        axes.imshow(drive.pictures[moment], cmap="gray", vmin=40, vmax=200)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#c9cdd1")
        axes.set_title(f"{name}  after {moment * SECONDS:.1f} s", loc="left", fontsize=9, pad=3, color=DARK)
    axes.set_xlabel("what the network sees", fontsize=9, color=DARK)


def _draw_steering(figure: Any, drive: Drive, moments: list[int]) -> None:
    axes = figure.subplots()
    seconds = np.arange(len(drive.steering)) * SECONDS
    axes.plot(seconds, drive.steering[:, 1], color=ORANGE, linewidth=1.1, label="expert, in the same place")
    axes.plot(seconds, drive.steering[:, 0], color=BLUE, linewidth=1.1, label="network")
    for name, moment in zip("ABC", moments, strict=True):
        axes.axvline(seconds[moment], color="#c9cdd1", linewidth=0.8, zorder=0)
        style = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 8.5, "color": DARK}
        axes.annotate(name, (seconds[moment], 0.02), (3, 0), **style)
    axes.set(xlabel="seconds", ylabel="← left    right →", xlim=(0, seconds[-1]))
    axes.set_title("Steering", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)


def animate(drive: Drive, path: str, *, seconds: float = 16.0) -> None:
    """Write the first seconds of the drive as an animated picture (WebP), in real time.

    On the left is the environment's picture for people; on the right, what the network sees, and the steering.
    """
    frames = [_frame(drive, action) for action in range(min(len(drive.places), round(seconds / SECONDS)))]
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=round(1000 * SECONDS), loop=0, quality=55, method=4)


def _frame(drive: Drive, action: int) -> Image.Image:
    """One frame: 496 x 224 pixels."""
    frame = Image.new("RGB", (496, 224), "white")
    frame.paste(Image.fromarray(drive.photos[action]).resize((336, 224), Image.Resampling.LANCZOS), (0, 0))
    seen = Image.fromarray(drive.pictures[action]).point(lambda grey: min(255, max(0, (grey - 40) * 255 // 160)))
    frame.paste(seen.resize((144, 126), Image.Resampling.NEAREST), (344, 18))
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(size=11)
    draw.text((344, 2), "the network's picture", fill=DARK, font=font)
    for row, (name, color) in enumerate((("network", BLUE), ("expert", ORANGE))):
        top, steering = 152 + 36 * row, min(1.0, max(-1.0, drive.steering[action, row]))
        draw.text((344, top), f"{name}'s steering", fill=DARK, font=font)
        draw.line((416, top + 15, 416, top + 29), fill=DARK)
        draw.rectangle(_bar(steering, top), fill=color)
    return frame


def _bar(steering: float, top: int) -> tuple[int, int, int, int]:
    """The rectangle of a steering angle, right or left of the middle."""
    end = 416 + round(72 * steering)
    return min(416, end), top + 18, max(416, end), top + 26
