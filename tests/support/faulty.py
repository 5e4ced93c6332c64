"""A tiny training run in which worker 1 misbehaves at a chosen moment: as a recipe's module, and as a script.

FAULT is "KIND PLACE", such as "kill exchange"; empty: none. "kill-once exchange": only the first time. The other words
of the environment are the script's own.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

if "RANK" in os.environ:
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # not there: a worker starts a second sooner
STEP, RANK = 2, 1
MICRO_BATCHES_A_WORKER = 2  # in a step: 4 micro-batches, 2 workers
losses_computed = 0


def misbehave(place: str) -> None:
    """If this is the worker, the step and the place: tell the test when, and go wrong."""
    kind, _, where = os.environ.get("FAULT", "").partition(" ")
    step = (losses_computed - 1) // MICRO_BATCHES_A_WORKER
    if int(os.environ.get("RANK", "0")) != RANK or step != STEP or place != where:
        return
    kind, _, once = kind.partition("-")
    if once and os.path.exists(os.environ["FAULT_TIME"]):
        return
    with open(os.environ["FAULT_TIME"], "w") as file:
        file.write(repr(time.time()))
    if kind == "raise":
        raise RuntimeError("out of cheese")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    oversleep()


def oversleep() -> None:
    """Its name is looked for in the stack that the others show."""
    time.sleep(600)


class _InBackward(torch.autograd.Function):
    """The identity; its backward runs when the units above it have been sent and those below haven't."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        misbehave("exchange")
        return grad


class Model(nn.Module):
    """Four layers in a list: four units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(_InBackward.apply(x) if index == 2 else x))
        return x


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    global losses_computed
    losses_computed += 1
    misbehave("forward")
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return model(batch).square().mean()


class Descent(torch.optim.Optimizer):
    """Plain gradient descent, with a fault."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)  # doesn't import torch.compile's machinery

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        misbehave("update")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])


def optimizer(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return Descent(params, lr=lr)


class Data(torch.utils.data.Dataset[Tensor]):
    """64 samples [8]."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(8, dtype=torch.float32).add(index).sin()


def main() -> None:
    """The script: `train` or one's own loop, as the first argument says; the second is the group."""
    import manyhands as mh

    recipe = mh.Recipe(
        model=Model,
        loss=loss,
        optimizer=optimizer,
        optimizer_kind="elementwise",
        data=Data(),
        batch=mh.Batch(global_size=8, micro_size=2),
    )
    units = tuple(f"layers.{index}" for index in range(4))
    strategy = mh.Strategy(group=sys.argv[2], stall_seconds=2, units=units)
    if sys.argv[1] == "train":
        mh.train(recipe, steps=5, strategy=strategy, show=False)
        return
    engine = mh.Engine(recipe, strategy)
    for batch in engine.batches(5):
        engine.step(batch)
    engine.close()


if __name__ == "__main__":
    main()
