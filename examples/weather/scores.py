"""Scores of forecasts as WeatherBench 2 defines them, and the linear model that the network must beat.

Source: S. Rasp et al. (2024), "WeatherBench 2: A Benchmark for the Next Generation of Data-Driven Global Weather
Models", J. Adv. Model. Earth Syst. 16. The weights of latitudes are those of `sphere.latitude_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from emulator import one_thread
from numpy.typing import NDArray
from sphere import MOST_COLUMNS, sphere

Fields = NDArray[Any]

RIDGE = 1e-2
"""The ridge, as a share of the mean variance of a coefficient."""


def squared_error(forecast: Fields, truth: Fields, weights: Fields) -> NDArray[np.float64]:
    """Return the weighted mean squared error of each field [..., latitude, longitude]. weights: of mean 1."""
    return np.asarray((weights[:, None] * np.square(forecast - truth)).mean(axis=(-2, -1)))


def anomaly_correlation(forecast: Fields, truth: Fields, normal: Fields, weights: Fields) -> NDArray[np.float64]:
    """Return the anomaly correlation coefficient of each field [..., latitude, longitude]: -1 to 1.

    normal: the climatology, [latitude, longitude]. The coefficient of a forecast without anomalies is 0.
    """
    ours, theirs = forecast - normal, truth - normal
    common, own, other = ((weights[:, None] * product).sum((-2, -1)) for product in (ours * theirs, ours**2, theirs**2))
    scale = np.sqrt(own * other)
    return np.asarray(np.divide(common, scale, out=np.zeros_like(scale), where=scale > 0))


def block_bootstrap(values: Sequence[Fields], block: int, draws: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    """Return bootstrap means [draws, columns] of the rows of all trajectories.

    values: an array [starts, columns] for each trajectory. Starts that follow each other are not independent, so blocks
    of `block` starts are drawn, with replacement.
    """
    blocks = [part for rows in values for part in np.split(rows, range(block, len(rows), block))]
    sums, counts = np.stack([part.sum(axis=0) for part in blocks]), np.array([len(part) for part in blocks])
    chosen = np.random.Generator(np.random.Philox(key=[seed, 0])).integers(0, len(blocks), (draws, len(blocks)))
    return np.stack([sums[row].sum(axis=0) / counts[row].sum() for row in chosen])


# The linear model


def to_coefficients(states: Fields) -> NDArray[np.float64]:
    """Return spectral coefficients as real rows [states, coefficients]. states: [states, 3, latitude, longitude]."""
    grid = sphere()
    columns = states.reshape(-1, *states.shape[-2:]).transpose(2, 1, 0).astype(np.float64)
    spectral = np.concatenate([grid.to_spectral(part) for part in _parts(columns)], axis=2)
    kept = spectral[grid.inside[..., 0]].T
    return np.concatenate([kept.real, kept.imag], axis=1).reshape(len(states), -1)


def to_states(rows: Fields, levels: int = 3) -> NDArray[np.float64]:
    """Return the states of rows of coefficients: [states, levels, latitude, longitude]."""
    grid = sphere()
    numbers = rows.reshape(len(rows) * levels, 2, -1)
    size = grid.truncation + 1
    spectral = np.zeros((size, size, len(numbers)), dtype=np.complex128)
    spectral[grid.inside[..., 0]] = (numbers[:, 0] + 1j * numbers[:, 1]).T
    fields = np.concatenate([grid.to_grid(part) for part in _parts(spectral)], axis=2).transpose(2, 1, 0)
    return fields.reshape(len(rows), levels, *fields.shape[1:])


def _parts(columns: Fields) -> list[Fields]:
    return np.split(columns, range(MOST_COLUMNS, columns.shape[2], MOST_COLUMNS), axis=2)


def aligned(array: Fields) -> torch.Tensor:
    """Return a copy at a multiple of 64 bytes, because the bits of a product may depend on addresses."""
    return torch.from_numpy(array).clone()


def fit_linear(trajectories: Sequence[Fields]) -> NDArray[np.float64]:
    """Fit the matrix that turns the coefficients of a normalised state into those of the next one: ridge regression.

    trajectories: normalised states [states, 3, latitude, longitude] each. A linear inverse model in spectral space.
    """
    rows = [to_coefficients(states) for states in trajectories]
    before, after = (aligned(np.concatenate(parts)) for parts in ([r[:-1] for r in rows], [r[1:] for r in rows]))
    with one_thread():
        products = before.T @ before
        ridge = RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
        return torch.linalg.solve(products + ridge, before.T @ after).numpy()


def linear_forecasts(matrix: Fields, starts: Fields, steps: int) -> Iterator[NDArray[np.float64]]:
    """Yield the normalised states [starts, 3, latitude, longitude] after 1, 2, ... steps of the linear model."""
    rows, step = aligned(to_coefficients(starts)), aligned(matrix)
    with one_thread():
        for _ in range(steps):
            rows = rows @ step
            yield to_states(rows.numpy())
