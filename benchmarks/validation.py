"""What a validation costs beside the forward passes that it needs.

    .venv/bin/python benchmarks/validation.py [--rounds 9]

With one worker, in turns: the forward passes alone, as in a loop of plain PyTorch (eval mode, no gradients, the loss
and the number of right predictions added up), and `Engine.evaluate` on the same data with the metric accuracy. Prints
the medians and their ratio, for a GPT and for a convolutional network with batch norm.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import manyhands as mh
from gpt import Block


class Tokens(nn.Module):
    """Four blocks of a GPT of width 256, which return the scores of 1,024 tokens: [n, length, 1024]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(1024, 256), nn.Linear(256, 1024)
        self.blocks = nn.Sequential(*(Block(256, 4) for _ in range(4)))

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] int64 to scores."""
        scores: Tensor = self.head(self.blocks(self.tokens(tokens)))
        return scores


class Convolutions(nn.Sequential):
    """Six blocks of a convolution, batch norm and ReLU, on pictures [n, 3, 32, 32]."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for width, after in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)):
            blocks += [nn.Conv2d(width, after, 3, stride=2 if after > width else 1, padding=1)]
            blocks += [nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean cross entropy of the labels, whatever their shape."""
    scores = model(batch[0])
    return nn.functional.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def plain(model: nn.Module, data: TensorDataset, size: int) -> float:
    """A validation loop of plain PyTorch. Return the mean loss."""
    model.eval()
    total, right = 0.0, 0
    with torch.no_grad():
        for batch in DataLoader(data, batch_size=size):
            scores = model(batch[0])
            total += float(nn.functional.cross_entropy(scores.flatten(0, -2), batch[1].flatten())) * len(batch[0])
            right += int((scores.argmax(-1) == batch[1]).sum())
    model.train()
    return total / len(data)


def seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cases() -> list[tuple[str, Callable[[], nn.Module], TensorDataset, int]]:
    """Name, model, data and micro-batch of each case. Each validation has 64 micro-batches."""
    tokens = torch.randint(0, 1024, (256, 129), generator=torch.Generator().manual_seed(0))
    pictures = torch.randn(2048, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kinds = torch.randint(0, 10, (2048,), generator=torch.Generator().manual_seed(1))
    return [
        ("GPT", Tokens, TensorDataset(tokens[:, :-1], tokens[:, 1:]), 4),
        ("convolutions", Convolutions, TensorDataset(pictures, kinds), 32),
    ]


def main() -> None:
    """Measure all cases, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("model", "forward passes alone", "evaluate", "ratio of medians", "median of ratios")
    for name, model, data, size in cases():
        recipe = mh.Recipe(
            model=model,
            loss=cross_entropy,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            data=data,
            batch=mh.Batch(global_size=size, micro_size=size),
        )
        with mh.Engine(recipe) as engine:

            def ours(engine: mh.Engine = engine, data: Any = data, size: int = size) -> mh.Evaluation:
                return engine.evaluate(data, ["accuracy"], batch=size)

            expected, found = plain(engine.model, data, size), ours().loss
            if found is None or abs(found - expected) > 1e-5 * expected:
                raise SystemExit(f"{name}: the losses differ: {expected} and {found}")
            pairs = []
            for number in range(rounds):
                works = [lambda engine=engine, data=data, size=size: plain(engine.model, data, size), ours]
                if number % 2:
                    works.reverse()
                times = [seconds(work) for work in works]
                pairs.append(times[::-1] if number % 2 else times)
        alone, evaluated = (median(each) for each in zip(*pairs, strict=True))
        ratio = median(after / before for before, after in pairs)
        table.add_row(name, f"{alone:.3f} s", f"{evaluated:.3f} s", f"{evaluated / alone:.3f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
