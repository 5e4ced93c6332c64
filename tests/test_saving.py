"""Checkpoints written while training continues contain the state at their start, complete or not at all."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import manyhands as mh
from manyhands.checkpoint import save
from manyhands.checkpoint.format import list_checkpoints
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError
from manyhands.intervals import Every, every
from manyhands.listeners.run_directory import RunDirectory
from support.models import gpt_recipe
from support.threads import run_threads
from support.training import train_with_engine

STEPS = 4


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit the size of this process's files to a few bytes: writes fail as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_a_checkpoint_has_the_state_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, sharding: str
) -> None:
    go_on = threading.Event()
    write_pieces = save.write_pieces

    def late(*args: Any) -> Any:
        assert go_on.wait(240)
        return write_pieces(*args)

    monkeypatch.setattr(save, "write_pieces", late)

    def work(group: Group) -> str:
        with mh.Engine(gpt_recipe("bf16"), mh.Strategy(sharding=sharding), group=group) as engine:
            for batch in engine.batches(STEPS):
                engine.step(batch)
                if engine.step_index == 2:
                    engine.begin_save(tmp_path)
                    assert engine.is_saving
            assert steps_in(tmp_path) == []
            group.barrier("test / control")
            go_on.set()
            assert engine.finish_save() == tmp_path / "step-00000002"
            assert engine.finish_save() is None
            return engine.digest()

    digests = set(run_threads(workers, work))
    assert digests == {train_with_engine(gpt_recipe("bf16"), mh.Strategy(), steps=STEPS).digest}
    resumed = train_with_engine(gpt_recipe("bf16"), mh.Strategy(), steps=STEPS, load=tmp_path / "step-00000002")
    assert digests == {resumed.digest}


def test_a_pending_checkpoint_is_finished_before_the_engine_closes(tmp_path: Path) -> None:
    with mh.Engine(gpt_recipe()) as engine:
        engine.begin_save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_full_disk_is_reported_on_all_workers_and_training_continues(tmp_path: Path) -> None:
    def work(group: Group) -> tuple[str, str]:
        with mh.Engine(gpt_recipe(), group=group) as engine:
            engine.save(tmp_path)
            for batch in engine.batches(STEPS):
                engine.step(batch)
                if engine.step_index == 2:
                    group.barrier("test / control")
                    with full_disk() if group.rank == 0 else contextmanager(lambda: iter([None]))():
                        engine.begin_save(tmp_path)
                        with pytest.raises(CheckpointError, match="can't be written") as caught:
                            engine.finish_save()
                        group.barrier("test / control")
                    assert steps_in(tmp_path) == [0]
            engine.save(tmp_path)
            return str(caught.value), engine.digest()

    found = run_threads(2, work)
    assert {digest for _, digest in found} == {train_with_engine(gpt_recipe(), mh.Strategy(), steps=STEPS).digest}
    assert len({words for words, _ in found}) == 1
    assert "File too large" in found[0][0]
    assert str(tmp_path) in found[0][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000000", "step-00000004"]


def test_a_run_reports_a_failed_checkpoint_and_tries_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([OSError(28, os.strerror(28)), OSError(28, os.strerror(28))])
    write_pieces = save.write_pieces

    def sometimes(*args: Any) -> Any:
        error = next(failures, None)
        if error is not None:
            raise error
        return write_pieces(*args)

    monkeypatch.setattr(save, "write_pieces", sometimes)
    summary = mh.train(gpt_recipe(), steps=4, run_dir=tmp_path, checkpoint_every=1)
    assert summary.digest == train_with_engine(gpt_recipe(), mh.Strategy(), steps=4).digest
    assert steps_in(tmp_path / "checkpoints") == [3, 4]
    output = capsys.readouterr().err
    assert output.count("training continues, but the checkpoint can't be written: No space left on device") == 2


def test_keep_every_retains_checkpoints(tmp_path: Path) -> None:
    mh.train(gpt_recipe(), steps=7, run_dir=tmp_path, checkpoint_every="1step", keep_checkpoints=2, keep_every=3)
    assert steps_in(tmp_path / "checkpoints") == [3, 6, 7]


def test_links_among_checkpoints_stay_and_saves_go_on(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run" / "checkpoints", tmp_path / "elsewhere"
    mh.train(gpt_recipe(), steps=1, run_dir=tmp_path / "run", show=False)
    (root / "step-00000001").rename(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    links = ["step-00000001", ".step-00000000.old.partial", ".frozen-0123456789abcdef.partial"]
    for name in links:
        (root / name).symlink_to(elsewhere)
    (root / "step-00000003").symlink_to(tmp_path / "nowhere")  # dangling, where a checkpoint is to be saved
    (root / "step-00000004").write_text("mine")
    mh.train(gpt_recipe(), steps=5, run_dir=tmp_path / "run", checkpoint_every=1, keep_checkpoints=2, show=False)
    events = [event["event"] for event in RunDirectory(tmp_path / "run").read_events()]
    assert "not saved" not in events
    assert steps_in(root) == [1, 4, 5]
    left = {path.name: path.readlink() for path in root.iterdir() if path.is_symlink()}
    assert [left.pop(name) for name in links] == [elsewhere] * 3
    assert list(left.values()) == [tmp_path / "nowhere"]  # under another name
    assert [path.read_text() for path in root.iterdir() if path.is_file()] == ["mine"]
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_a_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_checkpoint = save.remove_checkpoint

    def refuse(folder: Any) -> None:
        if folder.name == "step-00000001":
            raise PermissionError(1, "Operation not permitted", str(folder))
        remove_checkpoint(folder)

    monkeypatch.setattr(save, "remove_checkpoint", refuse)
    mh.train(gpt_recipe(), steps=4, run_dir=tmp_path, checkpoint_every=1, keep_checkpoints=1, show=False)
    assert steps_in(tmp_path / "checkpoints") == [1, 4]
    assert "step-00000001 can't be deleted: Operation not permitted" in capsys.readouterr().err


def test_the_clock_of_worker_0_decides_when_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 30))
    # Only the saver's clock: threads that look at the time themselves must not advance it.
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("manyhands.training.saver.time", clock)
    mh.train(gpt_recipe(), steps=5, run_dir=tmp_path, checkpoint_every="1m", keep_checkpoints=9, show=False)
    assert steps_in(tmp_path / "checkpoints") == [2, 4, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (500, Every(steps=500)),
        ("500", Every(steps=500)),
        ("1step", Every(steps=1)),
        ("500 steps", Every(steps=500)),
        ("30s", Every(seconds=30)),
        ("10m", Every(seconds=600)),
        ("2h", Every(seconds=7200)),
    ],
)
def test_an_interval_is_parsed(text: int | str, expected: Every) -> None:
    assert every(text) == expected


@pytest.mark.parametrize("text", ["", "0", "10 minutes", "-3", "1.5h", "steps"])
def test_an_invalid_interval_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="interval between checkpoints") as caught:
        every(text)
    assert "10m" in str(caught.value)
