"""Spherical harmonics on a Gaussian grid, and the weights of latitudes.

Spectral fields are complex [m, n, columns] with 0 <= m, n <= truncation, and zero where n < m. Grid fields are real
[longitude, latitude, columns]; latitudes are ordered from south to north. Columns are transformed independently.
Functions P(m, n) are normalized so that the integral of P(m, n)² over mu = sin(latitude) from -1 to 1 is 1.

The bits of a matrix product depend on its shape, and above a size also on the number of threads. So a caller who
promises bits must always transform the same number of columns. Products of up to `MOST_COLUMNS` columns are below the
size at which OpenBLAS begins to use several threads.

Sources: J. Charney, R. Fjørtoft and J. von Neumann (1950), "Numerical Integration of the Barotropic Vorticity
Equation"; W. Bourke (1972), "An Efficient, One-Level, Primitive-Equation Spectral Model", for the transform method.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]

MOST_COLUMNS = 80


class Sphere:
    """Transforms between a triangular truncation and its Gaussian grid, on the unit sphere.

    latitudes, longitudes: radians. mu: the sine of each latitude. laplacian: the eigenvalue -n (n + 1) for each n,
    [1, n, 1]. wave: the zonal wave number m, [m, 1, 1]. inside: true where n >= m, [m, n, 1].
    """

    def __init__(self, truncation: int = 21, latitudes: int = 32, longitudes: int = 64) -> None:
        self.truncation, self.shape = truncation, (longitudes, latitudes)
        self.mu, gauss = np.polynomial.legendre.leggauss(latitudes)
        self.latitudes = np.arcsin(self.mu)
        self.longitudes = 2 * np.pi * np.arange(longitudes) / longitudes
        numbers = np.arange(truncation + 1)
        self.wave = numbers[:, None, None]
        self.laplacian = -(numbers * (numbers + 1.0))[None, :, None]
        self.inside = (numbers[None, :] >= numbers[:, None])[:, :, None]
        values, slopes = legendre(self.mu, truncation)
        self._values = np.ascontiguousarray(values)  # [m, latitude, n]
        self._both = np.ascontiguousarray(np.concatenate([values, slopes], axis=1))
        self._analysis = np.ascontiguousarray((values * gauss[None, :, None]).transpose(0, 2, 1))
        self._cosine_squared = (1 - self.mu**2)[None, :, None]

    def to_grid(self, spectral: Complex) -> Real:
        """Return the values of spectral fields on the grid."""
        return self._from_waves(_product(self._values, spectral))

    def derivatives(self, spectral: Complex) -> tuple[Real, Real]:
        """Return the derivative along the longitude, and (1 - mu²) times the derivative along mu, on the grid."""
        both = _product(self._both, spectral)
        both[:, : self.shape[1]] *= 1j * self.wave
        grid = self._from_waves(both)
        return grid[:, : self.shape[1]], grid[:, self.shape[1] :]

    def to_spectral(self, grid: Real) -> Complex:
        """Return the spectral coefficients of grid fields. Waves beyond the truncation are dropped."""
        waves = np.fft.rfft(grid, axis=0, norm="forward")[: self.truncation + 1]
        return _product(self._analysis, waves) * self.inside

    def jacobian(self, left: Complex, right: Complex) -> Complex:
        """Return the Jacobian of two fields: the advection of `right` by the stream function `left`."""
        columns = left.shape[2]
        along, across = self.derivatives(np.concatenate([left, right], axis=2))
        product = along[..., :columns] * across[..., columns:] - across[..., :columns] * along[..., columns:]
        return self.to_spectral(product / self._cosine_squared)

    def _from_waves(self, waves: Complex) -> Real:
        return np.fft.irfft(waves, n=self.shape[0], axis=0, norm="forward")


def _product(matrices: Real, columns: Complex) -> Complex:
    """Multiply a real matrix and a complex one for each m: [m, i, j] @ [m, j, columns]."""
    numbers = np.ascontiguousarray(columns).view(np.float64)
    return np.matmul(matrices, numbers).view(np.complex128)


def legendre(mu: Real, truncation: int) -> tuple[Real, Real]:
    """Return P(m, n) and (1 - mu²) dP(m, n)/dmu at each mu: two arrays [m, mu, n]."""

    def epsilon(m: int, n: int) -> float:
        return float(np.sqrt((n * n - m * m) / (4 * n * n - 1)))

    values = np.zeros((truncation + 1, len(mu), truncation + 2))
    slopes = np.zeros((truncation + 1, len(mu), truncation + 1))
    for m in range(truncation + 1):
        if m == 0:
            values[0, :, 0] = np.sqrt(0.5)
        else:
            values[m, :, m] = values[m - 1, :, m - 1] * np.sqrt((1 - mu**2) * (2 * m + 1) / (2 * m))
        for n in range(m + 1, truncation + 2):
            before = epsilon(m, n - 1) * values[m, :, n - 2] if n - 2 >= m else 0.0
            values[m, :, n] = (mu * values[m, :, n - 1] - before) / epsilon(m, n)
        for n in range(m, truncation + 1):
            below = (n + 1) * epsilon(m, n) * values[m, :, n - 1] if n > m else 0.0
            slopes[m, :, n] = below - n * epsilon(m, n + 1) * values[m, :, n + 1]
    return values[:, :, : truncation + 1], slopes


def latitude_weights(degrees: Any) -> Real:
    """Return the weight of each latitude, of mean 1: the difference of the sines of its cell's bounds.

    A bound is half-way between two latitudes, or a pole. degrees: latitudes in either order. The weights of latitudes
    in reverse order are the same weights in reverse order.
    """
    latitudes = np.asarray(degrees, dtype=np.float64)
    order = np.argsort(latitudes)
    ordered = latitudes[order]
    bounds = np.concatenate([[-90.0], (ordered[1:] + ordered[:-1]) / 2, [90.0]])
    areas = np.diff(np.sin(np.radians(bounds)))
    weights = np.empty_like(areas)
    weights[order] = areas / areas.mean()
    return weights


@cache
def sphere() -> Sphere:
    """Return the T21 sphere with 64 longitudes and 32 latitudes, made once for each process."""
    return Sphere()
