"""What a cluster of benchmarks/islands_bandwidth.py does, in a process of its own: islands_bandwidth_worker.py OPTIONS.

OPTIONS: JSON, see `Options`. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from gpt import GPT
from manyhands.rounds.round_file import RoundFile
from manyhands.training.outer_step import OuterStep

LENGTH = 128
EVERY = PARTS = 30
"""The number of steps in a round, after which all parameters have had a gradient."""


@dataclass(frozen=True)
class Options:
    """What a cluster does.

    kind: a function of this file. at: the place where islands meet. islands: those of this cluster. given: the
    arguments of `manyhands.Islands`, or None for a synchronous run. count: the number of islands, or of hosts. seconds:
    the time of a step whose computation is replaced by a wait. shardings: of a synchronous run.
    """

    kind: str
    steps: int = 0
    count: int = 1
    at: str | None = None
    islands: tuple[int, ...] | None = None
    given: Mapping[str, Any] | None = None
    seconds: float = 0.0
    shardings: tuple[str, ...] = ()

    def recipe_islands(self) -> mh.Islands | None:
        """The islands of the recipe."""
        return None if self.given is None else mh.Islands(count=self.count, **self.given)


class Watch(mh.Listener):
    """Notes when steps end, and what the rounds report. All clocks of this machine agree."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.rounds: list[dict[str, Any]] = []

    def step(self, metrics: object, workers: object) -> None:
        """Note the end of a step."""
        self.ends.append(time.monotonic())

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note what a round reports."""
        if name == "round":
            self.rounds.append({**facts, "at": time.monotonic()})


class Indices(torch.utils.data.Dataset[Tensor]):
    """Samples that are their own index."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class WaitingLoss:
    """A loss that waits, so that a step takes `seconds` in all. A step gives a gradient to 1 of 30 parts of the model.

    The gradients are normal random values that depend on the sample. They cost a few percent of a real step's time,
    because the clusters share this machine. watch: tells when the step before ended.
    """

    CARRIED = ("recipe.loss._waited_until", "recipe.loss._rest")

    def __init__(self, count: int, seconds: float, watch: Watch) -> None:
        self._count, self._seconds, self._watch = count, seconds, watch
        self._waited_until = self._rest = 0.0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        begun = time.monotonic()
        if self._watch.ends:  # the part of the step before that came after its wait
            self._rest = self._watch.ends[-1] - self._waited_until
        sample = int(batch[0])
        generator = torch.Generator().manual_seed(sample)
        terms = [
            (parameter * torch.randn(parameter.shape, generator=generator)).sum()
            for parameter in list(model.parameters())[sample // self._count % PARTS :: PARTS]
        ]
        time.sleep(max(0.0, self._seconds - self._rest - (time.monotonic() - begun)))
        self._waited_until = time.monotonic()
        return torch.stack(terms).sum()


class ShortLoss:
    """A loss that computes a few tokens, and waits. All parameters have a gradient, through the model's forward."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        begun = time.monotonic()
        loss: Tensor = model(batch[:, None] + torch.arange(8))
        time.sleep(max(0.0, self._seconds - (time.monotonic() - begun)))
        return loss


def large(options: Options, watch: Watch | None) -> mh.Recipe:
    """69.4 M parameters, whose computation is replaced by a wait."""
    return mh.Recipe(
        model=lambda: GPT(LENGTH),
        loss=ShortLoss(options.seconds) if watch is None else WaitingLoss(options.count, options.seconds, watch),
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        data=Indices(),
        order="sequential",
        batch=mh.Batch(global_size=1 if options.given is not None else options.count, micro_size=1),
        islands=options.recipe_islands(),
        attributes={} if watch is None else dict.fromkeys(WaitingLoss.CARRIED, "keep"),
    )


SMALL_BATCH = 8
VALIDATED = 128


class Text(torch.utils.data.Dataset[Tensor]):
    """Windows of Python's standard library, as bytes. Every 16th file is for validation only."""

    def __init__(self, *, is_validation: bool) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        chosen = [file for index, file in enumerate(files) if (index % 16 == 0) == is_validation]
        self._count = VALIDATED if is_validation else 1 << 16
        self._bytes = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in chosen)), dtype=torch.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        start = index * 2_654_435_761 % (len(self._bytes) - LENGTH)
        return self._bytes[start : start + LENGTH].long()


class NextByte(GPT):
    """1.9 M parameters. Returns the mean cross entropy of the next byte."""

    def __init__(self) -> None:
        super().__init__(LENGTH, width=192, depth=4, heads=6, vocabulary=256)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] to a scalar."""
        return F.cross_entropy(self.logits(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def small_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross entropy of the next byte."""
    loss: Tensor = model(tokens)
    return loss


def small_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The inner optimizer of all contenders."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def small(options: Options) -> mh.Recipe:
    """A small GPT that is computed."""
    size = SMALL_BATCH if options.given is not None else SMALL_BATCH * options.count
    return mh.Recipe(
        model=NextByte,
        loss=small_loss,
        optimizer=small_optimizer,
        data=Text(is_validation=False),
        order="sequential",
        batch=mh.Batch(global_size=size, micro_size=SMALL_BATCH),
        validation=mh.Validation(data=Text(is_validation=True), every="1000000 steps"),
        islands=options.recipe_islands(),
    )


def _train(recipe: mh.Recipe, options: Options, watch: Watch, state_every: int) -> dict[str, Any]:
    begun = time.monotonic()
    summary = mh.train(
        recipe,
        steps=options.steps,
        strategy=mh.Strategy(sharding="ddp" if options.given is None else "zero2", islands_state_every=state_every),
        digest_every=1_000_000,
        islands_at=options.at,
        islands=options.islands,
        show=False,
        listeners=[watch],
    )
    losses = [each["loss"] for each in (summary.validations or {}).values()]
    return {
        "digest": summary.digest,
        "loss": losses[0] if losses else None,
        "begun": begun,
        "ends": watch.ends,
        "rounds": watch.rounds,
        "parameters": summary.parameters,
    }


def waiting(options: Options) -> dict[str, Any]:
    """Train islands of the large model."""
    watch = Watch()
    return _train(large(options, watch), options, watch, state_every=1_000_000)


def computing(options: Options) -> dict[str, Any]:
    """Train the small model, with islands or synchronously."""
    return _train(small(options), options, Watch(), state_every=1_000_000)


def publishing(options: Options) -> dict[str, Any]:
    """Train islands of the small model, and publish a state after each round."""
    return _train(small(options), options, Watch(), state_every=1)


def synchronous(options: Options) -> dict[str, Any]:
    """Make steps of the large model on all hosts. torchrun starts this as a worker."""
    found = {}
    for sharding in options.shardings:
        units = tuple(f"blocks.{index}" for index in range(8))
        strategy = mh.Strategy(sharding=sharding, transport="distributed", units=units)
        with mh.Engine(large(options, None), strategy) as engine:
            steps = []
            for batch in engine.batches(options.steps):
                before, begun = _link(), time.monotonic()
                engine.step(batch)
                engine.group.barrier("measured / control")  # the bytes of all messages are counted
                steps.append([time.monotonic() - begun, *(b - a for a, b in zip(before, _link(), strict=True))])
            found[sharding] = steps
    return found


def _link() -> tuple[int, int]:
    """The bytes that this host has sent and received."""
    folder = Path("/sys/class/net/eth0/statistics")
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def codec(options: Options) -> dict[str, Any]:
    """What a round costs on a cluster besides the exchange: median and least seconds, and seconds of CPU time.

    publish: encode, and write the file. collect: check the files of all islands, decode them, and make the outer step.
    """
    with mh.Engine(large(options, None), mh.Strategy()) as engine:
        with torch.no_grad():
            for unit in engine.units:
                for part in engine.updater.parts(unit, unit.held):
                    part.master.add_(torch.randn(part.master.shape), alpha=1e-3)
        return {str(threads): _codec(engine, options, threads) for threads in (1, 2)}


def _codec(engine: mh.Engine, options: Options, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    islands = options.recipe_islands()
    assert islands is not None
    outer = OuterStep(engine, islands, "benchmark")
    times: dict[str, list[tuple[float, float]]] = {"publish": [], "collect": []}
    for of in islands.rounds(4 * EVERY, pretrained=False)[:-1]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"island-{island}.safetensors" for island in range(options.count)]

            def publish(island: int) -> None:
                engine.island = island
                outer.publish(of, paths[island])  # noqa: B023  (called at once)

            def collect() -> None:
                layout = outer.layout(of)  # noqa: B023
                files = [RoundFile(each, layout, outer.identity(of.number, i)) for i, each in enumerate(paths)]  # noqa: B023
                outer.collect(of, files)  # noqa: B023

            for island in range(options.count):
                times["publish"].append(_seconds(publish, island))
            times["collect"].append(_seconds(collect))
    found = {}
    for name, measured in times.items():
        wall, cpu = zip(*measured, strict=True)
        found[name] = [median(wall), min(wall), median(cpu)]
    return found


def _seconds(work: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """The time of a call, and the CPU time of all its threads."""
    begun, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - begun, time.process_time() - cpu


def bucket(options: Options) -> dict[str, Any]:
    """Wait until the store answers, and create the bucket. at: its URL."""
    assert options.at is not None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(options.at, method="PUT"), timeout=10).close()
            return {}
        time.sleep(0.1)
    raise TimeoutError("the store does not answer")


KINDS: dict[str, Callable[[Options], dict[str, Any]]] = {
    each.__name__: each for each in (waiting, computing, publishing, synchronous, codec, bucket)
}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = KINDS[given["kind"]](Options(**given))
    sys.stdout.write(f"RESULT {json.dumps(found)}\n")
