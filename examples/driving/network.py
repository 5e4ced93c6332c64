"""The network that drives: a picture and the car's motion go in, steering and pedal come out.

After M. Bojarski et al., "End to End Learning for Self-Driving Cars", 2016 (PilotNet): convolutions, then fully
connected layers. Here the pictures are smaller, and speed and yaw rate are inputs, too: one picture doesn't show how
fast the car is.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import manyhands as mh

SPEED_SCALE, YAW_SCALE = 100.0, 3.0
"""The speed in m/s and the yaw rate in rad/s that the network sees as 1."""


class DrivingNetwork(nn.Module):
    """Picture, speed and yaw rate to steering and pedal: 160,096 parameters.

    pictures: [batch, 42, 48] uint8, grey. motion: [batch, 2] fp32: speed in m/s and yaw rate in rad/s. Returns
    [batch, 2] fp32: steering from -1 (left) to 1 (right), and pedal from -1 (brake) to 1 (gas), not clipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(
            *(nn.Conv2d(1, 24, 5, stride=2), nn.ReLU()),
            *(nn.Conv2d(24, 36, 5, stride=2), nn.ReLU()),
            *(nn.Conv2d(36, 48, 3), nn.ReLU()),
            *(nn.Conv2d(48, 48, 3), nn.ReLU()),
            nn.Flatten(),
        )
        self.hand = nn.Sequential(
            *(nn.Linear(48 * 4 * 5 + 2, 100), nn.ReLU()),
            *(nn.Linear(100, 50), nn.ReLU()),
            nn.Linear(50, 2),
        )

    def forward(self, pictures: Tensor, motion: Tensor) -> Tensor:
        seen = self.eye((pictures[:, None].float() - 128) / 64)
        return self.hand(torch.cat([seen, motion / torch.tensor([SPEED_SCALE, YAW_SCALE])], dim=1))


class Driver:
    """Drives with the weights of a network, and knows only what the network sees.

    weights: the parameters of a `DrivingNetwork`, by name. They are arrays of numpy, because a driver is part of a data
    job: a driver with other weights is another job.
    """

    def __init__(self, weights: dict[str, NDArray[np.float32]]) -> None:
        self.weights = weights

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights}

    @property
    def digest(self) -> str:
        """The digest of the weights, which is that of the run that trained them."""
        return mh.digest_of_tensors((name, torch.from_numpy(value)) for name, value in self.weights.items())

    @cached_property
    def network(self) -> DrivingNetwork:
        """The network, in memory that torch has aligned, and with one thread: the bits of products depend on both."""
        torch.set_num_threads(1)
        network = DrivingNetwork().eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(self.weights[name]))
        return network

    def __call__(self, picture: NDArray[np.uint8], speed: float, yaw_rate: float) -> tuple[float, float]:
        """Return (steering, pedal), as `Car.act` takes them. Raises NumericsError if they are not finite."""
        pictures = torch.empty((1, *picture.shape), dtype=torch.uint8).copy_(torch.from_numpy(picture[None]))
        motion = torch.tensor([[speed, yaw_rate]], dtype=torch.float32)
        steering, pedal = self.network(pictures, motion)[0].tolist()
        if not (math.isfinite(steering) and math.isfinite(pedal)):
            raise mh.NumericsError("the network's action is not finite", got=f"({steering}, {pedal})")
        return min(1.0, max(-1.0, steering)), min(1.0, max(-1.0, pedal))
