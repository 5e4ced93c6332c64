"""A checkpoint resumes to the same bits with any other sharding, number of workers and offload."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.comm.group import Group
from support.models import GPT_UNITS, gpt_recipe
from support.threads import run_threads
from support.training import train_with_engine

WAYS = list(product(("ddp", "zero1", "zero2", "zero3"), (1, 2, 3, 4), ("none", "disk")))
SAMPLE = [("zero3", 4, "disk"), ("ddp", 3, "none"), ("zero2", 1, "disk"), ("zero3", 2, "none")]
SAVED = 1


@cache
def recipe() -> mh.Recipe:
    """A recipe with four micro-batches per step, one for each of four workers."""
    return gpt_recipe("bf16", batch=mh.Batch(global_size=8, micro_size=2))


@cache
def digest_after(steps: int) -> str:
    """The digest of the uninterrupted run."""
    return train_with_engine(recipe(), mh.Strategy(), steps=steps).digest


def strategy(way: tuple[str, int, str], folder: Path) -> mh.Strategy:
    sharding, _, offload = way
    return mh.Strategy(sharding=sharding, offload=offload, scratch=str(folder / "scratch"), units=GPT_UNITS)


def trained(way: tuple[str, int, str], folder: Path, steps: int, load: Path | None = None) -> str:
    """Train, write a checkpoint to `folder` and return the digest."""
    how = strategy(way, folder)
    (digest,) = set(
        run_threads(
            way[1],
            lambda group: train_with_engine(recipe(), how, steps=steps, group=group, load=load, save=folder).digest,
        )
    )
    return digest


def test_some_configurations_resume_from_each_other(tmp_path: Path) -> None:
    load = None
    for number, way in enumerate(SAMPLE, start=1):
        assert trained(way, tmp_path, number, load) == digest_after(number), f"{way} from {load}"
        load = tmp_path / f"step-{number:08d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Path]:
    """A checkpoint for each configuration."""
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp("-".join(map(str, way)))
        trained(way, folder, SAVED)
        found[way] = folder / f"step-{SAVED:08d}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{way[1]}-{way[2]}")
def test_every_configuration_resumes_from_every_other(
    way: tuple[str, int, str], saved: dict[tuple[str, int, str], Path], tmp_path: Path
) -> None:
    def work(group: Group) -> dict[tuple[str, int, str], str | None]:
        found = {}
        with mh.Engine(recipe(), strategy(way, tmp_path), group=group) as engine:
            for source, checkpoint in saved.items():
                engine.load(checkpoint)
                found[source] = engine.step(next(engine.batches()), digest=True).digest
        return found

    for found in run_threads(way[1], work, timeout=300):
        assert found == dict.fromkeys(WAYS, digest_after(SAVED + 1))
