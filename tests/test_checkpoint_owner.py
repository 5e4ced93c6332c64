"""A folder of checkpoints belongs to one run: two runs never overwrite or read each other's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints
from manyhands.checkpoint.owner import owner_of, run_in
from manyhands.cli.train import new_directory
from manyhands.doctor.runs import run_history
from manyhands.errors import CheckpointError, ConfigError
from manyhands.listeners.run_directory import RunDirectory
from manyhands.storage.run_lock import run_lock
from support.models import gpt_recipe


def train(run_dir: Path | None, checkpoint_dir: Path | None = None, *, steps: int = 1, **more: Any) -> mh.Summary:
    recipe = gpt_recipe(seed=more.pop("seed", 11), batch=mh.Batch(global_size=2, micro_size=2))
    return mh.train(recipe, steps=steps, run_dir=run_dir, checkpoint_dir=checkpoint_dir, show=False, **more)


def refused(run_dir: Path | None, checkpoint_dir: Path | None, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError, match="the checkpoints here belong to another run") as caught:
        train(run_dir, checkpoint_dir, **more)
    return caught.value


def test_a_second_run_with_the_same_checkpoint_dir_is_refused(tmp_path: Path) -> None:
    one, other, folder = tmp_path / "one", tmp_path / "other", tmp_path / "checkpoints"
    first = train(one, folder)
    error = refused(other, folder, seed=5)
    assert str(run_in(one)) == error.got
    assert str(other) in str(error.expected)
    assert "--adopt" in str(error.hint)
    refused(None, folder)
    assert RunDirectory(other).read_metrics() == []
    assert train(one, folder, steps=2).digest != first.digest  # the owner continues

    adopted = train(other, folder, steps=3, adopt=True)
    assert len(RunDirectory(other).read_metrics()) == 1  # it continued from step 2
    refused(one, None)
    with pytest.raises(ConfigError, match="belong to another run") as caught:
        mh.export(one, tmp_path / "exported")
    assert str(other) in str(caught.value.got)
    RunDirectory(one).append_event("failed", rank=0, what="x", where=None, hint=None, restart=None)
    assert f"{other}" in run_history(RunDirectory.open_existing(one)).advice
    assert mh.export(other, tmp_path / "exported").digest == adopted.digest


def test_a_run_without_a_directory_does_not_share_checkpoints_with_one_that_has_a_directory(tmp_path: Path) -> None:
    train(None, tmp_path / "checkpoints")
    train(None, tmp_path / "checkpoints", steps=2)
    assert "a run without a run directory" in str(refused(tmp_path / "run", tmp_path / "checkpoints").got)
    with run_lock(tmp_path / "checkpoints"), pytest.raises(ConfigError, match="already in progress"):
        train(None, tmp_path / "checkpoints", steps=3)


def test_checkpoints_in_another_run_directory_belong_to_that_run(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train(one)
    assert str(one) in str(refused(other, one / "checkpoints").got)
    shutil.rmtree(other)
    other.mkdir()
    (other / "checkpoints").symlink_to(one / "checkpoints")
    assert str(one) in str(refused(other, None).got)
    train(other, adopt=True, steps=2)
    refused(one, None)
    train(one, adopt=True, steps=3)
    refused(other, None)


def test_a_moved_run_keeps_its_checkpoints_and_a_copy_does_not_get_them(tmp_path: Path) -> None:
    one, moved, copy, folder = tmp_path / "one", tmp_path / "moved", tmp_path / "copy", tmp_path / "checkpoints"
    train(one, folder)
    one.rename(moved)
    train(moved, steps=2)
    assert owner_of(folder) == run_in(moved)
    shutil.copytree(moved, copy)
    assert str(moved) in str(refused(copy, None).got)
    shutil.copytree(folder, tmp_path / "own")
    train(copy, tmp_path / "own", steps=3, adopt=True)
    train(moved, steps=3)
    shutil.copytree(tmp_path / "own", tmp_path / "second")
    (tmp_path / "second" / "run.json").unlink()
    train(tmp_path / "third", tmp_path / "second", steps=4)  # checkpoints without an owner, as Engine.save leaves them


def test_a_run_in_progress_is_not_robbed_and_stops_writing_when_it_was(tmp_path: Path) -> None:
    one, other, folder = tmp_path / "one", tmp_path / "other", tmp_path / "checkpoints"
    train(one, folder)
    with (
        run_lock(one),
        pytest.raises(ConfigError, match="the run whose checkpoints are to be adopted is in progress") as caught,
    ):
        train(other, folder, adopt=True)
    assert str(one) in str(caught.value.got)
    recipe = gpt_recipe(batch=mh.Batch(global_size=2, micro_size=2))

    def loss(model: Any, batch: Any) -> Any:  # another host's lock is not seen here: it adopts during step 2
        (folder / "run.json").write_text(json.dumps({"run": "0123", "directory": "/elsewhere"}))
        return recipe.loss(model, batch)

    stolen = gpt_recipe(batch=recipe.batch, loss=loss)
    with pytest.raises(CheckpointError, match="another run has adopted the folder") as error:
        mh.train(stolen, steps=2, run_dir=one, show=False)
    assert "/elsewhere" in str(error.value.got)
    assert [step for step, _ in list_checkpoints(folder)] == [1]


def test_an_unreadable_owner_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "one", tmp_path / "checkpoints")
    for text in ("{", "[]", '{"run": 1}'):
        (tmp_path / "checkpoints" / "run.json").write_text(text)
        assert "run.json can't be read" in str(refused(tmp_path / "one", None).got)
    train(tmp_path / "one", tmp_path / "checkpoints", adopt=True, steps=2)


def test_two_runs_that_start_in_the_same_second_get_two_directories(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "gpt-20260101-000000"
    assert [new_directory(path).name for _ in range(3)] == [path.name, f"{path.name}-2", f"{path.name}-3"]
