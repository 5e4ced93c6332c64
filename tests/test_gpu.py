"""On a GPU: the same promises, by the same code (NCCL between several). Skipped without one."""

from __future__ import annotations

import pytest
import torch

import manyhands as mh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def digest(stage: str, precision: str, steps: int = 3) -> str:
    recipe = mh.Recipe(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)),
        loss=lambda model, batch: model(batch).float().square().mean(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        data=[torch.randn(64, generator=torch.Generator().manual_seed(index)) for index in range(64)],
        batch=mh.Batch(global_size=16, micro_size=2, virtual_workers=4),
        precision=precision,
        device="cuda",
        clip_norm=1.0,
    )
    with mh.Engine(recipe, mh.Strategy(stage=stage)) as engine:
        for batch in engine.batches(steps):
            engine.step(batch)
        return engine.digest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_give_the_same_bits_twice(precision: str) -> None:
    digests = {digest(stage, precision) for stage in ("ddp", "zero1", "zero2") for _ in range(2)}
    assert len(digests) == 1
