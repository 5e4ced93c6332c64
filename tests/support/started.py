"""A user's script and a recipe's module: trains a small net and writes every worker's summary to a folder.

python started.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manyhands as mh


class Data(torch.utils.data.Dataset[Tensor]):
    """64 samples [8]."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(8, dtype=torch.float32).add(index).sin()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))


def loss(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - batch).square().mean()


def optimizer(params: Any, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr)


def sample(net: nn.Module) -> str:
    return f"{float(net(torch.ones(8)).sum().detach()):.3f}"


def main(folder: Path) -> None:
    recipe = mh.Recipe(
        model=model,
        loss=loss,
        optimizer=optimizer,
        data=Data(),
        batch=mh.Batch(global_size=8, micro_size=2),
        sample=sample,
        name="started",
    )
    summary = mh.train(recipe, steps=6, run_dir=folder / "run", show=False)
    (folder / f"worker-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
