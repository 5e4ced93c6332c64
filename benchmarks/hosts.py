"""The bytes between hosts, and the time of a step, for each sharding, precision and transport.

    .venv/bin/python benchmarks/hosts.py [--hosts 2 3] [--mbit 1000 100] [--precisions fp32 bf16]

Hosts are network namespaces of this machine (tests/support/hosts.py; needs root), with 2 workers each, which torchrun
starts. Bytes are those that a host receives, as its network device counts them, headers and control values included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import manyhands as mh

TESTS = Path(__file__).resolve().parents[1] / "tests"
WORKERS, MICRO_BATCHES, WIDTH, LAYERS = 2, 12, 512, 8
STEPS, WARM = 6, 2
SHARDINGS, GROUPS = ("ddp", "zero1", "zero2", "zero3"), ("distributed", "hierarchical")
RECEIVED = Path("/sys/class/net/eth0/statistics/rx_bytes")


class Data(torch.utils.data.Dataset[Tensor]):
    """Samples [WIDTH]."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(WIDTH, dtype=torch.float32).add(index).sin()


def recipe(precision: str) -> mh.Recipe:
    """2.1 M parameters in 8 units, and 12 micro-batches of one sample, so that the link dominates."""
    return mh.Recipe(
        model=lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))),
        loss=lambda model, batch: model(batch.to(next(model.parameters()).dtype)).float().square().mean(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        data=Data(),
        batch=mh.Batch(global_size=MICRO_BATCHES, micro_size=1),
        precision=precision,
    )


def measure(sharding: str, group: str, precision: str) -> dict[str, object]:
    """Return this worker's medians over all but the first steps."""
    units = tuple(str(index) for index in range(LAYERS))
    with mh.Engine(recipe(precision), mh.Strategy(sharding=sharding, transport=group, units=units)) as engine:
        seconds, received = [], []
        for batch in engine.batches(STEPS):
            before = int(RECEIVED.read_text())
            seconds.append(engine.step(batch).step_seconds)
            engine.group.barrier("measured / control")  # no worker may start its next step before the bytes are read
            received.append(int(RECEIVED.read_text()) - before)
            engine.group.barrier("read / control")
        digest = engine.digest()
    return {
        "seconds": statistics.median(seconds[WARM:]),
        "bytes": statistics.median(received[WARM:]),
        "digest": digest[:8],
    }


def work(out: Path, precisions: list[str]) -> None:
    """Measure all cases, one after the other. torchrun starts this as a worker."""
    found = {}
    for sharding, group, precision in product(SHARDINGS, GROUPS, precisions):
        found[f"{sharding} {group} {precision}"] = measure(sharding, group, precision)
    (out / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--mbit", type=float, nargs="+", default=[1000.0, 100.0])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.precisions)
        return
    sys.path.insert(0, str(TESTS))
    from support.hosts import hosts, torchrun, why_not

    if why_not():
        sys.exit(why_not())
    megabytes = LAYERS * WIDTH**2 / 1e6
    print(f"{LAYERS * WIDTH**2:,} parameters ({4 * megabytes:.1f} MB in fp32, {2 * megabytes:.1f} MB in bf16)")
    for count, mbit in product(options.hosts, options.mbit):
        with tempfile.TemporaryDirectory() as folder, hosts(count, mbit_per_second=mbit) as found:
            script = [str(Path(__file__)), "--work", folder, "--precisions", *options.precisions]
            log = Path(folder) / "log"
            running = [host.start(torchrun(found, WORKERS, script), log) for host in found]
            codes = [process.wait() for process in running]
            if any(codes):
                sys.exit(log.read_text())
            ranks = [json.loads((Path(folder) / f"worker-{rank * WORKERS}.json").read_text()) for rank in range(count)]
        for sharding, precision in product(SHARDINGS, options.precisions):
            row = f"{count} hosts x {WORKERS}, {mbit:g} Mbit/s, {sharding}, {precision}:"
            for group in GROUPS:
                each = [rank[f"{sharding} {group} {precision}"] for rank in ranks]
                moved = statistics.mean(one["bytes"] for one in each) / 1e6
                row += f"  {group} {moved:.1f} MB {each[0]['seconds'] * 1000:.0f} ms {each[0]['digest']}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
