"""A tiny training run in which workers fail at chosen moments: as a recipe's module, and as a script.

The variable FAULT is "KIND PLACE COUNT RANK", such as "kill backward 5 1": the worker of that rank fails there once it
has computed COUNT losses. COUNT and RANK are 5 and 1 by default. Several faults are separated by ";"; empty: none.
"kill-once backward": only the first time that a process gets there.

KIND: raise, kill, exit (with code 0), terminate, stop, stall, fill (the disk at $DISK), free (it again). PLACE: start,
load, forward, backward, update, checkpoint, snapshot. With the variable CHATTY, workers print a line for each loss.
STALL_SECONDS is the option of a script's strategy.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from full_disk import BALLAST, fill
from torch import Tensor, nn

from manyhands.checkpoint import save, snapshot

if "RANK" in os.environ:
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # not importable: saves a second of each worker's start-up
losses_computed = 0  # by this process


def misbehave(place: str) -> None:
    """Fail if a fault is due in this worker at this place; write the time for the test first."""
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
        fail(kind)


def fail(kind: str) -> None:
    if kind == "fill":
        fill(Path(os.environ["DISK"]))
        return
    if kind == "free":
        Path(os.environ["DISK"], BALLAST).unlink()
        return
    if kind == "raise":
        raise RuntimeError("out of cheese")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(0)
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        return  # a request to stop, which the worker follows after its step
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    oversleep()


def oversleep() -> None:
    """Sleep. Tests look for the name of this function in stacks."""
    time.sleep(600)


misbehave("start")


class _InBackward(torch.autograd.Function):
    """The identity. Its backward runs when gradients of the layers above have been sent, and those below have not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        misbehave("backward")
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
    if "CHATTY" in os.environ:
        sys.stdout.write(f"loss {losses_computed} →\n")
        sys.stdout.flush()
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return model(batch).square().mean()


class Descent(torch.optim.Optimizer):
    """Gradient descent with momentum, and with a fault."""

    add_param_group = inspect.unwrap(
        torch.optim.Optimizer.add_param_group
    )  # without the decorator, which imports the compiler

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


def write_pieces(*args: Any, original: Any = save.write_pieces) -> Any:
    """The original, with a fault after this worker's file is written and before that is announced."""
    written = original(*args)
    misbehave("checkpoint")
    return written


save.write_pieces = write_pieces  # type: ignore[assignment]


def write_snapshot(*args: Any, original: Any = snapshot._write) -> Any:
    """The original, with a fault between this worker's pieces and the record."""
    written = original(*args)
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
        misbehave("load")
        return torch.arange(8, dtype=torch.float32).add(index).sin()


def main() -> None:
    """Run as a script. Arguments: `train` or `loop` (an explicit loop over steps), and the transport."""
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
    stall_seconds = float(os.environ.get("STALL_SECONDS", "600"))
    strategy = mh.Strategy(transport=sys.argv[2], stall_seconds=stall_seconds, units=units)
    if sys.argv[1] == "train":
        mh.train(recipe, steps=5, strategy=strategy, show=False)
        return
    engine = mh.Engine(recipe, strategy)
    for batch in engine.batches(5):
        engine.step(batch)
    engine.close()


if __name__ == "__main__":
    main()
