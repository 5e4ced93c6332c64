"""A checkpoint restores every bit with any number of workers and any sharding. Errors name a damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints, read_manifest
from manyhands.checkpoint.load import load_checkpoint
from manyhands.errors import CheckpointError, ConfigError, NumericsError, WorkerError
from manyhands.storage.sealed import seal
from support.models import OWNED, OptimizerFactory, Wide, conv_recipe, gpt_recipe, grouped, partly_used_recipe
from support.threads import run_threads
from support.training import Outcome, train_with_engine

STEPS, SAVED_AT = 4, 2
SHARDINGS, WORKERS = ("ddp", "zero1", "zero2"), (1, 2, 3)


def train(recipe: mh.Recipe, workers: int = 1, sharding: str = "zero2", steps: int = STEPS, **files: Any) -> Outcome:
    """Return the run's result, which is the same on all workers."""
    strategy = mh.Strategy(sharding=sharding)
    outcomes = run_threads(
        workers, lambda group: train_with_engine(recipe, strategy, steps=steps, group=group, **files)
    )
    assert len({outcome.digest for outcome in outcomes}) == 1
    return outcomes[0]


def saved(recipe: mh.Recipe, folder: Path, workers: int = 1, sharding: str = "zero2", at: int = SAVED_AT) -> Path:
    """Train some steps and write a checkpoint."""
    train(recipe, workers, sharding, at, save=folder)
    return folder / f"step-{at:08d}"


def assert_resumed(found: Outcome, undisturbed: Outcome) -> None:
    """Check that the resumed run equals the uninterrupted one."""
    assert found.digest == undisturbed.digest
    assert found.losses == undisturbed.losses[SAVED_AT:]
    assert found.norms == undisturbed.norms[SAVED_AT:]
    for name, buffer in undisturbed.buffers.items():
        assert torch.equal(found.buffers[name], buffer), name


@pytest.mark.slow  # test_parity.py has a fair part of it with processes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_checkpoint_loads_with_any_number_of_workers_and_any_sharding(
    tmp_path: Path, workers: int, precision: str
) -> None:
    recipe = gpt_recipe(precision)
    undisturbed = train(recipe)
    for sharding in SHARDINGS:
        checkpoint = saved(recipe, tmp_path / sharding, workers, sharding)
        for other_workers, other_stage in product(WORKERS, SHARDINGS):
            assert_resumed(train(recipe, other_workers, other_stage, load=checkpoint), undisturbed)


@pytest.mark.parametrize("recipe_of", [conv_recipe, partly_used_recipe])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_momentum_and_unused_parameters_are_restored(
    tmp_path: Path, recipe_of: Callable[[str], mh.Recipe], precision: str
) -> None:
    recipe = recipe_of(precision)
    undisturbed = train(recipe)
    checkpoint = saved(recipe, tmp_path, 2, "zero1")
    assert_resumed(train(recipe, 3, "zero2", load=checkpoint), undisturbed)
    assert_resumed(train(recipe, 1, "ddp", load=checkpoint), undisturbed)


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "SGD": grouped(torch.optim.SGD, lr=0.1),
    "SGD momentum": grouped(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW fused": grouped(torch.optim.AdamW, lr=3e-3, fused=True),
    "Adam amsgrad": grouped(torch.optim.Adam, lr=3e-3, amsgrad=True),
    "NAdam": grouped(torch.optim.NAdam, lr=3e-3),
    "RAdam": grouped(torch.optim.RAdam, lr=3e-3),
    "Adagrad": grouped(torch.optim.Adagrad, lr=1e-2),
    "Adadelta": grouped(torch.optim.Adadelta, lr=1.0),
    "Adamax": grouped(torch.optim.Adamax, lr=3e-3),
    "RMSprop": grouped(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "Rprop": lambda named_params: torch.optim.Rprop([param for _, param in named_params], lr=1e-3),
    "ASGD": grouped(torch.optim.ASGD, lr=0.1, t0=1),
} | OWNED


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_state_is_restored(tmp_path: Path, optimizer: str) -> None:
    recipe = gpt_recipe(optimizer=OPTIMIZERS[optimizer], batch=mh.Batch(global_size=12, micro_size=2))
    undisturbed = train(recipe, 2, save=tmp_path, save_at=SAVED_AT)  # a save changes no bit: see the other tests
    assert_resumed(train(recipe, 3, load=tmp_path / f"step-{SAVED_AT:08d}"), undisturbed)


@pytest.mark.slow  # test_parity.py has it with processes, for Muon
@pytest.mark.parametrize("optimizer", ["Muon and AdamW", "Adafactor"])
def test_owners_change_with_the_workers(tmp_path: Path, optimizer: str) -> None:
    recipe = gpt_recipe("bf16", optimizer=OWNED[optimizer])
    undisturbed = train(recipe)
    for source, target in zip(product(WORKERS, SHARDINGS), reversed([*product(WORKERS, SHARDINGS)]), strict=True):
        checkpoint = saved(recipe, tmp_path / f"{source}", *source)
        assert_resumed(train(recipe, *target, load=checkpoint), undisturbed)


def test_factors_of_a_matrix_are_saved_unsplit_by_its_owner_only(tmp_path: Path) -> None:
    for workers, sharding in ((3, "zero2"), (2, "ddp")):
        checkpoint = saved(gpt_recipe(optimizer=OWNED["Adafactor"]), tmp_path / sharding, workers, sharding)
        pieces = read_manifest(checkpoint).pieces
        found = {piece.name: piece.shape for piece in pieces if piece.kind == "row_var"}
        assert len(found) == len([piece for piece in pieces if piece.kind == "row_var"])
        assert found["blocks.1.up.weight"] == (128, 1)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.01, total_steps=10),
    "warm-up, then cosine": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, T_max=7)], milestones=[3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_resumed(tmp_path: Path, schedule: str) -> None:
    recipe = gpt_recipe(schedule=SCHEDULES[schedule])
    checkpoint = saved(recipe, tmp_path, 2)
    with mh.Engine(recipe) as one, mh.Engine(recipe) as other:
        other.load(checkpoint)
        rates = []
        for batch in one.batches(STEPS):
            rates.append(one.step(batch).learning_rates)
        assert [other.step(batch).learning_rates for batch in other.batches(STEPS)] == rates[SAVED_AT:]
        assert len(set(rates)) > 1
        assert other.digest() == one.digest()


def test_an_engine_that_trained_on_can_load_an_earlier_checkpoint(tmp_path: Path) -> None:
    recipe = partly_used_recipe()
    with mh.Engine(recipe) as engine:
        first = engine.save(tmp_path)
        at_first, later = engine.digest(), []
        for _ in range(2):
            later.append([engine.step(batch, digest=True).digest for batch in engine.batches(STEPS)])
            engine.load(first)
            assert engine.step_index == 0
            assert engine.digest() == at_first
        assert later[0] == later[1]


def test_saving_twice_writes_one_checkpoint_and_changes_no_state(tmp_path: Path) -> None:
    recipe = gpt_recipe()
    with mh.Engine(recipe) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
            assert engine.save(tmp_path) == engine.save(tmp_path)
        assert engine.digest() == train(recipe).digest
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    def work(group: Any) -> None:
        with mh.Engine(gpt_recipe(), group=group) as engine:
            for batch in engine.batches(STEPS):
                engine.step(batch)
                engine.save(tmp_path, keep=2)

    run_threads(2, work)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_partial_checkpoint_of_a_killed_save_is_never_loaded_and_is_deleted(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000009.0123456789abcdef.partial"
    leftover.mkdir()
    (leftover / "worker-0.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    saved(gpt_recipe(), tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of the data."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Truncate the file by a third."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGES: dict[str, Callable[[Path], None]] = {"bit flip": flip_a_bit, "truncation": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("file", ["worker-0.safetensors", "worker-1.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, damage: str, file: str, workers: int) -> None:
    recipe = gpt_recipe()
    checkpoint = saved(recipe, tmp_path, 2)
    DAMAGES[damage](checkpoint / file)
    with pytest.raises((CheckpointError, WorkerError)) as caught:
        train(recipe, workers, load=checkpoint)
    assert file in str(caught.value)


def test_an_engine_is_unusable_after_a_load_that_failed_midway(tmp_path: Path) -> None:
    with mh.Engine(gpt_recipe("fp32")) as engine:
        for batch in engine.batches(1):
            engine.step(batch)
        checkpoint = engine.save(tmp_path)
        before = engine.digest()
        (checkpoint / "manifest.json").rename(tmp_path / "away")
        with pytest.raises(CheckpointError):
            engine.load(checkpoint)
        assert engine.digest() == before  # nothing was changed yet
        (tmp_path / "away").rename(checkpoint / "manifest.json")
        flip_a_bit(checkpoint / "worker-0.safetensors")
        with pytest.raises(CheckpointError, match="is damaged"):
            engine.load(checkpoint)
        for use in (engine.digest, lambda: engine.save(tmp_path), lambda: engine.load(checkpoint)):
            with pytest.raises(ConfigError, match="can't be used any more"):
                use()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    recipe = gpt_recipe()
    checkpoint = saved(recipe, tmp_path)
    DAMAGES[damage](checkpoint / "manifest.json")
    with pytest.raises(CheckpointError) as caught:
        train(recipe, load=checkpoint)
    assert str(checkpoint) in str(caught.value)


OTHERS: dict[str, Callable[[], mh.Recipe]] = {
    "seed": lambda: gpt_recipe(seed=12),
    "precision": lambda: gpt_recipe("bf16"),
    "batch.micro_size": lambda: gpt_recipe(batch=mh.Batch(global_size=20, micro_size=4, virtual_workers=5)),
    "clip_norm": lambda: gpt_recipe(clip_norm=None),
    "parameter": lambda: gpt_recipe(model=Wide),
    "optimizer": lambda: gpt_recipe(optimizer=OPTIMIZERS["NAdam"]),
}


@pytest.mark.parametrize("differs", OTHERS)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, differs: str) -> None:
    checkpoint = saved(gpt_recipe(), tmp_path)
    with pytest.raises(CheckpointError, match=f"another recipe: .*{differs}"):
        train(OTHERS[differs](), 2, load=checkpoint)


def test_another_numerics_identity_is_refused_unless_accepted(tmp_path: Path) -> None:
    recipe = gpt_recipe()
    checkpoint = saved(recipe, tmp_path)
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["torch"] = "1.0"
    path.write_text(seal(manifest))
    with mh.Engine(recipe) as engine:
        with pytest.raises(NumericsError, match="different numerics: torch differs"):
            load_checkpoint(engine, checkpoint)
        engine.load(checkpoint, accept_new_numerics=True)
        assert engine.step_index == SAVED_AT


def test_an_error_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with mh.Engine(gpt_recipe()) as engine, pytest.raises(CheckpointError, match="can't be written"):
        engine.save(tmp_path / "file" / "checkpoints")


def test_a_schedule_with_milestones_is_resumed_exactly(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 3, 4], gamma=0.1)

    recipe = gpt_recipe("fp32", schedule=schedule)
    undisturbed = train_with_engine(recipe, mh.Strategy(), steps=6)
    train_with_engine(recipe, mh.Strategy(), steps=2, save=tmp_path)
    resumed = train_with_engine(recipe, mh.Strategy(sharding="ddp"), steps=6, load=tmp_path / "step-00000002")
    assert resumed.digest == undisturbed.digest


def test_a_checkpoint_of_other_weights_at_the_same_step_is_replaced(tmp_path: Path) -> None:
    with mh.Engine(gpt_recipe("fp32")) as engine:
        for batch in engine.batches(1):
            engine.step(batch)
        path = engine.save(tmp_path)
        with torch.no_grad():
            engine.updater.refill(lambda piece: piece.master.add_(1.0))
        expected = engine.digest()
        assert engine.save(tmp_path) == path
    with mh.Engine(gpt_recipe("fp32")) as engine:
        engine.load(path)
        assert engine.digest() == expected


def test_the_newest_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    with mh.Engine(gpt_recipe("fp32")) as engine:
        for batch in engine.batches(1):
            engine.step(batch)
        first = engine.save(tmp_path / "elsewhere")
        for batch in engine.batches(3):
            engine.step(batch)
        engine.save(tmp_path)
        engine.load(first)
        path = engine.save(tmp_path, keep=1)
        assert path.is_dir()
        engine.load(path)
