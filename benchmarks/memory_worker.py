"""One worker of memory.py: trains a GPT for a few steps in one case after the other, and reports its phase, so that its
memory can be read meanwhile.

    python -m torch.distributed.run --nproc-per-node W benchmarks/memory_worker.py CGROUP DEPTH CASES

CGROUP: a folder of the memory controller, which the worker joins. CASES: JSON, [{"sharding": "zero2", ...}, ...].
Prints JSON lines: every worker before it creates an engine, and rank 0 at the end of each phase.
With sharding "none" it runs only forward and backward in plain PyTorch, to measure activations.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is loaded, because its memory counts, too
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))

import torch
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.offload.process_memory import keep_freed_memory, return_freed_memory
from measure import RandomTokens

BATCH = mh.Batch(global_size=4, micro_size=1)
STEPS = 2
WIDTH, HEADS, LENGTH = 768, 12, 4


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss, which the GPT computes itself."""
    loss: Tensor = model(tokens)
    return loss


def adamw(params: Any) -> torch.optim.Optimizer:
    """Fused AdamW, which takes no temporary memory."""
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def recipe_of(precision: str, *shape: int) -> mh.Recipe:
    """The same for all cases of a precision."""
    return mh.Recipe(
        model=lambda: GPT(LENGTH, *shape),
        loss=loss_of,
        optimizer=adamw,
        data=RandomTokens(64, LENGTH),
        batch=BATCH,
        precision=precision,
    )


def tell(**what: object) -> None:
    """Print one JSON line in a single write: several workers write to one pipe."""
    os.write(1, (json.dumps(what) + "\n").encode())


def train(given: dict[str, Any], *shape: int) -> None:
    """Train for STEPS steps with the engine."""
    strategy = mh.Strategy(**{name: given[name] for name in ("sharding", "offload", "transport", "scratch")})
    with mh.Engine(recipe_of(given["precision"], *shape), strategy) as engine:

        def all_ended(phase: str) -> None:
            engine.group.barrier("memory / control")
            if engine.group.rank == 0:
                tell(case=given["name"], ended=phase)

        all_ended("start")
        for batch in engine.batches(STEPS):
            engine.step(batch)
        all_ended("steps")


def compute_alone(given: dict[str, Any], *shape: int) -> None:
    """Forward and backward of one micro-batch at a time; gradients are dropped as they arrive."""
    if given["offload"] == "disk":  # as the engine does with this offload
        keep_freed_memory(large=False)
    torch.set_num_threads(1)
    model = GPT(LENGTH, *shape)
    model.to(torch.bfloat16 if given["precision"] == "bf16" else torch.float32)

    def drop(param: Tensor) -> None:
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(drop)
    data = RandomTokens(64, LENGTH)
    for step in range(1 + STEPS * BATCH.micro_batches):
        if step == 1:  # by now torch has allocated its kernels' own memory
            return_freed_memory()
            tell(case=given["name"], ended="nothing yet")
            tell(case=given["name"], ended="start")
        with bf16_products_in_fp32():  # as the engine does on CPUs without bf16 instructions
            loss_of(model, data[step][None]).backward()  # type: ignore[no-untyped-call]
    tell(case=given["name"], ended="steps")


def main() -> None:
    depth, several = int(sys.argv[2]), json.loads(sys.argv[3])
    for number, given in enumerate(several):
        if given["sharding"] == "none":
            compute_alone(given, WIDTH, depth, HEADS)
            continue
        if number == 0:  # first a tiny model, so that torch has loaded what it loads at its first use
            for precision in ("fp32", "bf16"):
                train({**given, "precision": precision, "name": ""}, 64, 2, 1)
        gc.collect()
        return_freed_memory()
        tell(case=given["name"], ended="nothing yet")
        train(given, WIDTH, depth, HEADS)


if __name__ == "__main__":
    main()
