"""Offload changes no bit. State on a disk leaves memory, and a killed run leaves no files."""

from __future__ import annotations

import copy
import errno
import os
import resource
import subprocess
import sys
import threading
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.engine.units.params import OffloadedParams, OnDemandParams, ReplicatedParams
from manyhands.errors import ConfigError, InvariantError
from manyhands.models.building import BuiltAt
from manyhands.offload.allocator import DiskAllocator
from manyhands.offload.scratch import check_space, file_system_of, measure_speed
from oracle import oracle_run
from support.models import GPT_UNITS, conv_recipe, gpt_recipe
from support.odd_models import UNITS, Odd, recipe_of
from support.threads import run_threads
from support.training import train_with_engine

STEPS = 3
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")


def on_disk(scratch: Path, sharding: str = "zero3", **options: Any) -> mh.Strategy:
    return mh.Strategy(
        **({"sharding": sharding, "offload": "disk", "scratch": str(scratch), "units": GPT_UNITS} | options)
    )


@cache
def gpt_and_digest(precision: str) -> tuple[mh.Recipe, str]:
    """The recipe, and the oracle's digest."""
    recipe = gpt_recipe(precision)
    return recipe, oracle_run(recipe, STEPS).digests[-1]


QUICK = {
    (1, "ddp", "bf16"),
    (1, "zero3", "fp32"),
    *((3, sharding, "bf16") for sharding in SHARDINGS),
    (3, "zero2", "fp32"),
}


@pytest.mark.parametrize(
    ("workers", "sharding", "precision"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product((1, 2, 3), SHARDINGS, ("fp32", "bf16"))
    ],
)
def test_state_on_disk_has_the_oracles_bits(workers: int, sharding: str, precision: str, tmp_path: Path) -> None:
    recipe, expected = gpt_and_digest(precision)
    strategy = on_disk(tmp_path, sharding)
    for found in run_threads(workers, lambda group: train_with_engine(recipe, strategy, steps=STEPS, group=group)):
        assert found.digest == expected
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_on_disk_have_the_oracles_bits(precision: str, tmp_path: Path) -> None:
    recipe = recipe_of(Odd, precision)
    strategy = on_disk(tmp_path, transport="distributed", units=UNITS, activation_checkpointing=("blocks.*",))
    assert train_with_engine(recipe, strategy, steps=STEPS).digest == oracle_run(recipe, STEPS).digests[-1]


def test_a_run_resumes_under_any_offload_from_any_other(tmp_path: Path) -> None:
    recipe = gpt_recipe("bf16")
    expected = oracle_run(recipe, 4).digests[-1]
    homes = {
        "disk": on_disk(tmp_path / "scratch"),
        "none": mh.Strategy(sharding="zero1"),
        "cpu": mh.Strategy(offload="cpu"),
    }
    for name, strategy in homes.items():
        train_with_engine(recipe, strategy, steps=2, save=tmp_path / name)
    for source in homes:
        checkpoint = tmp_path / source / "step-00000002"
        for target in homes.values():
            assert train_with_engine(recipe, target, steps=4, load=checkpoint).digest == expected


def test_offloaded_state_is_in_buffers_of_the_allocator(tmp_path: Path) -> None:
    with mh.Engine(gpt_recipe("bf16"), on_disk(tmp_path)) as engine:
        for batch in engine.batches(2):
            engine.step(batch)
        for unit in engine.units:
            assert isinstance(unit.params, OffloadedParams)
            assert engine.allocator.owns(unit.master)
            assert engine.allocator.owns(unit.params.replicated)
        for piece, _ in engine.updater.slices:
            moments = [value for value in engine.optimizer.state_of(piece).values() if value.dim()]
            assert len(moments) == 2
            assert all(engine.allocator.owns(moment) for moment in moments)


def test_offload_to_the_cpu_changes_nothing_on_a_cpu() -> None:
    recipe = conv_recipe()
    with mh.Engine(recipe, mh.Strategy(sharding="zero3", offload="cpu")) as engine:
        assert not any(isinstance(unit.params, OnDemandParams) for unit in engine.units)
        assert all(isinstance(unit.params, ReplicatedParams) for unit in engine.units)


# - Files


def test_a_buffer_survives_eviction(tmp_path: Path) -> None:
    allocator = DiskAllocator(tmp_path)
    try:
        buffers = [allocator.empty(300_000, torch.float32) for _ in range(3)]
        for number, buffer in enumerate(buffers):
            assert bool((buffer == 0).all())
            buffer.fill_(number + 1)
            allocator.evict(buffer)
        for number, buffer in enumerate(buffers):
            allocator.prefetch(buffer)
            assert bool((buffer == number + 1).all())
        with pytest.raises(InvariantError, match="does not belong to this allocator"):
            allocator.evict(torch.zeros(10))
    finally:
        allocator.close()
    assert os.listdir(tmp_path) == []


def test_a_failed_write_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, *args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    allocator = DiskAllocator(tmp_path)
    try:
        buffer = allocator.empty(1000, torch.float32)
        monkeypatch.setattr("manyhands.offload.allocator._call", fails)  # a disk that breaks can't be had here
        monkeypatch.setattr("manyhands.offload.allocator.BEHIND_BYTES", 0)
        allocator.evict(buffer)
        with pytest.raises(ConfigError, match="Input/output error") as caught:
            allocator.evict(buffer)
        assert str(tmp_path) in str(caught.value)
    finally:
        allocator.close()


def test_nothing_is_left_of_a_killed_run(tmp_path: Path) -> None:
    code = f"""
        import os, signal, torch
        from pathlib import Path
        from manyhands.offload.allocator import DiskAllocator
        home = DiskAllocator(Path({str(tmp_path)!r}))
        home.empty(1000, torch.float32).fill_(1)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())], check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_reported_before_state_is_lost(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))  # what a full disk is to a file
    try:
        with pytest.raises(ConfigError, match="scratch folder can't be used: File too large") as caught:
            train_with_engine(gpt_recipe(), on_disk(tmp_path), steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(tmp_path) in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "manyhands-write"]
    with pytest.raises(ConfigError, match="too little space"):
        check_space(tmp_path, 1 << 60)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_an_unusable_folder_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "file" else Path("/dev/shm")
    if where == "memory" and file_system_of(folder) != "tmpfs":
        pytest.skip("/dev/shm is not in memory here")
    with pytest.raises(ConfigError, match="scratch folder"):
        train_with_engine(gpt_recipe(), on_disk(folder), steps=1)


def test_speeds_are_measured(tmp_path: Path) -> None:
    assert all(speed > 0 for speed in measure_speed(tmp_path))


def test_a_run_has_its_own_scratch_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = mh.train(gpt_recipe(), steps=2, strategy=mh.Strategy(offload="disk"), run_dir=tmp_path / "run")
    assert summary.digest == oracle_run(gpt_recipe(), 2).digests[-1]
    assert os.listdir(tmp_path / "run" / "scratch") == []
    output = capsys.readouterr()
    assert "state is stored in" in output.out + output.err


# - Construction


class Wide(nn.Module):
    """Large parameters, created in the ways that torch's modules and other libraries use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(700, 500), nn.Embedding(900, 300)
        self.drawn = nn.Parameter(torch.randn(400, 300))
        self.uniform = nn.Parameter(torch.rand((300, 400), dtype=torch.float32))
        self.ones = nn.Parameter(torch.ones(size=(300, 400)))
        self.copied = copy.deepcopy(self.linear)
        self.small = nn.Parameter(torch.randn(3))
        nn.init.trunc_normal_(self.linear.weight, std=0.02)


def test_a_model_built_in_files_has_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = Wide()
    allocator = DiskAllocator(tmp_path)
    try:
        torch.manual_seed(1)
        with BuiltAt(allocator):
            found = Wide()
        for (name, param), other in zip(found.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(param, other), name
            assert param.requires_grad
            assert allocator.owns(param) is (param.nbytes >= 1 << 18), name
    finally:
        allocator.close()
