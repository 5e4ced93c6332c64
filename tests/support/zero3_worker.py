"""A worker of test_zero3.py: trains every odd model in several ways and writes the digests.

python zero3_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import manyhands as mh
from support.models import GPT_UNITS
from support.odd_models import ODD, UNITS, Backwards, Chooses, EvaluatesOtherwise, recipe_of
from support.optimizers import hooked_recipe, keeping_recipe
from support.training import train_with_engine

WAYS = {
    "as it is": {},
    "nothing ahead": {"unshard_ahead": 0},
    "much ahead": {"unshard_ahead": 3},
    "checkpointing": {"activation_checkpointing": ("blocks.*",)},
    "no overlap": {"overlap": False},
}
EVERY_WAY = {2: {"Chooses"}, 3: {"Twice"}}  # by number of workers
ORDERED = ("ddp", "zero2", "zero3")
STEPS = 2
OPTIMIZERS = {
    "hooks": (hooked_recipe(), ("gpt.blocks.0", "gpt.blocks.1")),
    "counts": (keeping_recipe("count in an attribute"), GPT_UNITS),
}


def jobs(workers: int) -> list[tuple[str, str, str]]:
    """Return all cases: (model, way, precision)."""
    some = EVERY_WAY[workers]
    every = [(name, way) for name in ODD for way in WAYS if name in some or way == "as it is"]
    return [(name, way, "bf16" if way == "much ahead" else "fp32") for name, way in every]


def evaluated() -> float:
    """Evaluate r times on worker r between two steps, which must not be affected. Return the last results."""
    found = 0.0
    with mh.Engine(recipe_of(Backwards), mh.Strategy(sharding="zero3", transport="distributed", units=UNITS)) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
            with engine.evaluating() as model, torch.no_grad():
                for _ in range(engine.group.rank):
                    found = float(model.eval()(torch.arange(8).view(1, 8)).sum())
        return found


def exchange_orders(sharding: str) -> dict[str, Any]:
    """Train a model whose order depends on the data; record in which order gradients arrive and units are sent.

    arrived: for each micro-batch of this worker, its parameters in the order of their hooks. sent: the tags, in order.
    """
    arrived: list[list[str]] = []
    sent: list[str] = []
    recipe = recipe_of(Chooses)
    counted = replace(recipe, loss=lambda model, batch: (arrived.append([]), recipe.loss(model, batch))[1])
    with mh.Engine(counted, mh.Strategy(sharding=sharding, transport="distributed", units=UNITS)) as engine:
        for name, param in engine.model.named_parameters():
            param.register_post_accumulate_grad_hook(lambda _, name=name: arrived[-1].append(name))
        all_to_all = engine.group.all_to_all
        engine.group.all_to_all = lambda *given: (sent.append(given[-1]), all_to_all(*given))[1]  # type: ignore[method-assign]
        for batch in engine.batches(STEPS):
            engine.step(batch)
        return {"arrived": arrived, "sent": sent, "digest": engine.digest()}


def with_evaluations(number: int) -> dict[str, Any]:
    """Train; evaluate after each step, `number` times on worker 1 and never on worker 0.

    calls: for each step, the number of collective calls in each of the two sequences.
    """
    calls = []
    strategy = mh.Strategy(sharding="zero3", transport="distributed", units=UNITS)
    with mh.Engine(recipe_of(EvaluatesOtherwise), strategy) as engine:
        board = engine.group.membership.board  # type: ignore[attr-defined]
        for batch in engine.batches(STEPS + 1):
            before = [board.posted(0), board.posted(1)]
            engine.step(batch)
            calls.append([board.posted(0) - before[0], board.posted(1) - before[1]])
            if number:
                with engine.evaluating() as model, torch.no_grad():
                    for _ in range(engine.group.rank * number):
                        model.eval()(torch.arange(8).view(1, 8))
        return {"calls": calls, "digest": engine.digest()}


def with_optimizers() -> dict[str, str]:
    """Return digests of recipes whose optimizers have step hooks, or count steps in attributes."""
    digests = {}
    for name, (recipe, units) in OPTIMIZERS.items():
        strategy = mh.Strategy(sharding="zero3", transport="distributed", stall_seconds=120, units=units)
        digests[name] = train_with_engine(recipe, strategy, steps=STEPS).digest
    return digests


def main(folder: Path) -> None:
    digests = {}
    for name, way, precision in jobs(int(os.environ["WORLD_SIZE"])):
        strategy = mh.Strategy(sharding="zero3", transport="distributed", stall_seconds=120, units=UNITS, **WAYS[way])
        digests[f"{name}, {way}"] = train_with_engine(recipe_of(ODD[name], precision), strategy, steps=STEPS).digest
    (folder / f"evaluated-{os.environ['RANK']}.json").write_text(json.dumps(evaluated()))
    orders = {sharding: exchange_orders(sharding) for sharding in ORDERED}
    (folder / f"orders-{os.environ['RANK']}.json").write_text(json.dumps(orders))
    evaluations = [with_evaluations(number) for number in (0, 2)]
    (folder / f"evaluations-{os.environ['RANK']}.json").write_text(json.dumps(evaluations))
    (folder / f"optimizers-{os.environ['RANK']}.json").write_text(json.dumps(with_optimizers()))
    (folder / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
