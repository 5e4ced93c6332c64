"""On a GPU: the same promises, by the same code (NCCL between several). Skipped without one."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import manyhands as mh
from manyhands.engine.units.params import OnDemandParams
from manyhands.errors import NumericsError
from manyhands.launching.launcher import run_workers
from support.models import GPT_UNITS, gpt_recipe, muon_and_adamw
from support.training import train_with_engine
from test_parity import SHARDINGS, WORKER, job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS = 3


def digest(recipe: mh.Recipe, strategy: mh.Strategy) -> str:
    return train_with_engine(recipe, strategy, steps=STEPS).digest


def placed(sharding: str, offload: str, scratch: Path, **options: object) -> mh.Strategy:
    return mh.Strategy(sharding=sharding, offload=offload, scratch=str(scratch), units=GPT_UNITS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shardings_give_the_same_bits_twice(precision: str, tmp_path: Path) -> None:
    recipe = gpt_recipe(precision, device="cuda")
    digests = {digest(recipe, placed(sharding, "none", tmp_path)) for sharding in SHARDINGS for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon and AdamW"])
def test_the_update_on_the_cpu_has_the_same_bits_whatever_is_offloaded(
    optimizer: str, precision: str, tmp_path: Path
) -> None:
    changes = {} if optimizer == "AdamW" else {"optimizer": muon_and_adamw()}
    recipe = gpt_recipe(precision, device="cuda", **changes)
    ways = [*product(SHARDINGS, ("cpu", "disk"), (0, 2)), ("zero3", "cpu", 1)]
    digests = {
        digest(recipe, placed(sharding, offload, tmp_path, unshard_ahead=ahead)) for sharding, offload, ahead in ways
    }
    assert len(digests) == 1


def test_offloaded_parameters_are_unsharded_from_pinned_memory(tmp_path: Path) -> None:
    recipe = gpt_recipe("bf16", device="cuda")
    strategy = placed("zero3", "cpu", tmp_path, activation_checkpointing=("blocks.*",))
    with mh.Engine(recipe, strategy) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
        for unit in engine.units:
            assert isinstance(unit.params, OnDemandParams)
            assert unit.params.stored(unit.shard).is_pinned()
            assert not unit.master.is_cuda
        assert engine.digest() == digest(recipe, placed("ddp", "cpu", tmp_path))


def test_a_run_resumes_under_another_offload_only_if_the_update_device_stays(tmp_path: Path) -> None:
    recipe = gpt_recipe("bf16", device="cuda")
    for offload in ("cpu", "none"):
        train_with_engine(recipe, placed("zero2", offload, tmp_path), steps=2, save=tmp_path / offload)
    resumed = train_with_engine(
        recipe, placed("zero3", "disk", tmp_path), steps=4, load=tmp_path / "cpu" / "step-00000002"
    )
    undisturbed = train_with_engine(recipe, placed("ddp", "cpu", tmp_path), steps=4)
    assert resumed.digest == undisturbed.digest
    with pytest.raises(NumericsError, match="update differs"):
        train_with_engine(recipe, placed("zero2", "cpu", tmp_path), steps=4, load=tmp_path / "none" / "step-00000002")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_that_share_a_gpu_have_the_bits_of_one(workers: int, tmp_path: Path) -> None:
    jobs = [
        job(f"{sharding} {precision}", precision, sharding, device="cuda")
        for sharding, precision in product(SHARDINGS, ("fp32", "bf16"))
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    run_workers(
        [sys.executable, str(WORKER), str(tmp_path), "distributed", str(tmp_path / "jobs.json")],
        workers=workers,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
        log_dir=tmp_path,
    )
    expected = {
        precision: train_with_engine(gpt_recipe(precision, device="cuda"), mh.Strategy(), steps=jobs[0]["steps"]).digest
        for precision in ("fp32", "bf16")
    }
    for rank in range(workers):
        found = json.loads((tmp_path / f"worker-{rank}.json").read_text())
        assert found == {this["name"]: expected[this["precision"]] for this in jobs}, f"worker {rank}"
