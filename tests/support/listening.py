"""A user's script whose listeners count, raise an exception and hang. It is killed in step 5 if the folder says so.

python listening.py FOLDER [wandb] [mlflow]
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.listeners import CSVListener, MLflowListener, TensorBoardListener, WandbListener, dispatch

DATA = torch.arange(64 * 8, dtype=torch.float32).reshape(64, 8).sin()
STEPS = 5


def loss(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - batch).square().mean()


def recipe_of(**changes: Any) -> mh.Recipe:
    given: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8)),
        "loss": loss,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01),
        "data": DATA,
        "batch": mh.Batch(global_size=12, micro_size=2),
        "validation": mh.Validation(data=DATA[:6], every="2 steps"),
        "name": "listened",
    }
    return mh.Recipe(**given | changes)


class Counts(mh.Listener):
    """Writes a line for each call to a file of this process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"seen-{os.environ.get('RANK', '0')}-{os.getpid()}"

    def write(self, *values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([*values, time.monotonic()]) + "\n")

    def began(self, facts: Mapping[str, Any]) -> None:
        json.dumps(facts, allow_nan=False)
        self.write("began", facts["step"])

    def step(self, metrics: mh.StepMetrics, workers: Sequence[Any]) -> None:
        torch.manual_seed(0), random.seed(0)  # changes no bit of the training
        self.write("step", metrics.step, [[sum(each.seconds.values()), each.memory_bytes] for each in workers])

    def evaluated(self, evaluation: mh.Evaluation) -> None:
        self.write("evaluated", evaluation.step)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        self.write("event", name)

    def ended(self, summary: mh.Summary) -> None:
        self.write("ended", summary.outcome)


class Raises(mh.Listener):
    def step(self, metrics: mh.StepMetrics, workers: Sequence[Any]) -> None:
        if metrics.step == 2:
            raise ValueError("out of cheese")


class Sends(mh.Listener):
    """Sets `sent` when it has sent step 4."""

    def step(self, metrics: mh.StepMetrics, workers: Sequence[Any]) -> None:
        super().step(metrics, workers)
        if metrics.step == 4:
            self.sent.set()


class SendsToWandb(Sends, WandbListener):
    sent = threading.Event()


class SendsToMLflow(Sends, MLflowListener):
    sent = threading.Event()


class Hangs(mh.Listener):
    network = True

    def began(self, facts: Mapping[str, Any]) -> None:
        threading.Event().wait(600)


class Killed(mh.Listener):
    """Kills the process after step 4 if the file `kill` is there, which it deletes. First waits for the others."""

    def __init__(self, folder: Path, others: Sequence[threading.Event]) -> None:
        self.file, self.others = folder / "kill", others

    def step(self, metrics: mh.StepMetrics, workers: Sequence[Any]) -> None:
        if metrics.step == 4 and self.file.exists():
            self.file.unlink()
            assert all(event.wait(60) for event in self.others)
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, *services: str) -> None:
    dispatch.END_SECONDS = 1.0 if not services else 60.0
    listeners: list[mh.Listener] = [Counts(folder), CSVListener(folder / "csv"), TensorBoardListener(folder / "curves")]
    far: list[Any] = [SendsToWandb(dir=str(folder))] if "wandb" in services else []
    far += [SendsToMLflow(f"file://{folder}/mlflow", "cheese")] if "mlflow" in services else []
    if not services:
        listeners += [Raises(), Hangs()]
    summary = mh.train(
        recipe_of(),
        steps=STEPS,
        run_dir=folder / "run",
        checkpoint_every=3,
        listeners=[*listeners, *far, Killed(folder, [each.sent for each in far])],
        show=False,
    )
    (folder / f"worker-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
