"""One worker of limit.py: joins its control group before it loads anything, then trains a GPT for a few steps.

    python -m torch.distributed.run --nproc-per-node W benchmarks/limited.py KIND CGROUP --depth D

KIND: plain (one process), ddp, or manyhands-SHARDING-OFFLOAD. CGROUP: a folder of the memory controller; worker R joins
CGROUP/R. Rank 0 prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

if sys.argv[2] != "none":  # before torch is loaded, because its memory counts, too
    (Path(sys.argv[2]) / os.environ.get("RANK", "0") / "cgroup.procs").write_text(str(os.getpid()))

import torch
import torch.distributed as dist
from torch import nn

import manyhands as mh
from gpt import GPT
from measure import RandomTokens, batch_of, leave

WIDTH, HEADS = 1280, 20


def peers(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Plain PyTorch in one process, or its DistributedDataParallel."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: nn.Module = GPT(options.length, WIDTH, options.depth, HEADS)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data, seconds = RandomTokens(64, options.length), []
    for step in range(options.steps):
        began = time.perf_counter()
        loss = model(batch_of(data, step, rank, world, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"loss": float(loss.detach()), "seconds": seconds, "rank": rank}


def ours(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Manyhands: the same model and the same number of samples per step, for any number of workers."""
    _, sharding, offload = kind.split("-")

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)

    recipe = mh.Recipe(
        model=lambda: GPT(options.length, WIDTH, options.depth, HEADS),
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        data=RandomTokens(64, options.length),
        batch=mh.Batch(global_size=2, micro_size=1),
    )
    seconds = []
    with mh.Engine(recipe, mh.Strategy(sharding=sharding, offload=offload, scratch=options.scratch)) as engine:
        for batch in engine.batches(options.steps):
            began = time.perf_counter()
            metrics = engine.step(batch)
            seconds.append(time.perf_counter() - began)
        return {"loss": metrics.loss, "seconds": seconds, "rank": engine.group.rank, "digest": engine.digest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("cgroup")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scratch", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = ours(options.kind, options) if options.kind.startswith("manyhands") else peers(options.kind, options)
    if result.pop("rank") == 0:
        print(json.dumps({"kind": options.kind, **result}), flush=True)
    if not options.kind.startswith("manyhands"):
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
