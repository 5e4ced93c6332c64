"""Runs with islands: a recipe with dropout and batch norm, and clusters that meet in a folder."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import manyhands as mh

STEPS = 14

CASES: dict[str, dict[str, Any]] = {
    "momentum and delay": {
        "count": 3,
        "every": 4,
        "outer": "nesterov",
        "momentum_from": 4,
        "delay": 2,
    },
    "two bits, reset": {"count": 3, "every": {0: 3, 6: 4}, "bits": 2, "inner_state": "reset", "compress": True},
    "averaging": {"count": 2, "every": 5, "bits": 32, "outer": "averaging"},
    "warm steps": {"count": 2, "every": 3, "bits": 8, "warm_steps": 4, "momentum_from": 7},
    "exact momentum": {"count": 2, "every": 3, "bits": 32, "momentum_from": 0, "delay": 1},
}


def recipe(islands: mh.Islands | None, **changes: Any) -> mh.Recipe:
    """A small model whose parameters have more than one block of the codec, and sizes that are no multiple of it."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(256, 10, generator=generator), torch.randint(0, 5, (256,), generator=generator))
    options: dict[str, Any] = {
        "model": _model,
        "loss": loss,
        "optimizer": _adamw,
        "data": data,
        "batch": mh.Batch(global_size=8, micro_size=4),
        "seed": 3,
    }
    return mh.Recipe(**options | changes, islands=islands)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 130), nn.BatchNorm1d(130), nn.ReLU(), nn.Dropout(0.1), nn.Linear(130, 5))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs = batch[0].to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(inputs), batch[1])


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def muon_and_adamw(params: Any) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest."""
    matrices = [(name, param) for name, param in params if param.ndim == 2]
    others = [(name, param) for name, param in params if param.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-2)]


def digest_of(
    options_of_islands: dict[str, Any] | None,
    run_dir: str | Path | None = None,
    sharding: str = "zero2",
    steps: int = STEPS,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """Train, and return the digest at the end."""
    given = None if options_of_islands is None else mh.Islands(**options_of_islands)
    strategy = mh.Strategy(sharding=sharding, islands_state_every=2, islands_lost_after=3)
    found = mh.train(
        recipe(given, **changes or {}), steps=steps, run_dir=run_dir, strategy=strategy, show=False, **options
    )
    return found.digest


def of_clusters(folder: Path, islands: dict[str, Any], *clusters: dict[str, Any]) -> list[str]:
    """Run several clusters at once, each in a process of its own, and return their digests.

    clusters: workers, and arguments of `digest_of`.
    """
    with ProcessPoolExecutor(len(clusters), mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(_cluster, folder, number, islands, options) for number, options in enumerate(clusters)]
        return [run.result() for run in runs]


def _cluster(folder: Path, number: int, islands: dict[str, Any], given: dict[str, Any]) -> str:
    options = {"islands_at": str(folder / "store"), **given}
    workers = options.pop("workers", 1)
    found: list[str] = mh.launch(digest_of, islands, folder / f"cluster-{number}", workers=workers, **options)
    return found[0]


def digests_of_cases(sharding: str) -> dict[str, str]:
    """The digests of all cases that need no run directory."""
    return {name: digest_of(case, sharding=sharding) for name, case in CASES.items() if "warm_steps" not in case}


if __name__ == "__main__":
    digest_of(CASES[sys.argv[1]], sys.argv[2])
