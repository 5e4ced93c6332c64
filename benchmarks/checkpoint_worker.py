"""One worker of checkpoint.py: trains a few steps, saves, continues, loads. Rank 0 prints one JSON line.

Kinds: manyhands-SHARDING; torch.save (rank 0 writes DDP's full state); dcp, dcp-async (torch.distributed.checkpoint of
FSDP2).
stall: how long a worker waits in a step. published: from the start until the checkpoint can be loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from measure import RandomTokens, batch_of, leave

LENGTH, STEPS, TIMES = 32, 2, 3


def timed(action: Callable[[], object]) -> float:
    """Run `action` on all workers. Return the seconds until all have completed it."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def ours(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    recipe = mh.Recipe(
        model=lambda: GPT(LENGTH, depth=options.depth),
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        data=RandomTokens(256, LENGTH),
        batch=mh.Batch(global_size=2, micro_size=1),
        precision="bf16",
    )
    found = []
    with mh.Engine(recipe, mh.Strategy(sharding=options.kind.partition("-")[2])) as engine:
        batches = engine.batches()
        for _ in range(STEPS):
            engine.step(next(batches))
        for _ in range(TIMES):
            engine.step(next(batches))
            engine.group.barrier("bench / control")
            began = time.perf_counter()
            engine.begin_save(folder, keep=1)
            stall = time.perf_counter() - began
            path = engine.finish_save()
            published = time.perf_counter() - began
            began = time.perf_counter()
            engine.load(path)
            found.append({"stall": stall, "published": published, "load": time.perf_counter() - began})
            batches = engine.batches()
    return found


def peers(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: nn.Module = GPT(LENGTH, depth=options.depth)
    if options.kind == "torch.save":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data, found = RandomTokens(256, LENGTH), []
    own = dist.new_group(backend="gloo")  # for the thread that saves: its calls must not mix with the steps'
    for step in range(STEPS + TIMES):
        model(batch_of(data, step, rank, world, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEPS:
            path = folder / str(step)
            save = save_whole if options.kind == "torch.save" else save_dcp
            found.append(save(model, optimizer, path, rank, own if options.kind.endswith("async") else None))
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
    return found


def save_whole(model: nn.Module, optimizer: Any, path: Path, rank: int, _: Any) -> dict[str, float]:
    """Save as most programs do: rank 0 writes the full state."""

    def save() -> None:
        if rank == 0:
            path.mkdir()
            with (path / "state.pt").open("wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

    def load() -> None:
        state = torch.load(path / "state.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    seconds = timed(save)
    return {"stall": seconds, "published": seconds, "load": timed(load)}


def save_dcp(model: nn.Module, optimizer: Any, path: Path, rank: int, background: Any) -> dict[str, float]:
    """Save with torch.distributed.checkpoint. background: the group of the thread that saves; None: no thread."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    def load() -> None:
        loaded = state()
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])

    began, running = time.perf_counter(), []
    if background is not None:
        stall = timed(lambda: running.append(dcp.async_save(state(), checkpoint_id=path, process_group=background)))
        running[0].result()
        dist.barrier()
    else:
        stall = timed(lambda: dcp.save(state(), checkpoint_id=path))
    return {"stall": stall, "published": time.perf_counter() - began, "load": timed(load)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("folder")
    parser.add_argument("--depth", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make = ours if options.kind.startswith("manyhands") else peers
    found = make(options, Path(options.folder))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"kind": options.kind, "times": found}), flush=True)
    leave()


if __name__ == "__main__":
    main()
