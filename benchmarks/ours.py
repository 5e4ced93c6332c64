"""Train the 69.4 M GPT for a few steps with Manyhands: the same model, batch and measurement as the peers.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 benchmarks/ours.py --precision bf16

Rank 0 prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import numpy as np
import torch
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from measure import WARM_UP, Measured, PeakPss, RandomTokens, Turns, argument_parser, leave, pss_mib, report

DIGEST_EVERY = 10  # the default of mh.train
TIMES = 10


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


def digest_seconds(engine: mh.Engine) -> float:
    """The seconds that a digest takes on this worker."""
    engine.group.barrier("bench / control")
    began = time.perf_counter()
    for _ in range(TIMES):
        engine.digest()
    return (time.perf_counter() - began) / TIMES


def record_seconds(engine: mh.Engine, metrics: mh.StepMetrics) -> float:
    """The seconds that a step's records take: metrics, TensorBoard if installed, and every 10th step the hashes."""
    from manyhands.listeners.run_directory import RunDirectory  # imported here, because a bare engine doesn't load them
    from manyhands.listeners.tensorboard import TensorBoardListener

    with tempfile.TemporaryDirectory() as folder:
        directory, board = RunDirectory(folder), TensorBoardListener(folder)
        board.began({"step": 0})
        began = time.perf_counter()
        for step in range(TIMES):
            directory.append_metrics(metrics)
            board.step(metrics, ())
            if step % DIGEST_EVERY == 0:
                np.save(directory.digests / f"step-{step}.npy", engine.last_hashes)
        seconds = (time.perf_counter() - began) / TIMES
        board.close()
        return seconds


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--sharding", default="zero2")
    parser.add_argument("--transport", default="auto")
    options = parser.parse_args()
    workers, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    engine = mh.Engine(recipe_of(options, workers), mh.Strategy(sharding=options.sharding, transport=options.transport))
    batches = iter(engine.batches())
    seconds, turns = [], Turns()
    for _ in range(options.steps + WARM_UP):
        batch = next(batches)
        with turns.take():
            # A step ends when this worker has all new parameters: the same span as a peer's between two barriers.
            began = time.perf_counter()
            engine.step(batch)
            seconds.append(time.perf_counter() - began)
    batch = next(batches)
    with turns.take():
        with PeakPss() as peak:
            metrics = engine.step(batch)
        at_rest = pss_mib()
        overhead = digest_seconds(engine) / DIGEST_EVERY + record_seconds(engine, metrics)
    if rank == 0:
        share = overhead / statistics.median(seconds[WARM_UP:])
        kind = f"manyhands-{options.sharding}" + ("" if options.transport == "auto" else f"-{options.transport}")
        report(
            options,
            Measured(
                kind=kind,
                workers=workers,
                seconds=seconds,
                peak_pss_mib=peak.mib,
                rest_pss_mib=at_rest,
                loss=metrics.loss,
                overhead=share,
            ),
        )
    engine.close()
    leave()


if __name__ == "__main__":
    main()
