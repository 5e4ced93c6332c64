"""What a case of the zoo consists of, and data for the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

import manyhands as mh

Loss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Case:
    """One model. package: the distribution on PyPI; subject: what may go wrong with this model."""

    package: str
    model: str
    subject: str
    recipe: Callable[[], mh.Recipe]

    @property
    def name(self) -> str:
        return f"{self.package}/{self.model}"


CASES: dict[str, Case] = {}
"""All cases by name. The functions that `case` decorates are registered when their files are imported."""


def case(package: str, model: str) -> Callable[[Callable[[], mh.Recipe]], Callable[[], mh.Recipe]]:
    """Register a function that returns a recipe. It imports its package itself; its docstring is the subject."""

    def register(function: Callable[[], mh.Recipe]) -> Callable[[], mh.Recipe]:
        found = Case(package, model, " ".join((function.__doc__ or "").split()), function)
        if found.name in CASES:
            raise ValueError(f"two cases are named {found.name}")
        CASES[found.name] = found
        return function

    return register


class Samples(Dataset[Any]):
    """32 samples; `make` creates one from a generator that is seeded with its index."""

    def __init__(self, make: Callable[[Generator], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return self._make(torch.Generator().manual_seed(index))


def normal(*shape: int) -> Samples:
    """Samples of standard normal numbers."""
    return Samples(lambda generator: torch.randn(*shape, generator=generator))


def labelled(*shape: int, classes: int = 5) -> Samples:
    """Pairs of standard normal numbers and a label."""

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(*shape, generator=generator), integer(generator, classes)

    return Samples(make)


def tokens(length: int = 12, vocabulary: int = 97) -> Samples:
    """Sequences of token ids of at least 4."""
    return Samples(lambda generator: torch.randint(4, vocabulary, (length,), generator=generator))


def integer(generator: Generator, high: int) -> Tensor:
    """Return one number below `high`."""
    return torch.randint(high, (), generator=generator)


def adamw(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Weight decay reveals an update of a parameter without a gradient."""
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def recipe(model: Callable[[], nn.Module], loss: Loss, data: Any, **changes: Any) -> mh.Recipe:
    """8 samples a step in 4 micro-batches of 2, which can't be divided evenly among 3 workers."""
    fields = {"optimizer": adamw, "batch": mh.Batch(global_size=8, micro_size=2), "clip_norm": 1.0, "seed": 3}
    return mh.Recipe(model=model, loss=loss, data=data, **fields | changes)
