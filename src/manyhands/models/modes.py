"""Training and evaluation modes of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def ensure_evaluation_mode(model: nn.Module) -> None:
    """Set all modules to evaluation mode, unless they are already."""
    if any(module.training for module in model.modules()):
        model.eval()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode in a context. At its end, the mode of each module is restored."""
    before = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # also runs the `train` methods of the model, which may do more than set the mode
        for module, mode in before:
            module.training = mode
