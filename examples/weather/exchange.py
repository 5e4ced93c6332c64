"""Zarr stores of others' programs: reads ERA5 as WeatherBench 2 publishes it, and writes forecasts.

WeatherBench 2: S. Rasp et al. (2024), J. Adv. Model. Earth Syst. 16. Needs: pip install 'manyhands[arrays]'
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from emulator import forecasts
from sphere import sphere
from verification import STARTS_TOGETHER, Models, loaded
from world import STEP_HOURS, World

import manyhands as mh

GRAVITY = 9.80665
"""The gravity in m/s2 by which geopotential heights are defined."""

ERA5_LEVELS = (200, 500, 850)
"""In hPa; the second one is verified."""


@dataclass(frozen=True)
class Era5:
    """Turns records of `geopotential` into states: a function for `flat_map`.

    A state holds heights in metres at 00 and 12 UTC. A calendar year is a trajectory. Fields are interpolated to the
    Gaussian latitudes, which are between those of the store. axes: the positions of level, latitude and longitude in a
    record's array. levels: the positions of ERA5_LEVELS. below, share: the position of the next latitude to the south,
    and how far the Gaussian latitude is from there to the next one. latitudes, longitudes: the store's order.
    """

    axes: tuple[int, int, int]
    levels: tuple[int, ...]
    latitudes: tuple[int, ...]
    longitudes: tuple[int, ...]
    below: tuple[int, ...]
    share: tuple[float, ...]

    def __call__(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        time = np.datetime64(record["time"], "h")
        hours = int(time.astype(np.int64))
        if hours % STEP_HOURS:
            return
        ordered = record["geopotential"].transpose(self.axes)[list(self.levels)]
        ordered = ordered[:, list(self.latitudes)][:, :, list(self.longitudes)].astype(np.float64)
        south, share = np.array(self.below), np.array(self.share)[:, None]
        fields = ordered[:, south] * (1 - share) + ordered[:, south + 1] * share
        year = int(time.astype("datetime64[Y]").astype(np.int64)) + 1970
        yield {"trajectory": year, "step": hours // STEP_HOURS, "state": (fields / GRAVITY).astype(np.float32)}


def era5_reader(layout: mh.ZarrLayout) -> Era5:
    """Return what reads a store with this layout. Raises DataError if it is not WeatherBench 2's on 64 x 32 points."""
    dims = layout.dims.get("geopotential", ())
    if set(dims) != {"time", "level", "latitude", "longitude"}:
        expected = "geopotential over time, level, latitude, longitude"
        raise mh.DataError("the store is not in WeatherBench 2's layout", expected=expected, got=str(dims))
    levels, latitudes, longitudes = (layout.coords[name].values for name in ("level", "latitude", "longitude"))
    missing = sorted(set(ERA5_LEVELS) - set(levels.tolist()))
    if missing or (len(longitudes), len(latitudes)) != (64, 32):
        raise mh.DataError(
            "the store is not in WeatherBench 2's layout",
            expected=f"64 longitudes, 32 latitudes, and the levels {ERA5_LEVELS} hPa",
            got=f"{len(longitudes)} longitudes, {len(latitudes)} latitudes; missing levels: {missing}",
        )
    ordered, gaussian = np.sort(latitudes), np.degrees(sphere().latitudes)
    below = np.clip(np.searchsorted(ordered, gaussian) - 1, 0, len(ordered) - 2)
    share = (gaussian - ordered[below]) / (ordered[below + 1] - ordered[below])
    inside = [name for name in dims if name != "time"]
    return Era5(
        tuple(inside.index(name) for name in ("level", "latitude", "longitude")),
        tuple(levels.tolist().index(level) for level in ERA5_LEVELS),
        tuple(np.argsort(latitudes).tolist()),
        tuple(np.argsort(np.asarray(longitudes) % 360, kind="stable").tolist()),
        tuple(below.tolist()),
        tuple(share.tolist()),
    )


def era5(path: str, folder: str, *, held_out: int, tested: int, **how: Any) -> World:
    """Make a world of the years in a store. The last years are for scores, those before them for validation."""
    read = mh.Dataset.read(path, format="zarr", columns=["geopotential"])
    summary = read.flat_map(era5_reader(read.layout())).write(folder, format="arrays", overwrite=True, **how)
    grid = sphere()
    latitudes, longitudes = (tuple(np.degrees(each).tolist()) for each in (grid.latitudes, grid.longitudes))
    metres = (1.0,) * len(latitudes)
    return World(folder, summary.digest, latitudes, longitudes, metres, held_out, tested, first_time="1970-01-01")


@dataclass(frozen=True)
class Forecasting:
    """Makes the network's forecasts from some starts of a trajectory: a function for `flat_map`."""

    world: World
    models: Models
    steps: int
    times: tuple[Any, ...]

    def __call__(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        network, _ = loaded(self.world, self.models)
        first = self.world.states(record["trajectory"])[record["starts"]]
        fields = [self.world.heights(states) * GRAVITY for states in forecasts(network, first, self.steps)]
        for position, start in enumerate(record["starts"]):
            made = np.stack([each[position] for each in fields]).astype(np.float32)
            yield {"time": self.times[start], "geopotential": made}


def write_forecasts(world: World, models: Models, out: str, *, every: int, steps: int, **how: Any) -> mh.PrepareSummary:
    """Write the network's forecasts from the first trajectory to verify on as `forecasts.zarr`.

    The time is that of the start. A simulated planet has no calendar: its trajectories begin on 2000-01-01.
    """
    trajectory = world.parts()[2][0]
    times = world.times(trajectory)
    starts = list(range(0, len(times), every))
    records = [
        {"trajectory": trajectory, "starts": starts[first : first + STARTS_TOGETHER]}
        for first in range(0, len(starts), STARTS_TOGETHER)
    ]
    layout = mh.ZarrLayout(
        dims={"geopotential": ("time", "prediction_timedelta", "latitude", "longitude")},
        coords={
            "time": times[starts],
            "prediction_timedelta": np.arange(1, steps + 1) * np.timedelta64(STEP_HOURS, "h"),
            "latitude": list(world.latitudes),
            "longitude": list(world.longitudes),
        },
        attrs={
            "geopotential": {"units": "m**2 s**-2", "standard_name": "geopotential", "level": "500 hPa"},
            "latitude": {"units": "degrees_north", "standard_name": "latitude"},
            "longitude": {"units": "degrees_east", "standard_name": "longitude"},
        },
        record="time",
    )
    made = Forecasting(world, models, steps, tuple(times.tolist()))
    job = mh.Dataset.from_records(records, partition_bytes=1).flat_map(made)
    folder = os.path.join(out, "forecasts.zarr")
    return job.write(folder, format="zarr", layout=layout, overwrite=True, **how)
