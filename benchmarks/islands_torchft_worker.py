"""What a replica of torchft's DiLoCo does in benchmarks/islands_bandwidth.py: islands_torchft_worker.py OPTIONS.

OPTIONS: JSON, the arguments of `train`; or `lighthouse REPLICAS` for the server by which replicas find each other.
Prints one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import manyhands as mh
from islands_bandwidth_worker import SMALL_BATCH, VALIDATED, NextByte, Options, Text, small, small_optimizer

PORT = 29510
ISLANDS = 2


def lighthouse(replicas: int) -> None:
    """Serve until killed."""
    from torchft._torchft import LighthouseServer

    server = LighthouseServer(bind=f"0.0.0.0:{PORT}", min_replicas=replicas, join_timeout_ms=60_000)
    while server:
        time.sleep(1)


def train(rank: int, replicas: int, steps: int, every: int, address: str, lighthouse: str) -> dict[str, Any]:
    """Train the small model. The outer optimizer averages, as ours does from random weights.

    The weights at the start and the samples of the two islands are those of our run. One replica alone computes the
    batches of both islands as one.
    """
    from torchft.local_sgd import DiLoCo
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    model = NextByte()
    with mh.Engine(small(Options("computing"))) as engine:  # the same weights at the start
        model.load_state_dict({name: each.detach().clone() for name, each in engine.model.state_dict().items()})
    inner = small_optimizer(model.parameters())
    outer = torch.optim.SGD(model.parameters(), lr=1.0)
    parts = {"model": model, "inner": inner, "outer": outer}
    limit = timedelta(seconds=120)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit),
        min_replica_size=replicas,
        use_async_quorum=False,
        load_state_dict=lambda state: [parts[name].load_state_dict(each) for name, each in state.items()],  # type: ignore[misc]
        state_dict=lambda: {name: each.state_dict() for name, each in parts.items()},
        replica_id=f"replica_{rank}",
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=lighthouse,
        timeout=limit,
        quorum_timeout=limit,
        connect_timeout=limit,
        hostname=address,
    )
    data, ends = Text(is_validation=False), []
    with DiLoCo(manager, [model], inner, outer, sync_every=every):
        for step in range(steps):
            islands = range(rank, ISLANDS, replicas)
            first = [(step * ISLANDS + island) * SMALL_BATCH for island in islands]
            batch = torch.stack([data[start + index] for start in first for index in range(SMALL_BATCH)])
            inner.zero_grad()
            model(batch).backward()
            inner.step()
            ends.append(time.monotonic())
    digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters())).hexdigest()
    validation = Text(is_validation=True)
    with torch.no_grad():
        loss = float(model(torch.stack([validation[index] for index in range(VALIDATED)])))
    return {"digest": digest, "loss": loss, "ends": ends, "committed": manager.batches_committed()}


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        lighthouse(int(sys.argv[2]))
    sys.stdout.write(f"RESULT {json.dumps(train(**json.loads(sys.argv[1])))}\n")
    sys.stdout.flush()
    os._exit(0)  # torchft's threads would keep the process alive
