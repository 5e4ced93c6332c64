"""Libraries that look for torch's default process group don't find ours, and a script may have a default group."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import manyhands as mh

SAMPLES = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Synchronizes(nn.Module):
    """What codebooks of vector quantizers, self-supervised losses and SyncBatchNorm do if they find a default group."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 8))
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        mean = x.detach().mean(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.centre.lerp_(mean, 0.1)
        return x - self.centre


def recipe_of(model: Callable[[], nn.Module]) -> mh.Recipe:
    return mh.Recipe(
        model=model,
        loss=lambda model, batch: model(batch[0]).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=torch.utils.data.TensorDataset(SAMPLES),
        batch=mh.Batch(global_size=12, micro_size=4),
        buffers={} if model is not Synchronizes else {"centre": "mean"},
    )


def train(model: Callable[[], nn.Module], strategy: mh.Strategy, after_step: Callable[[], object] = int) -> str:
    with mh.Engine(recipe_of(model), strategy) as engine:
        for batch in engine.batches(3):
            engine.step(batch)
            after_step()
        return engine.digest()


def work(folder: str) -> dict[str, object]:
    """Train without a default group of the script, then with one that ends in the middle of the run."""
    distributed = partial(mh.Strategy, transport="distributed")
    found: dict[str, object] = {
        sharding: train(Synchronizes, distributed(sharding=sharding)) for sharding in ("ddp", "zero3")
    }
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)

    def add_and_leave() -> None:
        if dist.is_initialized():
            total = torch.ones(1)
            dist.all_reduce(total)
            found["the script's sum"] = float(total)
            dist.destroy_process_group()

    found["beside a group"] = train(partial(nn.Linear, 8, 8), distributed(), add_and_leave)
    return found


def test_a_script_and_an_engine_have_groups_of_their_own(tmp_path: Path) -> None:
    synchronizing = train(Synchronizes, mh.Strategy())
    expected = {
        "ddp": synchronizing,
        "zero3": synchronizing,
        "beside a group": train(partial(nn.Linear, 8, 8), mh.Strategy()),
        "the script's sum": 2.0,
    }
    assert mh.launch(work, str(tmp_path), workers=2) == [expected] * 2
