"""torchvision's ResNet-18 on generated pictures of coloured shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import ResNet, resnet18

KINDS = 4  # a disc, a square, a cross, stripes


class Shapes(Dataset[tuple[Tensor, int]]):
    """Item i is a picture [3, size, size] of one shape on a noisy background, and the kind of the shape.

    The colour, position and size of the shape depend only on the index. No file is read. first: the number of the
    first picture, so that a validation has other pictures than the training.
    """

    def __init__(self, count: int = 4096, size: int = 32, first: int = 0) -> None:
        self.count, self.size, self.first = count, size, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"item {index} of {self.count}")
        generator = torch.Generator().manual_seed(self.first + index)
        kind = index % KINDS
        centre = self.size * (0.3 + 0.4 * torch.rand(2, generator=generator))
        radius = self.size * (0.15 + 0.1 * torch.rand((), generator=generator))
        steps = torch.arange(self.size, dtype=torch.float32)
        down, across = (steps - centre[0])[:, None].abs(), (steps - centre[1])[None, :].abs()
        square = (down < radius) & (across < radius)
        inside = (
            (down.square() + across.square()).sqrt() < radius,
            square,
            square & ((down < radius / 3) | (across < radius / 3)),
            square & (torch.arange(self.size) % 4 < 2),
        )[kind]
        colour = 0.5 + torch.rand(3, 1, 1, generator=generator)
        return colour * inside + 0.2 * torch.randn(3, self.size, self.size, generator=generator), kind


def model() -> ResNet:
    """ResNet-18 with new weights. The running statistics of its batch norms are means over a step's micro-batches."""
    return resnet18(num_classes=KINDS)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy (fp32) of the pictures, which are cast to the model's dtype."""
    pictures, kinds = batch
    return F.cross_entropy(model(pictures.to(model.conv1.weight.dtype)).float(), kinds)
