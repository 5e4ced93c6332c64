"""The run directory: what's written can be read, nothing is half written, others' directories are left alone."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.config import Batch, Recipe, Strategy
from manyhands.doctor.compare import compare_runs, explain_comparison
from manyhands.engine.step.metrics import StepMetrics
from manyhands.errors import ConfigError, DataError
from manyhands.listeners import run_directory
from manyhands.listeners.run_directory import RunDirectory, write_json
from manyhands.storage.run_lock import is_locked, run_lock
from support.models import gpt_recipe
from test_faults import MANYHANDS, SUPPORT


def step_metrics(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        weight=512.0,
        samples=8,
        gradient_norm=0.1,
        learning_rates=(3e-4, 0.1),
        step_seconds=0.5,
        seconds={"compute": 0.4, "communication": 0.1},
        bytes_moved={"grad": 1024},
        digest="ab" * 32 if step % 2 else None,
    )


def make_model() -> nn.Module:
    return nn.Linear(1, 1)


def started(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.write_manifest({"torch": torch.__version__}, Strategy(sharding="zero1"), seed=3)
    return run


def test_files_have_their_paths(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "first")
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "digests", "logs", "tensorboard"]
    run.log(3).write_text("hello\n")
    assert run.log(3) == run.path / "logs" / "worker-3.log"
    assert run.checkpoints.is_dir()
    assert run.digests.is_dir()
    assert run.tensorboard.is_dir()


def test_the_manifest_keeps_the_time_of_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path)
    first = run.read_manifest()
    assert first["numerics"] == {"torch": torch.__version__}
    assert first["strategy"]["sharding"] == "zero1"
    assert first["seed"] == 3
    assert {"python", "torch", "numpy", "manyhands", "platform"} <= set(first["versions"])
    write_json(run.path / "manifest.json", {**first, "created_at": "2001-01-01T00:00:00+00:00"})
    run.write_manifest({}, {"sharding": "ddp"})
    again = RunDirectory.open_existing(tmp_path).read_manifest()
    assert again["created_at"].startswith("2001")
    assert again["updated_at"] >= first["updated_at"]
    assert again["strategy"] == {"sharding": "ddp"}


def test_a_recipe_is_described(tmp_path: Path) -> None:
    run = started(tmp_path)
    recipe = Recipe(
        model=make_model,
        loss=lambda model, batch: batch,
        optimizer=lambda params: torch.optim.SGD([p for _, p in params]),
        data=list(range(10)),
        batch=Batch(global_size=4, micro_size=2),
        clip_norm=1.0,
    )
    run.write_recipe(recipe)
    described = run.read_recipe()
    assert described["batch"] == {"global_size": 4, "micro_size": 2, "virtual_workers": 2}
    assert described["data"] == {"type": "builtins:list", "samples": 10}
    assert ":make_model (" in described["model"]
    assert __file__ in described["loss"]
    assert described["clip_norm"] == 1.0
    assert described["collate"] is None
    run.write_recipe({"model": "package:GPT", "rate": math.inf})
    assert run.read_recipe() == {"model": "package:GPT", "rate": "inf"}


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_metrics() == []
    written = [step_metrics(1), step_metrics(2, math.inf), step_metrics(3, 0.1 + 0.2)]
    for metrics in written:
        run.append_metrics(metrics)
    assert run.read_metrics() == written
    run.append_metrics(step_metrics(4, math.nan))
    assert math.isnan(run.read_metrics()[-1].loss)
    for line in run.metrics.read_text().splitlines():
        entry = json.loads(line, parse_constant=pytest.fail)  # no NaN or Infinity, which JSON doesn't have
        assert set(entry) == {field.name for field in dataclasses.fields(StepMetrics)}


@given(st.integers(0, 300), st.integers(0, 6))
def test_resuming_drops_later_steps_and_a_partial_line(
    tmp_path_factory: pytest.TempPathFactory, torn: int, n: int
) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    for step in range(1, 6):
        run.append_metrics(step_metrics(step))
    text = run.metrics.read_bytes()
    run.metrics.write_bytes(text[: len(text) - torn])
    complete = [step_metrics(1 + step) for step in range(text[: len(text) - torn].count(b"\n"))]
    assert run.read_metrics() == complete
    run.truncate_metrics(n)
    assert run.read_metrics() == complete[:n]
    run.append_metrics(step_metrics(n + 1))
    assert run.read_metrics() == [*complete[:n], step_metrics(n + 1)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.truncate_metrics(0)
    run.append_metrics(step_metrics(1))
    with run.metrics.open("a") as file:
        file.write('{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        run.read_metrics()


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path)
    before = run.read_manifest()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        run.write_manifest({}, {})
    monkeypatch.undo()
    assert run.read_manifest() == before
    assert not list(tmp_path.glob(".*"))


def test_other_directories_are_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not a run directory") as caught:
        RunDirectory(tmp_path)
    assert "thesis.tex" in str(caught.value)
    assert "choose another run_dir" in str(caught.value)
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory(tmp_path / "thesis.tex")
    with pytest.raises(ConfigError, match="can't be written"):
        RunDirectory(tmp_path / "thesis.tex" / "run")
    with pytest.raises(ConfigError, match="can't be written"):
        RunDirectory("/proc/run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "manifest.json")  # another program's
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory(tmp_path)


def test_run_directories_are_reopened_with_foreign_files_or_without_a_manifest(tmp_path: Path) -> None:
    started(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").touch()
    RunDirectory(tmp_path / "a")
    unfinished = RunDirectory(tmp_path / "b")
    unfinished.append_metrics(step_metrics(1))
    (tmp_path / "b" / ".manifest.json.77.tmp").touch()
    RunDirectory(tmp_path / "b")


@pytest.mark.parametrize(
    ("found", "writer"),
    [(1, "a development version before 0.1.0"), (2, "a development version before 0.1.0"), (4, "a newer version")],
)
def test_a_directory_of_another_format_is_refused(found: int, writer: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_manifest({}, {})
    manifest = run.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("manyhands run 3", f"manyhands run {found}"))
    before = manifest.read_bytes()
    for use in (RunDirectory, RunDirectory.open_existing):
        with pytest.raises(ConfigError, match="the run directory has another format") as caught:
            use(run.path)
        assert writer in str(caught.value)
    assert manifest.read_bytes() == before


def test_readers_get_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run directory here"):
        RunDirectory.open_existing(tmp_path / "absent")
    started(tmp_path / "first")
    started(tmp_path / "second").append_metrics(step_metrics(1))
    with pytest.raises(ConfigError, match=r"the runs first, second"):
        RunDirectory.open_existing(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a run directory"):
        RunDirectory.open_existing(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    assert len(RunDirectory.open_existing(tmp_path / "second").read_metrics()) == 1
    (tmp_path / "first" / "recipe.json").write_text("{")
    with pytest.raises(DataError, match=r"recipe\.json can't be read"):
        RunDirectory.open_existing(tmp_path / "first").read_recipe()


def test_training_into_another_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    for path, got in ((file, "a file"), (tmp_path / "foreign", "a directory with thesis.txt")):
        with pytest.raises(mh.ConfigError, match="not a run directory") as caught:
            mh.train(gpt_recipe(), steps=1, run_dir=path, show=False)
        assert caught.value.got == got
    assert os.listdir(tmp_path / "foreign") == ["thesis.txt"]


def test_a_partial_line_in_the_middle_affects_no_other_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2):
        run.append_event("saved", step=step)
        run.append_metrics(step_metrics(step))
        for path in (run.path / "events.jsonl", run.metrics):
            path.write_bytes(path.read_bytes() + b'{"seconds": 1, "ev')
    assert [event["step"] for event in run.read_events()] == [1, 2]
    assert run.read_metrics() == [step_metrics(1), step_metrics(2)]
    (run.path / "events.jsonl").write_bytes(b'{"seconds": 1, "ev{"seconds": 1}\n[]\n{}\n')
    assert run.read_events() == []


def test_a_partly_written_line_is_an_error(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.append_event("saved", step=1)
    size = (run.path / "events.jsonl").stat().st_size
    code = (
        "import resource, signal, sys; from manyhands.listeners.run_directory import RunDirectory\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 9}, {size + 9}))\n"
        "RunDirectory(sys.argv[1]).append_event('saved', step=2)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False)
    assert "the run directory can't be written: File too large" in done.stderr
    assert (run.path / "events.jsonl").stat().st_size == size + 9
    run.append_event("saved", step=3)
    assert [event["step"] for event in run.read_events()] == [1, 3]


def test_a_run_directory_has_one_owner(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run")
    assert is_locked(tmp_path / "run") is None
    with run_lock(tmp_path / "run"):
        assert is_locked(tmp_path / "run")
        with pytest.raises(ConfigError, match="the run is already in progress") as caught, run_lock(tmp_path / "run"):
            pass
        assert str(os.getpid()) in str(caught.value.got)
        RunDirectory(tmp_path / "run")  # also before its manifest is there
    assert is_locked(tmp_path / "run") is False
    with run_lock(tmp_path / "run"):
        pass


def test_a_run_starts_on_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with run_lock(tmp_path):
        assert is_locked(tmp_path) is None
    with run_lock(tmp_path / "nowhere"):
        pass


def test_an_active_run_is_not_started_twice(tmp_path: Path) -> None:
    with run_lock(RunDirectory(tmp_path / "run").path):
        with pytest.raises(ConfigError, match="the run is already in progress"):
            mh.train(gpt_recipe(), steps=1, run_dir=tmp_path / "run", show=False)
        command = [
            *MANYHANDS,
            "train",
            str(SUPPORT / "faulty.toml"),
            "--workers",
            "1",
            "--run-dir",
            str(tmp_path / "run"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2
    assert f"process {os.getpid()} on" in done.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()
    mh.train(gpt_recipe(), steps=1, run_dir=tmp_path / "run", show=False)


def test_tables_of_hashes_are_bounded_and_runs_keep_those_of_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "MOST_TABLES", 16)
    kept = {}
    for name, steps in (("short", 500), ("long", 2000)):
        run = RunDirectory(tmp_path / name)
        (run.digests / "step-00000001.npy").symlink_to(tmp_path / "mine")
        for step in range(10, steps + 1, 10):
            run.write_digests(step, np.zeros(3, dtype=np.uint64))
        kept[name] = {int(path.stem[5:]) for path in run.digests.glob("step-*.npy") if not path.is_symlink()}
        assert (run.digests / "step-00000001.npy").is_symlink()
        assert len(kept[name]) <= 16
        assert {steps - 10 * back for back in range(7)} <= kept[name]
    assert len({step for step in kept["long"] if step <= 500} & kept["short"]) >= 1
    monkeypatch.setattr(run_directory, "MOST_TABLE_BYTES", 1)
    run.write_digests(2010, np.zeros(3, dtype=np.uint64))
    assert 2010 in {int(path.stem[5:]) for path in run.digests.glob("step-*.npy")}


def test_a_difference_is_located_in_a_later_table_if_the_first_is_deleted(tmp_path: Path) -> None:
    for name in ("one", "other"):
        run = RunDirectory(tmp_path / name)
        run.write_manifest({}, {})
        run.write_recipe({})
        write_json(run.digests / "tensors.json", {"tensors": [["weight", 2048]], "buffers": {}})
        for step in (1, 2, 3):
            run.append_metrics(dataclasses.replace(step_metrics(step), digest=f"{name if step > 1 else ''}{step}"))
        run.write_digests(3, np.array([7, 8 if name == "one" else 9], dtype=np.uint64))
    comparison = compare_runs(tmp_path / "one", tmp_path / "other")
    assert (comparison.step, comparison.located_step, comparison.tensor, comparison.block) == (2, 3, "weight", 1)
    assert "found after step 3" in explain_comparison(comparison, "one", "other")
