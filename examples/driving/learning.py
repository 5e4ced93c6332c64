"""Learns to drive by imitation: gathered observations as data, and the recipe that trains a network on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from network import Driver, DrivingNetwork
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

import manyhands as mh

STEPS = 4000
BATCH = mh.Batch(global_size=64, micro_size=16)
"""Four micro-batches, so up to four workers share a step."""
STEERING_WEIGHT = 4.0
"""The weight of the squared error of the steering in the loss; that of the pedal has weight 1."""
MIRRORED_MOTION, MIRRORED_ACTION = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])
"""In a mirror, the car turns and steers to the other side. Its speed and its pedal are the same."""


class Observations(Dataset[dict[str, Tensor]]):
    """Gathered observations. Item i is a dict: picture [42, 48] uint8; motion and action [2] fp32.

    parts: the files, one after the other. mirror: half of the items, chosen by torch's generator, are mirrored: left is
    right. The generator is seeded for each micro-batch, so an item is a function of the recipe's seed, the step and its
    place in the step.
    """

    def __init__(self, parts: Sequence[mh.ArrayFile], mirror: bool = False) -> None:
        self.dataset, self.mirror = ConcatDataset(parts), mirror

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        if self.mirror and torch.rand(()) < 0.5:
            item["picture"] = item["picture"].flip(1)
            item["motion"] = item["motion"] * MIRRORED_MOTION
            item["action"] = item["action"] * MIRRORED_ACTION
        return item


def divided(folders: Sequence[str], share: float) -> tuple[Observations, Observations]:
    """Return the observations to learn from, which are mirrored at random, and those that are held out.

    share: the share of the episodes in the first folder to learn from. Observations must not be divided, but episodes:
    a picture is almost the same as the next one. The driver learns from all episodes in the other folders.
    """
    parts = [mh.ArrayFile(folder, ("picture", "motion", "action"), group="episode") for folder in folders]
    for part in parts:
        part.verify()
    data, held_out = parts[0].split(share=share)
    return Observations([data, *parts[1:]], mirror=True), Observations([held_out])


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The weighted mean squared error of steering and pedal."""
    errors = model(batch["picture"], batch["motion"]) - batch["action"]
    return (errors.square() * torch.tensor([STEERING_WEIGHT, 1.0])).sum(dim=1).mean()


def absolute_error(column: int, output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """A metric: the mean absolute error of the steering (column 0) or the pedal (column 1)."""
    errors = (output - batch["action"])[:, column].abs()
    return errors.sum(), len(errors)


def linear_to_zero(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate falls linearly to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def recipe(data: Any, held_out: Any, *, steps: int = STEPS, seed: int = 0) -> mh.Recipe:
    """Return the recipe. data, held_out: data sets of observations."""
    metrics = {name: partial(absolute_error, column) for column, name in enumerate(("steering_error", "pedal_error"))}
    return mh.Recipe(
        model=DrivingNetwork,
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-3),
        schedule=partial(linear_to_zero, steps=steps),
        data=data,
        batch=BATCH,
        validation=mh.Validation(data=held_out, metrics=metrics, every=f"{max(1, steps // 8)} steps", batch=64),
        seed=seed,
        name="driving",
    )


def train_on(folders: Sequence[str], share: float, steps: int, seed: int, run_dir: str) -> str:
    """Train on the episodes that are not held out. Collective. Return the digest of the weights."""
    used = recipe(*divided(folders, share), steps=steps, seed=seed)
    return mh.train(used, steps=steps, run_dir=run_dir, checkpoint_every="20s").digest


def load_driver(run_dir: str) -> Driver:
    """Return the driver that a run has trained."""
    network = mh.load_model(run_dir, DrivingNetwork)
    return Driver({name: parameter.detach().numpy().copy() for name, parameter in network.named_parameters()})
