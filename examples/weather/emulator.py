"""The emulator: a convolutional network that makes a step of 12 hours, and the recipes that train it.

Training has two stages. In the first one the network predicts one step. In the second one, which begins with the
weights of the first, it predicts two steps, the second from its own first one, and the loss is their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import manyhands as mh

BATCH = mh.Batch(global_size=16, micro_size=4)
"""Four micro-batches, so up to four workers share a step."""
LEARNING_RATE, ROLLOUT_LEARNING_RATE, WARM_UP_STEPS = 3e-3, 1e-3, 40
CHANNELS = 40
DILATIONS = (1, 2, 1, 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside, because the bits of its results depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def padded(x: Tensor, width: int = 1) -> Tensor:
    """Pad a field [batch, channels, latitude, longitude]: periodic in longitude, with the last row at the poles."""
    around = F.pad(x, (width, width, 0, 0), mode="circular")
    return F.pad(around, (0, 0, width, width), mode="replicate")


class Block(nn.Module):
    """Adds two convolutions to its input [batch, channels, latitude, longitude]. At first it adds nothing."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.GroupNorm(1, channels)
        self.first = nn.Conv2d(channels, channels, 3, dilation=dilation)
        self.second = nn.Conv2d(channels, channels, 3)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.first(padded(self.norm(x), self.dilation)))
        return x + self.second(padded(wide))


class Emulator(nn.Module):
    """Makes a step of 12 hours of normalised states [batch, levels, latitude, longitude].

    It works on patches of 2 x 2 points, and knows the sine and the cosine of each latitude. mean: [levels, latitude,
    longitude] and deviation: [levels] of the states to train on, in their units. latitudes: degrees. weights: of the
    latitudes in the loss, of mean 1. With 3 levels it has 127,412 parameters.
    """

    def __init__(self, mean: Any, deviation: Any, latitudes: Any, weights: Any) -> None:
        super().__init__()
        levels, _, longitudes = np.shape(mean)
        angles = torch.deg2rad(torch.tensor(latitudes, dtype=torch.float64))
        place = torch.stack([angles.sin(), angles.cos()]).float()[None, :, :, None].expand(-1, -1, -1, longitudes)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32)[:, None, None])
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32)[:, None])
        self.register_buffer("place", F.pixel_unshuffle(place, 2).contiguous())
        self.enter = nn.Conv2d(4 * levels + 8, CHANNELS, 3)
        self.blocks = nn.ModuleList([Block(CHANNELS, dilation) for dilation in DILATIONS])
        self.leave = nn.Conv2d(CHANNELS, 4 * levels, 3)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.cat([F.pixel_unshuffle(x, 2), self.place.expand(len(x), -1, -1, -1)], dim=1)
        hidden = self.enter(padded(patches))
        for block in self.blocks:
            hidden = block(hidden)
        return x + F.pixel_shuffle(self.leave(padded(hidden)), 2)

    def normalised(self, states: Tensor) -> Tensor:
        """Return states [..., levels, latitude, longitude] without their mean, in standard deviations of each level."""
        return (states - self.mean) / self.deviation

    def physical(self, normalised: Tensor) -> Tensor:
        """Return normalised states in their units."""
        return normalised * self.deviation + self.mean


def loss(model: Emulator, windows: Tensor) -> Tensor:
    """The mean squared error of normalised states, weighted by the areas of latitudes, over all steps of a window.

    windows: [batch, steps + 1, levels, latitude, longitude] in the states' units. Each step begins with the result of
    the step before.
    """
    truth = model.normalised(windows)
    state, total = truth[:, 0], truth.new_zeros(())
    for step in range(1, truth.shape[1]):
        state = model(state)
        total = total + (model.weights * (state - truth[:, step]).square()).mean()
    return total / (truth.shape[1] - 1)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate rises for some steps, then falls linearly to a hundredth."""
    warm_up = min(WARM_UP_STEPS, steps // 4 + 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * max(0.01, 1 - step / steps)
    )


def recipe(model: Any, data: Any, held_out: Any, *, steps: int, start: str | None = None, seed: int = 0) -> mh.Recipe:
    """Return the recipe of a stage. data, held_out: windows of states. start: the run of the stage before."""
    return mh.Recipe(
        model=model,
        weights=start,
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(
            params, lr=ROLLOUT_LEARNING_RATE if start else LEARNING_RATE, weight_decay=1e-3
        ),
        schedule=partial(falling, steps=steps),
        data=data,
        batch=BATCH,
        clip_norm=1.0,
        validation=mh.Validation(data=held_out, every=f"{max(1, steps // 4)} steps", batch=16),
        seed=seed,
        name="weather-rollout" if start else "weather",
    )


def forecasts(network: Emulator, starts: NDArray[np.float32], steps: int) -> Iterator[NDArray[np.float32]]:
    """Yield the states [starts, levels, latitude, longitude] after 1, 2, ... steps, in the states' units."""
    with one_thread(), torch.no_grad():
        state = network.normalised(torch.from_numpy(starts))
        for _ in range(steps):
            state = network(state)
            yield network.physical(state).numpy()
