"""A three-level quasi-geostrophic model of the atmosphere, and the barotropic vorticity equation, on the sphere.

The model is of the kind of J. Marshall and F. Molteni (1993), "Toward a Dynamical Understanding of Planetary-Scale Flow
Regimes", J. Atmos. Sci. 50: potential vorticity is advected on the levels 200, 500 and 800 hPa, relaxed towards a jet
in each hemisphere, and damped by friction at the lowest level and by a scale-selective diffusion. Five mountains force
planetary waves. There are no seasons, no moisture and no coasts.

Fields are spectral and complex [m, n, columns], in radians and seconds on the unit sphere: a stream function has the
unit 1/s. A state of several members has the columns level 0 of all members, then level 1, then level 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from sphere import Complex, Real, Sphere, sphere

RADIUS = 6.371e6
OMEGA = 7.292e-5
GRAVITY = 9.81
DAY = 86400.0
STEP_SECONDS = 3600.0
"""Stable up to about 4300 s. Over two days, heights differ by 0.13 m (root mean square) from those with short steps."""

MOUNTAINS = ((85, 35, 3.0, 20, 10), (255, 45, 1.8, 14, 16), (290, -25, 2.0, 8, 22), (320, 72, 1.8, 12, 9))
"""Longitude and latitude (degrees), height (km), and half-widths along both (degrees)."""
PLATEAU = (0, -85, 2.5, 180, 14)
SCALE_HEIGHT_KM = 9.0

HEIGHT_FACTOR = 2 * OMEGA * RADIUS**2 / GRAVITY
"""Geostrophic height (m) = HEIGHT_FACTOR * sin(latitude) * stream function (1/s)."""


def heights() -> Real:
    """Return the height of the mountains in km, [longitude, latitude]."""
    grid = sphere()
    longitudes, latitudes = np.degrees(grid.longitudes)[:, None], np.degrees(grid.latitudes)[None, :]
    found = np.zeros(grid.shape)
    for longitude, latitude, height, wide, high in (*MOUNTAINS, PLATEAU):
        along = (longitudes - longitude + 180) % 360 - 180
        found += height * np.exp(-((along / wide) ** 2) - ((latitudes - latitude) / high) ** 2)
    return found


class Atmosphere:
    """The model's operators. relaxation, friction, diffusion: time scales in days. jets: the shear between levels, m/s.

    diffusion: of the smallest scale. jets: of the relaxation's target, at 45 degrees.
    """

    def __init__(
        self,
        relaxation: float = 15.0,
        friction: float = 3.0,
        diffusion: float = 1.5,
        jets: tuple[float, float] = (24.0, 15.0),
    ) -> None:
        grid = self.grid = sphere()
        self.coupling = tuple((RADIUS / radius) ** 2 for radius in (700e3, 450e3))  # of the radii of deformation
        self.relaxation, self.friction = relaxation * DAY, friction * DAY
        self.vorticity_of = self._stretching()
        self.stream_of = np.linalg.inv(self.vorticity_of)
        top = grid.truncation
        self.diffusion = (grid.laplacian / grid.laplacian[0, top, 0]) ** 4 / (diffusion * DAY)
        self.target = [self._jet(speed) for speed in jets]
        planet = np.broadcast_to(2 * OMEGA * grid.mu[None, :], grid.shape)
        lowest = planet * (1 + heights() / SCALE_HEIGHT_KM)
        self.planetary = grid.to_spectral(np.stack([planet, planet, lowest], axis=2))

    def _stretching(self) -> Real:
        """Return the matrices that turn the stream functions of three levels into potential vorticity: [n, 3, 3]."""
        upper, lower = self.coupling
        couplings = np.array([[-upper, upper, 0], [upper, -upper - lower, lower], [0, lower, -lower]])
        found = self.grid.laplacian[0, :, 0][:, None, None] * np.eye(3) + couplings
        found[0] = np.eye(3)  # the global mean stays zero
        return found

    def _jet(self, speed: float) -> Complex:
        """Return the stream function of a zonal wind speed * sin²(2 latitude): [m, n, 1]."""
        grid = self.grid
        # The integral of -sin²(2 x) is sin(4 x) / 8 - x / 2.
        stream = speed / RADIUS * (np.sin(4 * grid.latitudes) / 8 - grid.latitudes / 2)
        return grid.to_spectral(np.broadcast_to(stream[None, :, None], (*grid.shape, 1)))

    def stream(self, vorticity: Complex) -> Complex:
        """Return the stream function of a potential vorticity (without the planet's)."""
        return _on_levels(self.stream_of, vorticity)

    def tendency(self, vorticity: Complex) -> Complex:
        """Return the time derivative of the potential vorticity."""
        members = vorticity.shape[2] // 3
        top, middle, lowest = (slice(level * members, (level + 1) * members) for level in range(3))
        stream = self.stream(vorticity)
        total = vorticity + np.repeat(self.planetary, members, axis=2)
        found = -self.grid.jacobian(stream, total) - self.diffusion * vorticity
        upper, lower = (rate / self.relaxation for rate in self.coupling)
        warm = upper * (stream[..., top] - stream[..., middle] - self.target[0])
        warm_below = lower * (stream[..., middle] - stream[..., lowest] - self.target[1])
        found[..., top] += warm
        found[..., middle] += warm_below - warm
        found[..., lowest] -= warm_below + self.grid.laplacian * stream[..., lowest] / self.friction
        found[0, 0] = 0
        return found

    def start(self, draws: list[np.random.Generator]) -> Complex:
        """Return the potential vorticity of jets with random waves: one member for each generator."""
        size = self.grid.truncation + 1
        found = np.zeros((size, size, 3, len(draws)), dtype=np.complex128)
        found[:, :, 0] = self.target[0] + self.target[1]
        found[:, :, 1] = self.target[1]
        for member, draw in enumerate(draws):
            parts = draw.standard_normal((2, 7, 10, 3))
            found[1:8, :10, :, member] += 2e-8 * (parts[0] + 1j * parts[1]) * self.grid.inside[1:8, :10]
        return _on_levels(self.vorticity_of, found.reshape(*found.shape[:2], -1))


def _on_levels(matrices: Real, field: Complex) -> Complex:
    """Multiply the three levels of a field by a matrix for each n."""
    levels = field.reshape(*field.shape[:2], 3, -1)
    weights = matrices[None, :, :, :, None]
    found = weights[..., 0, :] * levels[:, :, :1] + weights[..., 1, :] * levels[:, :, 1:2]
    return np.asarray(found + weights[..., 2, :] * levels[:, :, 2:]).reshape(field.shape)


def trajectory(seed: int, number: int, days: int, hours: int, spin_up: int) -> Iterator[Real]:
    """Yield the stream function on the grid, [3, latitude, longitude] in 1/s, every `hours` after a spin-up (days).

    The start depends only on the seed and the number of the trajectory. All products have the same shapes, and they are
    too small for more than one thread, so the bits do not depend on the process.
    """
    model, steps = atmosphere(), round(hours * 3600 / STEP_SECONDS)
    draws = np.random.Generator(np.random.Philox(key=[seed, number]))
    states = adams_bashforth(model.tendency, model.start([draws]), STEP_SECONDS)
    for _ in range(round(spin_up * DAY / STEP_SECONDS) - steps):
        next(states)
    for _ in range(days * 24 // hours):
        for _ in range(steps):
            state = next(states)
        yield model.grid.to_grid(model.stream(state)).transpose(2, 1, 0)


@cache
def atmosphere() -> Atmosphere:
    """Return the model, made once for each process."""
    return Atmosphere()


Tendency = Callable[[Complex], Complex]


def adams_bashforth(tendency: Tendency, state: Complex, seconds: float) -> Iterator[Complex]:
    """Yield the state after each step of `seconds`, without end: the third-order Adams-Bashforth scheme.

    The first two steps have lower orders. It needs one tendency for each step; D. Durran (1991), "The Third-Order
    Adams-Bashforth Method: An Attractive Alternative to Leapfrog Time Differencing", Mon. Weather Rev. 119.
    """
    older = old = now = tendency(state)
    state = state + seconds * now
    yield state
    old, now = now, tendency(state)
    state = state + seconds * (1.5 * now - 0.5 * old)
    yield state
    while True:
        older, old, now = old, now, tendency(state)
        state = state + (seconds / 12) * (23 * now - 16 * old + 5 * older)
        yield state


def runge_kutta(tendency: Tendency, state: Complex, seconds: float) -> Iterator[Complex]:
    """Yield the state after each step of `seconds`, without end: the classical fourth-order scheme."""
    while True:
        first = tendency(state)
        second = tendency(state + seconds / 2 * first)
        third = tendency(state + seconds / 2 * second)
        fourth = tendency(state + seconds * third)
        state = state + seconds / 6 * (first + 2 * second + 2 * third + fourth)
        yield state


# The known truth


def rossby_haurwitz(seconds: float, grid: Sphere, wave: int = 4, rate: float = 7.848e-6) -> Real:
    """Return the stream function of a Rossby-Haurwitz wave after a time, [longitude, latitude, 1], in 1/s.

    It is an exact solution of the barotropic vorticity equation: the pattern turns eastward without a change of shape.
    Source: N. Phillips (1959), "Numerical Integration of the Primitive Equations on the Hemisphere", with the values of
    D. Williamson et al. (1992), "A Standard Test Set for Numerical Approximations to the Shallow Water Equations".
    """
    turns = (wave * (3 + wave) * rate - 2 * OMEGA) / ((1 + wave) * (2 + wave))
    sine, cosine = np.sin(grid.latitudes)[None, :], np.cos(grid.latitudes)[None, :]
    pattern = np.cos(wave * (grid.longitudes[:, None] - turns * seconds))
    return np.asarray(-rate * sine + rate * cosine**wave * sine * pattern)[:, :, None]


def rossby_haurwitz_error(days: float = 5.0, step_seconds: float = 1800.0) -> float:
    """Return the largest error of a Rossby-Haurwitz wave after `days`, relative to its largest stream function."""
    grid = sphere()
    inverse = np.where(grid.laplacian == 0, 0, 1 / np.where(grid.laplacian == 0, 1, grid.laplacian))
    planet = grid.to_spectral(np.broadcast_to(2 * OMEGA * grid.mu[None, :, None], (*grid.shape, 1)))

    def tendency(vorticity: Complex) -> Complex:
        return -grid.jacobian(inverse * vorticity, vorticity + planet)

    steps = round(days * DAY / step_seconds)
    states = runge_kutta(tendency, grid.laplacian * grid.to_spectral(rossby_haurwitz(0, grid)), step_seconds)
    for _ in range(steps):
        vorticity = next(states)
    truth = rossby_haurwitz(days * DAY, grid)
    return float(np.abs(grid.to_grid(inverse * vorticity) - truth).max() / np.abs(truth).max())
