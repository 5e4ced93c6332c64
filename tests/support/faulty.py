"""A tiny training run in which workers misbehave at chosen moments: as a recipe's module, and as a script.

FAULT is "KIND PLACE COUNT RANK", such as "kill exchange 5 1": the worker of that rank goes wrong there once it has
computed COUNT losses (both may be left out: 5 1). Several are separated by ";"; empty: none. "kill-once exchange": only
the first time that a process comes there. KIND: raise, kill, terminate, stop, stall. PLACE: start, forward, exchange,
update, checkpoint, snapshot.
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

from manyhands.checkpoint import save, snapshot

if "RANK" in os.environ:
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # not there: a worker starts a second sooner
losses_computed = 0  # by this process


def misbehave(place: str) -> None:
    """If this is the worker, the moment and the place: tell the test when, and go wrong."""
    for number, fault in enumerate(filter(None, os.environ.get("FAULT", "").split(";"))):
        kind, where, count, rank = [*fault.split(), "5", "1"][:4]
        mine = int(os.environ.get("RANK", "0")) == int(rank)
        if not mine or where != place or losses_computed < int(count):
            continue
        kind, _, once = kind.partition("-")
        mark = f"{os.environ['FAULT_TIME']}-{number}"
        if once and os.path.exists(mark):
            continue
        for path in (mark, os.environ["FAULT_TIME"]):
            with open(path, "w") as file:
                file.write(repr(time.time()))
        go_wrong(kind)


def go_wrong(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("out of cheese")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        return  # it's asked to stop, and does after its step
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    oversleep()


def oversleep() -> None:
    """Its name is looked for in the stack that the others show."""
    time.sleep(600)


misbehave("start")


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
    """Gradient descent with momentum, and with a fault."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)  # doesn't import torch.compile's machinery

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        misbehave("update")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    param.sub_(momentum.mul_(0.9).add_(param.grad), alpha=group["lr"])


def write_pieces(*args: Any, whole: Any = save.write_pieces) -> Any:
    """The checkpoint's own, with a fault when this worker's file is written and nobody knows yet."""
    written = whole(*args)
    misbehave("checkpoint")
    return written


save.write_pieces = write_pieces  # type: ignore[assignment]


def write_snapshot(*args: Any, whole: Any = snapshot._write) -> Any:
    """The snapshot's own, with a fault between this worker's pieces and the record."""
    written = whole(*args)
    misbehave("snapshot")
    return written


snapshot._write = write_snapshot


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
    strategy = mh.Strategy(transport=sys.argv[2], stall_seconds=2, units=units)
    if sys.argv[1] == "train":
        mh.train(recipe, steps=5, strategy=strategy, show=False)
        return
    engine = mh.Engine(recipe, strategy)
    for batch in engine.batches(5):
        engine.step(batch)
    engine.close()


if __name__ == "__main__":
    main()
