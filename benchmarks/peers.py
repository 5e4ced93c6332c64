"""Train the 69.4 M GPT for a few steps with another library.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 benchmarks/peers.py ddp --precision bf16

single: one process, nothing to communicate, torch.autocast as for the others; single-bf16: the same, with parameters
and gradients in bf16 and fp32 master weights, the arithmetic of Manyhands; ddp; ddp-bf16hook (gradients travel in
bf16); zero-redundancy (DDP + ZeroRedundancyOptimizer); fsdp2 (fully_shard); deepspeed-1, -2, -3. With the suffix
-our-products the peer computes bf16 products as Manyhands does: in fp32, on CPUs without bf16 instructions. This
compares what the two do apart from these products. Rank 0 prints one JSON line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt import GPT
from measure import WARM_UP, Measured, PeakPss, RandomTokens, Turns, argument_parser, batch_of, leave, pss_mib, report

KINDS = (
    "single",
    "single-bf16",
    "ddp",
    "ddp-bf16hook",
    "zero-redundancy",
    "fsdp2",
    "deepspeed-1",
    "deepspeed-2",
    "deepspeed-3",
)
OUR_PRODUCTS = "-our-products"
ADAMW: dict[str, Any] = {"lr": 1e-4, "fused": True}
Step = Callable[[Tensor], Tensor]


def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> Step:
    """Forward (under autocast for bf16), backward, update."""

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def single(model: GPT, options: argparse.Namespace) -> Step:
    return torch_step(model, torch.optim.AdamW(model.parameters(), **ADAMW), options.precision)


def single_bf16(model: GPT, options: argparse.Namespace) -> Step:
    masters = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, **ADAMW)
    model.to(torch.bfloat16)
    parameters = list(model.parameters())

    def step(tokens: Tensor) -> Tensor:
        loss = model(tokens)
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        return loss

    return step


def ddp(model: GPT, options: argparse.Namespace) -> Step:
    replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if options.kind == "ddp-bf16hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        replica.register_comm_hook(None, bf16_compress_hook)
    if options.kind == "zero-redundancy":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(replica.parameters(), torch.optim.AdamW, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(replica.parameters(), **ADAMW)
    return torch_step(replica, optimizer, options.precision)


def fsdp2(model: GPT, options: argparse.Namespace) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return torch_step(model, torch.optim.AdamW(model.parameters(), **ADAMW), options.precision)


def deepspeed(model: GPT, options: argparse.Namespace) -> Step:
    import deepspeed as library

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": int(options.kind[-1])},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": ADAMW["lr"], "torch_adam": True}},
        "bf16": {"enabled": options.precision == "bf16"},
    }
    engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(tokens: Tensor) -> Tensor:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def start(options: argparse.Namespace) -> Step:
    """Connect the workers and give the model to the contender."""
    if options.kind.startswith("deepspeed"):
        import deepspeed as library

        library.init_distributed("gloo")
        make = deepspeed
    else:
        dist.init_process_group("gloo")
        makers = {"single": single, "single-bf16": single_bf16, "fsdp2": fsdp2}
        make = makers.get(options.kind, ddp)
    torch.manual_seed(0)
    return make(GPT(options.length), options)


def our_products() -> AbstractContextManager[object]:
    """Manyhands's bf16 products. Imported only by contenders that use them, because memory is measured."""
    from manyhands.models.bf16_products import bf16_products_in_fp32

    return bf16_products_in_fp32()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("kind", choices=[*KINDS, *(kind + OUR_PRODUCTS for kind in KINDS)])
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.kind
    options.kind = name.removesuffix(OUR_PRODUCTS)
    products = nullcontext() if options.kind == name else our_products()
    step = start(options)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = RandomTokens(1024, options.length)
    seconds, turns = [], Turns()
    for number in range(options.steps + WARM_UP):
        tokens = batch_of(data, number, rank, world, options.batch)
        with turns.take():
            dist.barrier()
            began = time.perf_counter()
            with products:
                step(tokens)
            dist.barrier()
            seconds.append(time.perf_counter() - began)
    with turns.take(), PeakPss() as peak, products:
        loss = float(step(tokens).detach())
    if rank == 0:
        memory = {"peak_pss_mib": peak.mib, "rest_pss_mib": pss_mib()}
        report(options, Measured(kind=name, workers=world, seconds=seconds, loss=loss, **memory))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main()
