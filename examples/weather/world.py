"""A world to learn from and to verify on: trajectories of states every 12 hours, in array files.

    trajectory   int64, rows with equal numbers follow each other in time
    step         int64, counted from 0 in each trajectory
    state        float32 [3 levels, latitude, longitude]

Trajectories are divided into those to train on, to validate on, and to verify on; the order is that of their numbers.
Windows never span two trajectories, and climatology and normalization use the trajectories to train on alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import qg
from numpy.typing import NDArray
from sphere import latitude_weights, sphere

import manyhands as mh

STEP_HOURS = 12
LEVEL = 1
"""The level that is verified: 500 hPa."""


@dataclass(frozen=True)
class Nature:
    """Makes a trajectory of the quasi-geostrophic model: a function for `flat_map`.

    days: after the spin-up. spin_up: days in which the weather develops from random waves. They are not recorded.

    The states are stream functions in 1e-5/s.
    """

    days: int
    seed: int
    spin_up: int = 40

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        for step, stream in enumerate(qg.trajectory(self.seed, number, self.days, STEP_HOURS, self.spin_up)):
            yield {"trajectory": number, "step": step, "state": (stream * 1e5).astype(np.float32)}


@dataclass(frozen=True)
class World:
    """A folder of states and their meaning.

    digest: of the folder's content. latitudes, longitudes: degrees. metres: the factor at each latitude that turns a
    state of the level 500 hPa into a height. held_out, tested: the numbers of trajectories for validation and scores.
    first_time: the time of step 0.
    """

    folder: str
    digest: str
    latitudes: tuple[float, ...]
    longitudes: tuple[float, ...]
    metres: tuple[float, ...]
    held_out: int
    tested: int
    first_time: str

    @property
    def weights(self) -> NDArray[np.float64]:
        """Return the weights of the latitudes, of mean 1."""
        return latitude_weights(self.latitudes)

    def heights(self, states: NDArray[Any]) -> NDArray[np.float64]:
        """Return the height of 500 hPa in metres, [..., latitude, longitude]. states: [..., 3, latitude, longitude]."""
        return states[..., LEVEL, :, :].astype(np.float64) * np.array(self.metres)[:, None]

    def parts(self) -> tuple[range, range, range]:
        """Return the positions of the trajectories to train on, to validate on, and to verify on."""
        count = len(borders(self.folder, self.digest)) - 1
        if count <= self.held_out + self.tested:
            raise mh.ConfigError(
                "no trajectories are left to train on",
                expected=f"more than {self.held_out + self.tested} trajectories",
                got=count,
                hint="validate and verify on fewer trajectories, or make more of them",
            )
        train = count - self.held_out - self.tested
        return range(train), range(train, train + self.held_out), range(train + self.held_out, count)

    def statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return exact statistics of the trajectories to train on.

        They are the mean of each point [3, latitude, longitude], which is the climatology, and the standard deviation
        from it of each level [3].
        """
        found = self.windows(self.parts()[0], 1).statistics("state", axis=(0, 1, 2))
        return found.mean, np.sqrt(np.square(found.deviation).mean(axis=(1, 2)))

    def windows(self, part: range, length: int) -> mh.ArrayFile:
        """Return windows of `length` consecutive states of these trajectories: tensors [length, 3, ...]."""
        starts = borders(self.folder, self.digest)
        rows = (starts[part.start], starts[part.stop])
        return mh.ArrayFile(
            self.folder, columns="state", length=length, time="step", step=1, group="trajectory", rows=rows
        )

    def states(self, position: int) -> NDArray[np.float32]:
        """Return all states of a trajectory, [states, 3, latitude, longitude]. Raises DataError for missing steps."""
        starts = borders(self.folder, self.digest)
        length = starts[position + 1] - starts[position]
        return self.windows(range(position, position + 1), length)[0].numpy()

    def times(self, position: int) -> NDArray[np.datetime64]:
        """Return the times of a trajectory's states."""
        starts = borders(self.folder, self.digest)
        steps = mh.ArrayFile(self.folder, columns="step", rows=(starts[position], starts[position + 1]))
        return np.datetime64(self.first_time, "h") + np.array([int(step) for step in steps]) * np.timedelta64(
            STEP_HOURS, "h"
        )


@cache
def borders(folder: str, digest: str) -> list[int]:
    """Return the first row of each trajectory of a folder with this digest, and the number of all rows."""
    rows = mh.ArrayFile(folder, columns="trajectory")
    numbers = mh.ArrayFile(folder, columns="trajectory", length=len(rows))[0].numpy()
    changes = np.flatnonzero(np.diff(numbers)) + 1
    return [0, *changes.tolist(), len(numbers)]


def simulated(folder: str, nature: Nature, *, trajectories: int, held_out: int, tested: int, **how: Any) -> World:
    """Make a world of the quasi-geostrophic model, with one task for each trajectory."""
    job = mh.Dataset.from_records(list(range(trajectories)), partition_bytes=1).flat_map(nature)
    summary = job.write(folder, format="arrays", overwrite=True, **how)
    grid = sphere()
    return World(
        folder,
        summary.digest,
        tuple(np.degrees(grid.latitudes).tolist()),
        tuple(np.degrees(grid.longitudes).tolist()),
        tuple((qg.HEIGHT_FACTOR * grid.mu * 1e-5).tolist()),
        held_out,
        tested,
        first_time="2000-01-01",  # a simulated planet has no calendar
    )
