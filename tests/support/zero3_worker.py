"""A worker of test_zero3.py: trains every odd model in some ways, one after the other, and writes the digests.

python zero3_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import manyhands as mh
from support.odd_models import ODD, UNITS, Backwards, recipe_of
from support.training import train_with_engine

WAYS = {
    "as it is": {},
    "nothing ahead": {"unshard_ahead": 0},
    "much ahead": {"unshard_ahead": 3},
    "checkpointing": {"activation_checkpointing": ("blocks.*",)},
    "no overlap": {"overlap": False},
}
EVERY_WAY = {"Twice", "Chooses"}
STEPS = 2


def jobs(workers: int) -> list[tuple[str, str, str]]:
    """(model, way, precision)."""
    some = EVERY_WAY if workers == 2 else set()
    every = [(name, way) for name in ODD for way in WAYS if name in some or way == "as it is"]
    return [(name, way, "bf16" if way == "much ahead" else "fp32") for name, way in every]


def evaluated() -> float:
    """What worker r gets of its r-th and last call; between two steps that go on as if nothing had been."""
    found = 0.0
    with mh.Engine(recipe_of(Backwards), mh.Strategy(sharding="zero3", transport="distributed", units=UNITS)) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
            with engine.evaluating() as model, torch.no_grad():
                for _ in range(engine.group.rank):
                    found = float(model.eval()(torch.arange(8).view(1, 8)).sum())
        return found


def main(folder: Path) -> None:
    digests = {}
    for name, way, precision in jobs(int(os.environ["WORLD_SIZE"])):
        strategy = mh.Strategy(sharding="zero3", transport="distributed", stall_seconds=30, units=UNITS, **WAYS[way])
        digests[f"{name}, {way}"] = train_with_engine(recipe_of(ODD[name], precision), strategy, steps=STEPS).digest
    (folder / f"evaluated-{os.environ['RANK']}.json").write_text(json.dumps(evaluated()))
    (folder / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
