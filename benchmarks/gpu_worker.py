"""One contender of gpu.py, in one process; prints one JSON line.

plain: PyTorch with the deterministic kernels that Manyhands uses. plain-any-kernels: with its default kernels.
manyhands-SHARDING-OFFLOAD. deepspeed-offload: ZeRO-2 with the optimizer on the host (its fused Adam for CPUs).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from measure import RandomTokens, batch_of, leave

HEAD = 64
WARM_UP = 2
Step = Callable[[int], object]


def plain(options: argparse.Namespace, data: RandomTokens) -> tuple[Step, nn.Module]:
    """The arithmetic of a bf16 recipe: bf16 parameters, fp32 master weights."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.kind == "plain")
    model = _model(options)
    masters = [nn.Parameter(param.detach().clone()) for param in model.to(options.device).parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    params = list(model.to(torch.bfloat16).parameters())

    def step(number: int) -> None:
        model(batch_of(data, number, 0, 1, options.batch).to(options.device)).backward()
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad.float()
            param.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)

    return step, model


def deepspeed(options: argparse.Namespace, data: RandomTokens) -> tuple[Step, nn.Module]:
    import deepspeed as library

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    model = _model(options)
    engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(number: int) -> None:
        engine.backward(engine(batch_of(data, number, 0, 1, options.batch).to(options.device)))
        engine.step()

    return step, model


def ours(options: argparse.Namespace, data: RandomTokens) -> tuple[Step, mh.Engine]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    recipe = mh.Recipe(
        model=lambda: _model(options),
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        data=data,
        batch=mh.Batch(global_size=options.batch, micro_size=options.batch),
        precision="bf16",
        device=options.device,
        threads_per_worker=options.threads,
    )
    _, stage, offload = options.kind.split("-")
    engine = mh.Engine(recipe, mh.Strategy(sharding=stage, offload=offload, scratch=tempfile.gettempdir()))
    batches = engine.batches()
    return lambda number: engine.step(next(batches)), engine


def _model(options: argparse.Namespace) -> nn.Module:
    return GPT(options.length, options.width, options.depth, max(1, options.width // HEAD))


def seconds_of(step: Step, number: int, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(number)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def busy_part(step: Step, number: int) -> float:
    """The part of a step in which the GPU does anything (kernels that overlap are counted once)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = seconds_of(step, number, on_gpu=True)
    times = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0.0, 0.0
    for start, end in times:  # microseconds
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("--device", default="cuda")
    for name in ("width", "depth", "length", "batch", "steps", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = RandomTokens(max(64, options.batch), options.length)
    make = {"plain": plain, "deepspeed": deepspeed}.get(options.kind.split("-")[0], ours)
    step, made = make(options, data)
    on_gpu = options.device == "cuda"
    seconds = [seconds_of(step, number, on_gpu) for number in range(options.steps + WARM_UP)][WARM_UP:]
    model = made.model if isinstance(made, mh.Engine) else made
    record: dict[str, Any] = {
        "kind": options.kind,
        "parameters": sum(param.numel() for param in model.parameters()),
        "step_ms": statistics.median(seconds) * 1e3,
    }
    if on_gpu:
        record["busy"] = busy_part(step, options.steps + WARM_UP)
        record["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if isinstance(made, mh.Engine):
        record["digest"] = made.digest()
    print(json.dumps(record), flush=True)
    leave()


if __name__ == "__main__":
    main()
