"""More than one CPU thread in a worker changes the recipe's bits, but they still don't depend on the workers.

torch cuts long tensors among its threads; a shard's length must not show in the result. Tensors here are longer than
the length from which it does (32,768 elements).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from support.threads import run_threads

SAMPLES = [torch.randn(300, generator=torch.Generator().manual_seed(index)) for index in range(24)]


@pytest.fixture(autouse=True)
def _thread_count_is_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.bfloat16()).float().square().mean()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "plain": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_two_threads_per_worker_give_the_same_bits_with_any_number_of_workers(optimizer: str) -> None:
    recipe = mh.Recipe(
        model=lambda: nn.Sequential(nn.Linear(300, 701), nn.GELU(), nn.Linear(701, 300)),
        loss=loss,
        optimizer=OPTIMIZERS[optimizer],
        data=SAMPLES,
        batch=mh.Batch(global_size=24, micro_size=4),
        threads_per_worker=2,
        precision="bf16",
        clip_norm=1.0,
    )

    def work(group: Any) -> str:
        with mh.Engine(recipe, group=group) as engine:
            for batch in engine.batches(3):
                engine.step(batch)
            return engine.digest()

    digests = {digest for workers in (1, 2, 3, 5) for digest in run_threads(workers, work)}
    assert len(digests) == 1
