"""Any stage, number of workers and home goes on from a checkpoint of any other, to the same bits."""

from __future__ import annotations

import os
from functools import cache
from itertools import product
from pathlib import Path

import pytest

import manyhands as mh
from support.models import GPT_UNITS, gpt_recipe
from support.threads import run_threads
from support.training import train_with_engine

WAYS = list(product(("ddp", "zero1", "zero2", "zero3"), (1, 2, 3, 4), ("device", "disk")))
SAMPLE = [
    ("zero3", 4, "disk"),
    ("ddp", 3, "device"),
    ("zero2", 1, "disk"),
    ("zero3", 2, "device"),
    ("zero1", 4, "disk"),
]
SAVED = 1


@cache
def recipe() -> mh.Recipe:
    """Of four micro-batches: each of four workers has one."""
    return gpt_recipe("bf16", batch=mh.Batch(global_size=8, micro_size=2))


@cache
def digest_after(steps: int) -> str:
    """Undisturbed."""
    return train_with_engine(recipe(), mh.Strategy(), steps=steps).digest


def run(way: tuple[str, int, str], folder: Path, steps: int, load: Path | None, save: Path | None) -> None:
    """One step, or more, in that way, to the digest that is wanted."""
    stage, workers, home = way
    scratch = folder / "scratch"
    strategy = mh.Strategy(stage=stage, home=home, scratch=str(scratch), units=GPT_UNITS)
    found = run_threads(
        workers,
        lambda group: train_with_engine(recipe(), strategy, steps=steps, group=group, load=load, save=save).digest,
    )
    assert set(found) == {digest_after(steps)}, f"{way} from {load}"
    assert not scratch.exists() or os.listdir(scratch) == []


def test_a_sample_of_ways_goes_on_from_each_other(tmp_path: Path) -> None:
    load = None
    for number, way in enumerate(SAMPLE, start=1):
        run(way, tmp_path, number, load, tmp_path)
        load = tmp_path / f"step-{number:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{way[1]}-{way[2]}")
def test_every_way_goes_on_from_every_other(way: tuple[str, int, str], tmp_path: Path) -> None:
    run(way, tmp_path, SAVED, None, tmp_path)
    for other in WAYS:
        run(other, tmp_path, SAVED + 1, tmp_path / f"step-{SAVED:08d}", None)
