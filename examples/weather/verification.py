"""Verifies the emulator beside a linear model, persistence and climatology: a data job over starts of forecasts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from emulator import Emulator, forecasts
from numpy.typing import NDArray
from scores import anomaly_correlation, block_bootstrap, fit_linear, linear_forecasts, squared_error
from world import STEP_HOURS, World

import manyhands as mh

METHODS = ("network", "linear", "persistence", "climatology")
TARGETS = {48: 0.95, 72: 0.88, 120: 0.6}
"""The least anomaly correlation of the network after these hours."""
STARTS_TOGETHER = 15
"""Starts of one record. They are one batch of the network, so this number decides bits."""
BLOCK_DAYS = 10
"""Starts of this many days are drawn together for the intervals."""


def new_emulator(world: World, mean: NDArray[Any], deviation: NDArray[Any]) -> Any:
    """Return a factory of emulators. mean [3, latitude, longitude] and deviation [3] normalise the states."""
    return partial(Emulator, mean, deviation, world.latitudes, world.weights)


def trained(world: World, run: str) -> Emulator:
    """Return the emulator that a run has trained. Mean and deviation are in its checkpoint, too."""
    shape = (3, len(world.latitudes), len(world.longitudes))
    return mh.load_model(run, new_emulator(world, np.zeros(shape), np.ones(3)))


@dataclass(frozen=True)
class Models:
    """Where the trained network and the linear model are: a run directory and a NumPy file, with their digests."""

    run: str
    weights: str
    linear: str
    linear_digest: str


@cache
def loaded(world: World, models: Models) -> tuple[Emulator, NDArray[np.float64]]:
    """Return the network and the matrix of the linear model, read once for each process."""
    return trained(world, models.run), np.load(models.linear)


@dataclass(frozen=True)
class Verification:
    """Scores forecasts of 500 hPa from some starts of a trajectory: a function for `flat_map`.

    Yields a record for each start, lead time and method, with the mean squared error (m²) and the anomaly correlation.
    """

    world: World
    models: Models
    steps: int

    def __call__(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        network, matrix = loaded(self.world, self.models)
        states, starts, weights = self.world.states(record["trajectory"]), record["starts"], self.world.weights
        first, mean, scale = states[starts], network.mean.numpy(), network.deviation.numpy()
        normal = self.world.heights(mean)
        ours = forecasts(network, first, self.steps)
        linear = linear_forecasts(matrix, (first - mean) / scale, self.steps)
        for step, (predicted, simple) in enumerate(zip(ours, linear, strict=True), start=1):
            truth = self.world.heights(states[[start + step for start in starts]])
            made = [predicted, simple * scale + mean, first, np.broadcast_to(mean, first.shape)]
            for method, forecast in zip(METHODS, made, strict=True):
                heights = self.world.heights(forecast)
                errors = squared_error(heights, truth, weights)
                correlations = anomaly_correlation(heights, truth, normal, weights)
                for start, error, correlation in zip(starts, errors, correlations, strict=True):
                    yield {
                        "trajectory": record["trajectory"],
                        "start": start,
                        "hours": step * STEP_HOURS,
                        "method": method,
                        "mse": float(error),
                        "acc": float(correlation),
                    }


def starts_of(world: World, every: int, steps: int) -> tuple[list[dict[str, Any]], int]:
    """Return the starts of forecasts as records, and how many were left out because their truth ends too early."""
    records, left_out = [], 0
    for trajectory in world.parts()[2]:
        length = len(world.states(trajectory))
        starts = list(range(0, length, every))
        complete = [start for start in starts if start + steps < length]
        left_out += len(starts) - len(complete)
        for first in range(0, len(complete), STARTS_TOGETHER):
            records.append({"trajectory": trajectory, "starts": complete[first : first + STARTS_TOGETHER]})
    return records, left_out


@dataclass(frozen=True)
class Table:
    """The scores of 500 hPa. values: arrays [starts, leads, methods] of "mse" and "acc", one for each trajectory."""

    hours: list[int]
    values: dict[str, list[NDArray[np.float64]]]
    left_out: int
    start_every: int
    methods: tuple[str, ...] = METHODS

    @property
    def starts(self) -> int:
        """Return the number of forecasts."""
        return sum(len(part) for part in self.values["acc"])

    @cached_property
    def _means(self) -> dict[str, NDArray[np.float64]]:
        return {name: np.concatenate(parts).mean(axis=0) for name, parts in self.values.items()}

    @cached_property
    def _draws(self) -> dict[str, NDArray[np.float64]]:
        """Bootstrap means: [draws, leads, methods]."""
        block = max(1, BLOCK_DAYS * 24 // (STEP_HOURS * self.start_every))
        shape = (-1, len(self.hours), len(self.methods))
        return {
            name: block_bootstrap([part.reshape(len(part), -1) for part in parts], block).reshape(shape)
            for name, parts in self.values.items()
        }

    def mean(self, score: str, method: str, lead: int) -> float:
        """Return the "acc" or "rmse" (m) of a method at a lead. The RMSE is the root of the mean over all starts."""
        column = self.methods.index(method)
        if score == "rmse":
            return float(np.sqrt(self._means["mse"][lead, column]))
        return float(self._means[score][lead, column])

    def interval(self, score: str, method: str, lead: int) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of a score."""
        draws = self._draws["mse" if score == "rmse" else score][:, lead, self.methods.index(method)]
        low, high = np.quantile(np.sqrt(draws) if score == "rmse" else draws, [0.025, 0.975])
        return float(low), float(high)

    def better_than(self, method: str) -> list[bool]:
        """Return for each lead whether the network has a higher ACC and a smaller RMSE than another method."""
        return [
            self.mean("acc", "network", lead) > self.mean("acc", method, lead)
            and self.mean("rmse", "network", lead) < self.mean("rmse", method, lead)
            for lead in range(len(self.hours))
        ]

    def cell(self, method: str, lead: int) -> str:
        """Return the scores of a method at a lead as text."""
        rmse = f"{self.mean('rmse', method, lead):.1f}"
        if method == "climatology":
            return rmse
        low, high = self.interval("acc", method, lead)
        return f"{rmse} / {self.mean('acc', method, lead):.3f} [{low:.2f}, {high:.2f}]"

    def rows(self) -> list[dict[str, Any]]:
        """Return all scores with their intervals, for a file."""
        return [
            {"hours": hours, "method": method, "score": score, "mean": self.mean(score, method, lead)}
            | dict(zip(("low", "high"), self.interval(score, method, lead), strict=True))
            for lead, hours in enumerate(self.hours)
            for method in self.methods
            for score in ("rmse", "acc")
        ]


@dataclass(frozen=True)
class Verified:
    """Scores with what they are of. digests: of the states, the weights, the linear model and the scores."""

    world: World
    models: Models
    table: Table
    digests: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """Return what `result.json` holds."""
        left_out = self.table.left_out
        return {
            "starts": self.table.starts,
            "left_out": left_out,
            "digests": self.digests,
            "scores": self.table.rows(),
        }


def fitted(world: World, network: Emulator, out: str) -> tuple[str, str]:
    """Fit the linear model on the training trajectories, and return its file and its digest."""
    mean, deviation = network.mean.numpy(), network.deviation.numpy()
    matrix = fit_linear([(world.states(number) - mean) / deviation for number in world.parts()[0]])
    path = os.path.join(out, f"linear-{world.digest[:12]}.npy")
    np.save(path, matrix)
    return path, hashlib.sha256(Path(path).read_bytes()).hexdigest()


def verify(world: World, run: str, out: str, *, every: int, steps: int, **how: Any) -> Verified:
    """Score forecasts of all methods from every `every`-th state of the trajectories to verify on."""
    network = trained(world, run)
    weights = mh.digest_of_tensors(network.state_dict().items())
    linear, linear_digest = fitted(world, network, out)
    models = Models(run, weights, linear, linear_digest)
    records, left_out = starts_of(world, every, steps)
    job = mh.Dataset.from_records(records, partition_bytes=1).flat_map(Verification(world, models, steps))
    summary = job.write(os.path.join(out, "scores"), format="parquet", overwrite=True, **how)
    digests = {"states": world.digest, "weights": weights, "linear": linear_digest, "scores": summary.digest}
    return Verified(world, models, table_of(summary, steps, left_out, every), digests)


def table_of(summary: mh.PrepareSummary, steps: int, left_out: int, every: int) -> Table:
    """Return the scores that a job has written. A group of starts has a record for each lead, method and start."""
    found = pq.read_table(summary.path)
    keys = list(zip(found["trajectory"].to_pylist(), found["start"].to_pylist(), strict=True))
    hours, methods = found["hours"].to_numpy(), found["method"].to_pylist()
    trajectories: dict[int, dict[int, int]] = {}
    for trajectory, start in dict.fromkeys(keys):
        inside = trajectories.setdefault(trajectory, {})
        inside[start] = len(inside)
    values = {
        name: [np.full((len(inside), steps, len(METHODS)), np.nan) for inside in trajectories.values()]
        for name in ("mse", "acc")
    }
    order = {trajectory: number for number, trajectory in enumerate(trajectories)}
    for name, arrays in values.items():
        for row, value in enumerate(found[name].to_pylist()):
            trajectory, start = keys[row]
            place = trajectories[trajectory][start], hours[row] // STEP_HOURS - 1, METHODS.index(methods[row])
            arrays[order[trajectory]][place] = value
    return Table([(step + 1) * STEP_HOURS for step in range(steps)], values, left_out, every)
