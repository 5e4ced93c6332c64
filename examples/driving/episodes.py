"""Episodes of driving as records: what is gathered to learn from, and the scores of a driver.

An episode is one drive on one track, and its number is the seed of the track. All that happens in it depends on its
number and on the driver alone, so it may run in any process, after any other episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from car import HALF_WIDTH, MOST_ACTIONS, Expert, car, environment
from network import Driver

STRETCH = 12
"""The actions of a stretch of noise: about one second."""
NOISE = 0.35


@dataclass(frozen=True)
class Pushes:
    """Noise on the steering, which pushes the car from its line, as a function of the episode alone.

    There is noise in half of all stretches of `STRETCH` actions, strongest at the start of the stretch, and zero after
    its end. deviation: the standard deviation of its start.
    """

    deviation: float = 0.0
    seed: int = 7

    def __call__(self, episode: int) -> Iterator[float]:
        """Yield what is added to the steering of each action, without end."""
        draws = np.random.Generator(np.random.Philox(key=[self.seed, episode]))
        while True:
            push = self.deviation * draws.standard_normal() if draws.random() < 0.5 else 0.0
            yield from (push * (1 - action / STRETCH) for action in range(STRETCH))


@dataclass(frozen=True)
class Gathering:
    """Drives an episode, and yields what the driver sees and what the expert would do: a function for `flat_map`.

    pushes: noise on the steering of the driver. What the expert does about it can't be learned from perfect drives. The
    labels have no noise. driver: drives in place of the expert, whose actions are recorded nevertheless (DAgger:
    S. Ross, G. Gordon and D. Bagnell, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
    Learning", 2011). actions: the actions of an episode at most.
    """

    pushes: Pushes = Pushes(NOISE)
    driver: Driver | None = None
    actions: int = MOST_ACTIONS
    expert: Expert = field(default_factory=Expert)
    environment: dict[str, str] = field(default_factory=environment)  # another source of the environment is another job

    def __call__(self, episode: int) -> Iterator[dict[str, Any]]:
        """Yield the observations of an episode, in the order of its steps."""
        auto = car()
        auto.start(episode)
        for step, push in zip(range(self.actions), self.pushes(episode), strict=False):
            picture, speed, yaw_rate = auto.observation()
            steering, pedal = self.expert(auto)
            yield {
                "episode": episode,
                "step": step,
                "picture": picture,
                "motion": np.array([speed, yaw_rate], dtype=np.float32),
                "action": np.array([steering, pedal], dtype=np.float32),
            }
            if self.driver is not None:
                steering, pedal = self.driver(picture, speed, yaw_rate)
            auto.act(steering + push, pedal)
            if auto.done:
                return


@dataclass(frozen=True)
class Trial:
    """Drives an episode, and returns its score: a function for `map`.

    driver: None for the expert. pushes: noise on the steering, to see whether the driver comes back to the road.
    """

    driver: Driver | None = None
    pushes: Pushes = Pushes()
    expert: Expert = field(default_factory=Expert)
    environment: dict[str, str] = field(default_factory=environment)

    def __call__(self, episode: int) -> dict[str, Any]:
        """Return the points, and where the car was: distances in metres from the middle of the road."""
        auto, offsets = car(), []
        auto.start(episode)
        pushes = self.pushes(episode)
        while not auto.done:
            steering, pedal = self.expert(auto) if self.driver is None else self.driver(*auto.observation())
            auto.act(steering + next(pushes), pedal)
            offsets.append(abs(auto.offset))
        return {
            "episode": episode,
            "score": auto.score,
            "lap": auto.lap,
            "frames": auto.frames,
            "mean_offset": float(np.mean(offsets)),
            "largest_offset": max(offsets),
            "off_road": float(np.mean(np.array(offsets) > HALF_WIDTH)),
        }
