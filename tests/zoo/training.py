"""Trains one case in all ways: in plain PyTorch, and with Manyhands in processes that are forked for it.

The caller has imported torch, and the process of a case has imported the case's package: so no worker imports anything,
which would take most of the time. Before the workers nothing may compute with several threads, since OpenMP's threads
do not survive a fork.
"""

from __future__ import annotations

import json
import os
import traceback
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.distributed import TCPStore

import manyhands as mh
from oracle import oracle_run
from support.training import train_with_engine
from zoo.case import Case

STEPS = 2
PLAIN = "plain PyTorch"
STRATEGIES: dict[str, dict[str, str]] = {
    "ddp, 1 worker": {"sharding": "ddp"},
    "zero2, 3 workers": {"sharding": "zero2"},
    "zero3, 2 workers": {"sharding": "zero3"},
    "zero3, 2 workers, torch.distributed": {"sharding": "zero3", "transport": "distributed"},
    "zero3, 2 workers, disk": {"sharding": "zero3", "offload": "disk"},
}
_FIRST, *_OTHERS = STRATEGIES
LAUNCHES = {1: [_FIRST, PLAIN], 3: _OTHERS[:1], 2: _OTHERS[1:]}
"""The number of workers, and in which ways they train one after the other."""

Outcome = dict[str, object]
"""What a worker found: digest, losses and norms, as text that is equal only if the bits are; or refused; or failed."""


def train(recipe: mh.Recipe, way: str) -> Outcome:
    """Train in one of the ways. Raises ValueError if nothing is learned, which would make any comparison succeed."""
    if way == PLAIN:
        run = oracle_run(recipe, STEPS)
        digest, losses, norms = run.digests[-1], run.losses, run.norms
    else:
        found = train_with_engine(recipe, mh.Strategy(**STRATEGIES[way], stall_seconds=60), steps=STEPS)  # type: ignore[arg-type]
        digest, losses, norms = found.digest, list(found.losses), list(found.norms)
    if len(set(losses)) < STEPS or not all(norms):
        raise ValueError(f"the model does not train: losses {losses}, gradient norms {norms}")
    return {"digest": digest, "losses": [loss.hex() for loss in losses], "norms": [norm.hex() for norm in norms]}


def _worker(case: Case, folder: Path, rank: int, size: int, port: int) -> None:
    """Train in the ways of this number of workers, until one fails, and write the outcomes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for way in LAUNCHES[size]:
        try:
            outcome = train(case.recipe(), way)
        except (mh.ConfigError, mh.DataError, mh.NumericsError) as error:
            outcome = {"refused": str(error)}
        except Exception:
            outcome = {"failed": traceback.format_exc()}
        (folder / f"{way}-{rank}").write_text(json.dumps(outcome))
        if "digest" not in outcome:
            return


def train_in_all_ways(case: Case, folder: Path) -> tuple[str, str]:
    """Return (equal, refused, different or failed; the reason), as soon as one way differs. Starts processes."""
    torch.set_num_threads(1)
    try:
        case.recipe()  # imports its package, on behalf of all workers
    except Exception:
        return "failed", traceback.format_exc()
    expected: Outcome | None = None
    for size, ways in LAUNCHES.items():
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = [(case, folder, rank, size, store.port) for rank in range(size)]
        workers = [get_context("fork").Process(target=_worker, args=each) for each in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for way in ways:
            for rank in range(size):
                file = folder / f"{way}-{rank}"
                outcome = json.loads(file.read_text()) if file.exists() else {"failed": f"worker {rank} died"}
                if "digest" not in outcome:
                    ((kind, reason),) = outcome.items()
                    return kind, f"{way}: {reason}"
                expected = expected or outcome
                if outcome != expected:
                    return (
                        "different",
                        f"{way}: {', '.join(part for part in outcome if outcome[part] != expected[part])}",
                    )
    return "equal", ""
