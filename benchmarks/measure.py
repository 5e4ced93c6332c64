"""What all contenders share: arguments, random tokens, and the JSON line that they print at the end."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt import VOCABULARY

WARM_UP = 2  # steps that are not counted: they create allocators, kernels and connections


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all contenders have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=4, help="samples a worker computes in each step")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--steps", type=int, default=8, help=f"steps to measure, after {WARM_UP} to warm up")
    return parser


class Turns:
    """Lets several contenders take their steps in turn. A file holds the current turn; contender I of K takes turns I,
    K + I, 2 K + I, and so on. All workers of a contender call `with turns.take(): step()`.

    A waiting worker polls the file rarely, so that it takes no CPU time from the one that computes.
    """

    VARIABLE = "BENCH_TURNS"  # "file I K"

    def __init__(self) -> None:
        self._file, self._next, self._contenders = Path(), 0, 0
        if given := os.environ.get(self.VARIABLE):
            file, mine, contenders = given.rsplit(" ", 2)
            self._file, self._next, self._contenders = Path(file), int(mine), int(contenders)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for this contender's next turn, and pass the turn on at the end of the block."""
        while self._contenders and int(self._file.read_text()) < self._next:
            time.sleep(0.01)
        yield
        if self._contenders and int(os.environ.get("RANK", "0")) == 0:
            new = self._file.with_suffix(".new")
            new.write_text(str(self._next + 1))
            new.replace(self._file)
        self._next += self._contenders


class RandomTokens(torch.utils.data.Dataset[Tensor]):
    """`samples` samples of `length` random tokens; a sample depends on its number only."""

    def __init__(self, samples: int, length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(0, VOCABULARY, (self.length,), generator=torch.Generator().manual_seed(index))


def batch_of(data: RandomTokens, step: int, rank: int, world: int, size: int) -> Tensor:
    """This worker's samples of a step, [size, length]."""
    first = (step * world + rank) * size
    return torch.stack([data[index % len(data)] for index in range(first, first + size)])


def pss_mib() -> float:
    """This process's proportional set size: shared pages are divided among the processes that map them."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


class PeakPss:
    """`with PeakPss() as peak: step()`, then `peak.mib`: the largest of many samples. Don't time what's inside."""

    def __enter__(self) -> PeakPss:
        self.mib = pss_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.mib = max(self.mib, pss_mib())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rank 0 measured. seconds: of each step, including the warm-up. peak_pss_mib: during one more step, which is
    not timed. rest_pss_mib: after that step. overhead: the fraction of a step that digests and records take."""

    kind: str
    workers: int
    seconds: list[float]
    peak_pss_mib: float
    rest_pss_mib: float
    loss: float
    overhead: float | None = None


def report(options: argparse.Namespace, measured: Measured) -> None:
    """Print the result as one JSON line."""
    counted = measured.seconds[WARM_UP:]
    median = statistics.median(counted)
    record = {
        "kind": measured.kind,
        "workers": measured.workers,
        "precision": options.precision,
        "batch": options.batch,
        "length": options.length,
        "step_ms": round(median * 1e3, 1),
        "least_ms": round(min(counted) * 1e3, 1),
        "steps_ms": [round(each * 1e3, 1) for each in counted],
        "tokens_per_second_per_worker": round(options.batch * options.length / median, 1),
        "peak_pss_mib": round(measured.peak_pss_mib),
        "pss_mib": round(measured.rest_pss_mib),
        "loss": round(measured.loss, 4),
    }
    if measured.overhead is not None:
        record["overhead"] = round(measured.overhead, 4)
    print(json.dumps(record), flush=True)


def leave() -> None:
    """End the process at once: how long a library takes to tear itself down is not measured."""
    os._exit(0)
