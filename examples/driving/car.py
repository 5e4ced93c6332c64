"""CarRacing-v3 with a small grey camera, and an expert that knows the track.

The car, its track and its pictures are those of gymnasium's environment. Its rules are unchanged: 1,000 points for a
lap, shared equally among the tiles of the track, less 0.1 per frame; at most 1,000 frames; -100 points beyond the
field. An action is held for `HOLD` frames, and a picture is drawn only before an action, which changes no picture.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no window
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import Box2D
import gymnasium
import numpy as np
import pygame
from gymnasium.envs.box2d import car_dynamics, car_racing
from numpy.typing import NDArray

import manyhands as mh

HOLD = 4
"""Frames for which an action is held: 0.08 s, because the environment has 50 frames per second."""
PICTURE = (42, 48)
"""Rows and columns of a picture. It shows what the environment shows, without the bar with the instruments."""
MOST_FRAMES = 1000
"""Frames of an episode at most: the limit under which CarRacing-v3 is registered."""
MOST_ACTIONS = MOST_FRAMES // HOLD
FEWEST_GREYS = 11
"""A picture with fewer grey values is not one of a track: some video drivers draw black frames without an error."""
HALF_WIDTH: float = car_racing.TRACK_WIDTH
"""Distance in metres from the middle of the road to its edge."""


def environment() -> dict[str, str]:
    """Return what decides the pictures and the scores beside our own code: versions, and a hash of the source.

    Scores of two environments can't be compared: releases of gymnasium have changed when a lap is complete.
    """
    sources = (inspect.getsource(module) for module in (car_racing, car_dynamics))
    return {
        "gymnasium": gymnasium.__version__,
        "source": hashlib.sha256("".join(sources).encode()).hexdigest(),
        "Box2D": Box2D.__version__,
        "pygame": pygame.version.ver,
    }


class Camera(car_racing.CarRacing):
    """The environment, which draws the picture of a frame only on request. Drawing takes 40 times as long as a step."""

    def _render(self, mode: str) -> Any:
        return None if mode == "state_pixels" else super()._render(mode)

    def frame(self) -> NDArray[np.uint8]:
        """Draw the present frame as the environment does: [96, 96, 3], RGB."""
        return super()._render("state_pixels")

    def photo(self) -> NDArray[np.uint8]:
        """Draw the present frame in the size for people: [400, 600, 3], RGB."""
        return super()._render("rgb_array")


@dataclass(frozen=True)
class Track:
    """The middle line of a track, which is closed: tile i is at points[i], and the next in the direction headings[i].

    points: [tiles, 2] fp64, in metres. headings: [tiles] in radians, counter-clockwise from the x axis. curvatures:
    [tiles] in 1/m, positive to the left. spacing: the distance of two tiles in metres.
    """

    points: NDArray[np.float64]
    headings: NDArray[np.float64]
    curvatures: NDArray[np.float64]
    spacing: float

    @classmethod
    def of(cls, points: NDArray[np.float64]) -> Track:
        """Build a track from its points."""
        steps = np.roll(points, -1, axis=0) - points
        headings = np.arctan2(steps[:, 1], steps[:, 0])
        spacing = float(np.median(np.hypot(steps[:, 0], steps[:, 1])))
        # Over four tiles, because the headings of single tiles are rough.
        turns = wrapped(np.roll(headings, -2) - np.roll(headings, 2))
        return cls(points, headings, turns / (4 * spacing), spacing)

    def nearest(self, place: NDArray[np.float64], last: int) -> int:
        """Return the tile nearest to a place, among those near tile `last`: another leg of the track may be nearer."""
        near = (last + np.arange(-6, 13)) % len(self.points)
        return int(near[np.argmin(np.square(self.points[near] - place).sum(axis=1))])

    def offset(self, place: NDArray[np.float64], tile: int) -> float:
        """Return the distance in metres from the middle line near a tile, positive to the left of the line."""
        found = math.inf
        for start in (tile - 1, tile):
            first, second = self.points[start], self.points[(start + 1) % len(self.points)]
            along, away = second - first, place - first
            share = min(1.0, max(0.0, float(along @ away) / float(along @ along)))
            gap = away - share * along
            distance = math.copysign(math.hypot(*gap), along[0] * away[1] - along[1] * away[0])
            found = distance if abs(distance) < abs(found) else found
        return found


def wrapped(angle: Any) -> Any:
    """Return the same angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class Car:
    """One car on one track at a time, from `start` until `done`.

    score: the points so far. frames: the frames so far. lap: whether the lap is complete. tile: the tile that the car
    is at.
    """

    def __init__(self) -> None:
        self.env = Camera()

    def start(self, seed: int) -> None:
        """Put the car at the start of the track with this seed. Nothing of earlier tracks remains."""
        self.env.reset(seed=seed)
        self.track = Track.of(np.array([tile[2:] for tile in self.env.track]))
        self.score, self.frames, self.tile = 0.0, 0, 0
        self.lap = self.done = False

    @property
    def place(self) -> NDArray[np.float64]:
        """The car's place [2] in metres."""
        return np.array(self.env.car.hull.position)

    @property
    def heading(self) -> float:
        """The direction in which the car points, in radians counter-clockwise from the x axis."""
        return float(self.env.car.hull.angle) + math.pi / 2

    @property
    def speed(self) -> float:
        """The car's speed in m/s."""
        return math.hypot(*self.env.car.hull.linearVelocity)

    @property
    def yaw_rate(self) -> float:
        """The speed at which the car turns, in rad/s, positive to the left."""
        return float(self.env.car.hull.angularVelocity)

    @property
    def offset(self) -> float:
        """The car's distance from the middle of the road in metres, positive to the left."""
        return self.track.offset(self.place, self.tile)

    def observation(self) -> tuple[NDArray[np.uint8], float, float]:
        """Return what a driver without a map sees: the picture, the speed and the yaw rate."""
        return self.picture(), self.speed, self.yaw_rate

    def picture(self) -> NDArray[np.uint8]:
        """Return the present picture `PICTURE` in grey. Raises DataError if it is blank."""
        rows, columns = PICTURE
        red, green, blue = np.moveaxis(self.env.frame()[: 2 * rows].astype(np.uint32), 2, 0)
        # The weights of Rec. 601, times 256: in integers, so that no order of additions matters.
        grey = 77 * red + 150 * green + 29 * blue
        grey = grey.reshape(rows, 2, columns, 2).sum(axis=(1, 3)) // (4 * 256)
        found = len(np.unique(grey))
        if found < FEWEST_GREYS:
            raise mh.DataError(
                "a picture of the track is blank",
                expected=f"at least {FEWEST_GREYS} values of grey",
                got=str(found),
                hint="check SDL_VIDEODRIVER and the versions of pygame-ce and gymnasium",
            )
        return grey.astype(np.uint8)

    def act(self, steering: float, pedal: float) -> None:
        """Hold an action for `HOLD` frames, or until the end.

        steering: from -1 (left) to 1 (right). pedal: from -1 (brake) to 1 (gas).
        """
        action = np.array([min(1.0, max(-1.0, steering)), max(pedal, 0.0), max(-pedal, 0.0)], dtype=np.float32)
        for _ in range(HOLD):
            _, reward, terminated, _, info = self.env.step(action)
            self.frames += 1
            self.score += float(reward)
            self.done = terminated or self.frames >= MOST_FRAMES
            self.lap = bool(info.get("lap_finished", False))
            if self.done:
                break
        self.tile = self.track.nearest(self.place, self.tile)


@cache
def car() -> Car:
    """Return the one car of this process. A process has one environment, and each episode starts it anew."""
    return Car()


@dataclass(frozen=True)
class Expert:
    """Pure pursuit of a point on the middle line, at a speed that the curvature of the next tiles allows.

    It looks about as far ahead as the picture shows (`tiles`), so that a network can learn the same from the picture.
    The steering follows R. C. Coulter, "Implementation of the Pure Pursuit Path Tracking Algorithm", CMU-RI-TR-92-01.
    Lengths in metres, speeds in m/s.
    """

    tiles: int = 10
    most_speed: float = 80.0
    sideways: float = 280.0  # the acceleration in a curve, in m/s²
    braking: float = 20.0  # the deceleration before a curve, in m/s²
    reach: float = 5.0  # the distance of the pursued point, at rest
    reach_per_speed: float = 0.25  # and for each m/s
    gain: float = 2.4  # the tyres slip, so the wheels must turn more than geometry says
    damping: float = 0.03  # of the yaw rate, in s
    ease: float = 4.0  # how much less gas it gives while it steers: the tyres can't both drive and turn

    def __call__(self, car: Car) -> tuple[float, float]:
        """Return (steering, pedal) for the car's present state, as `Car.act` takes them."""
        track, speed = car.track, car.speed
        reach = min(self.reach + self.reach_per_speed * speed, self.tiles * track.spacing)
        ahead = reach / track.spacing
        first = track.points[(car.tile + int(ahead)) % len(track.points)]
        second = track.points[(car.tile + int(ahead) + 1) % len(track.points)]
        target = first + (ahead - int(ahead)) * (second - first) - car.place
        angle = wrapped(math.atan2(target[1], target[0]) - car.heading)
        wheels = math.atan2(2 * WHEELBASE * math.sin(angle), math.hypot(*target))
        steering = -self.gain * wheels + self.damping * car.yaw_rate
        steering = min(1.0, max(-1.0, steering))
        pedal = self._pedal(car.track, car.tile, speed)
        return steering, pedal * max(0.0, 1 - self.ease * abs(steering)) if pedal > 0 else pedal

    def _pedal(self, track: Track, tile: int, speed: float) -> float:
        steps = np.arange(self.tiles + 1)
        bends = np.abs(track.curvatures[(tile + steps) % len(track.points)])
        allowed = np.sqrt(self.sideways / np.maximum(bends, 1e-3) + 2 * self.braking * steps * track.spacing)
        excess = speed - min(self.most_speed, float(allowed.min()))
        return min(0.8, max(0.0, -0.2 * excess)) if excess < 0 else -min(0.8, 0.05 * excess)


WHEELBASE = (car_dynamics.WHEELPOS[0][1] - car_dynamics.WHEELPOS[2][1]) * car_dynamics.SIZE
"""Distance in metres between the axles."""
