"""One worker of recovery.py: trains a GPT, records every step, and resumes where an earlier one was killed.

python benchmarks/recovery_worker.py KIND FOLDER STEPS EVERY
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from measure import RandomTokens, batch_of

LENGTH, BATCH = 64, 4
WIDTH, DEPTH, HEADS = 256, 4, 4


def model_of() -> GPT:
    """7.4 M parameters."""
    return GPT(LENGTH, WIDTH, DEPTH, HEADS)


def train_ddp(folder: Path, steps: int, every: int) -> str:
    """As in PyTorch's tutorial on fault tolerance: rank 0 writes a file, and all workers start from it."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(model_of())
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), 0
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    data = RandomTokens(4096, LENGTH)
    for step in range(first, steps):
        optimizer.zero_grad()
        model(batch_of(data, step, rank, world, BATCH)).backward()
        optimizer.step()
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(f"{step + 1}\n")
            if (step + 1) % every == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
    digest = mh.digest_of_tensors(list(model.module.named_parameters()))
    dist.destroy_process_group()
    return digest


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss, which the GPT computes itself."""
    loss: Tensor = model(tokens)
    return loss


def train_ours(folder: Path, steps: int, every: int) -> str:
    """mh.train, which resumes by itself."""
    recipe = mh.Recipe(
        model=model_of,
        loss=loss_of,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        data=RandomTokens(4096, LENGTH),
        batch=mh.Batch(global_size=2 * BATCH, micro_size=BATCH),
    )
    summary = mh.train(
        recipe,
        steps=steps,
        strategy=mh.Strategy(sharding="zero2"),
        run_dir=folder / "run",
        checkpoint_every=every,
        show=False,
    )
    return summary.digest


def main() -> None:
    kind, folder, steps, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if kind != "manyhands":
        os.environ.pop("MANYHANDS_SNAPSHOT_MEMORY", None)
    digest = train_ddp(folder, steps, every) if kind.startswith("ddp") else train_ours(folder, steps, every)
    if os.environ["RANK"] == "0":
        (folder / "digest.json").write_text(json.dumps(digest))


if __name__ == "__main__":
    main()
