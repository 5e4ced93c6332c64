"""Train the 69.4 M GPT for a few steps with Manyhands: the same model, batch and measurement as the peers.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 benchmarks/ours.py --precision bf16

Rank 0 prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from measure import WARM_UP, Measured, PeakPss, RandomTokens, argument_parser, leave, report


def recipe_of(options: argparse.Namespace, workers: int) -> mh.Recipe:
    """The peers' work as a recipe: every worker computes one micro-batch of `--batch` samples a step."""
    size = workers * options.batch

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    return mh.Recipe(
        model=lambda: GPT(options.length),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        data=RandomTokens(max(1024, size), options.length),
        batch=mh.Batch(global_size=size, micro_size=options.batch),
        precision=options.precision,
        name="bench",
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--stage", default="zero2")
    parser.add_argument("--group", default="auto")
    options = parser.parse_args()
    workers, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    engine = mh.Engine(recipe_of(options, workers), mh.Strategy(stage=options.stage, group=options.group))
    batches = iter(engine.batches())
    seconds = []
    for _ in range(options.steps + WARM_UP):
        batch = next(batches)
        # A step ends when this worker has everyone's new parameters: as long as a peer's step between two barriers.
        began = time.perf_counter()
        engine.step(batch)
        seconds.append(time.perf_counter() - began)
    batch = next(batches)
    with PeakPss() as peak:
        loss = engine.step(batch).loss
    if rank == 0:
        kind = f"manyhands-{options.stage}"
        report(options, Measured(kind=kind, workers=workers, seconds=seconds, peak_pss_mib=peak.mib, loss=loss))
    engine.close()
    leave()


if __name__ == "__main__":
    main()
