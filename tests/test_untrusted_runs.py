"""A stranger's run directory or corpus leads nowhere outside, never hangs, prints no escapes, and gives our errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import manyhands as mh
from manyhands.doctor.compare import compare_runs
from manyhands.doctor.runs import run_history
from manyhands.listeners.run_directory import RunDirectory
from manyhands.storage import untrusted
from manyhands.storage.run_lock import LOCK
from support.models import gpt_recipe
from test_faults import MANYHANDS


def train(run_dir: Path, **more: object) -> mh.Summary:
    recipe = gpt_recipe(batch=mh.Batch(global_size=2, micro_size=2))
    return mh.train(recipe, **{"steps": 2, "run_dir": run_dir, "show": False, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "run"
    train(folder, digest_every=1)
    return folder


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return shutil.copytree(honest, tmp_path / "run")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def elsewhere(path: Path) -> None:
    path.symlink_to(path.parents[2] / "outside")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def folder(path: Path) -> None:
    path.mkdir()


def nested(path: Path) -> None:
    path.write_text("[" * 200_000 + "\n")


@pytest.mark.parametrize("what", [fifo, zero, elsewhere, pytest.param(huge, marks=pytest.mark.slow), folder, nested])
def test_every_file_of_a_run_may_be_something_else(
    run: Path, honest: Path, what: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted.read_inside, "__defaults__", (1 << 24,))
    checkpoint = run / "checkpoints" / "step-00000002"
    files = ["manifest.json", "recipe.json", "metrics.jsonl", "events.jsonl", "digests/step-00000001.npy"]
    files += ["digests/tensors.json", "logs/worker-1.log"]
    (run.parent / "outside").write_text('{"format": "manyhands run 3"}\n')
    reads = (
        lambda: run_history(RunDirectory.open_existing(run)),
        lambda: compare_runs(run, honest),
        lambda: mh.export(run, run.parent / "out"),
    )
    for path in [run / name for name in files] + [checkpoint / "manifest.json", checkpoint / "worker-0.safetensors"]:
        kept = path.with_name("kept")
        if path.exists():
            path.rename(kept)
        what(path)
        for read in reads:
            with suppress(mh.ManyhandsError):
                read()
        shutil.rmtree(run.parent / "out", ignore_errors=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kept.exists():
            kept.rename(path)
    assert compare_runs(run, honest).equal


FORGED = [
    {"event": "started", "seconds": 1e300},
    {"event": "failed", "seconds": 1.0, "rank": "../../../etc/passwd"},
    {"event": "failed", "seconds": 1.0, "rank": 10**30},
    {"event": "ended", "seconds": "soon"},
    {"event": ["ended"], "seconds": 1.0},
    {"event": "started", "seconds": 1.0},
    {"event": "saved", "seconds": 2.0},
    {"event": "amended", "seconds": 2.0},
    {"event": "skipped", "seconds": 2.0},
    {"event": "started", "seconds": 2.0, "oom_kills": "many"},
    {"event": "not saved", "seconds": 3.0},
    {
        "event": "failed",
        "seconds": 4.0,
        "rank": 0,
        "oom_kills": [],
        "what": "\x1b]0;owned\x07\u202egpj",
        "hint": "\x1b[2J",
    },
]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MANYHANDS, *map(str, arguments)], capture_output=True, text=True, timeout=240)


def test_forged_records_give_no_traceback_and_print_no_escapes(run: Path, honest: Path) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in FORGED))
    (run / "logs" / "worker-0.log").write_text("\x1b[31mred\n")
    shown = call("doctor", run)
    assert "Traceback" not in shown.stderr
    assert "\\x1b]0;owned\\x07\\u202egpj" in shown.stdout
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps(recipe | {"\x1b[2J": 1}))
    compared = subprocess.run(
        [*MANYHANDS, "compare", str(run), str(honest)], capture_output=True, text=True, timeout=240
    )
    assert "\\x1b[2J is 1 in one run" in compared.stdout
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"format": "manyhands run \x1b[2J"}))
    refused = call("doctor", run)
    assert refused.returncode == 2
    assert "got: manyhands run \\x1b[2J" in refused.stderr
    assert "\x1b" not in shown.stdout + shown.stderr + compared.stdout + compared.stderr + refused.stderr


def test_forged_tables_are_refused(run: Path, honest: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["digest"] = "another"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = run / "digests" / "step-00000001.npy"
    with table.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (1 << 50,)})
    assert compare_runs(run, honest).tensor is None
    np.save(table, np.array([print], dtype=object), allow_pickle=True)
    assert compare_runs(run, honest).tensor is None
    for tensors, buffers in (([["w", -5]], {}), (7, {}), ([], 7)):
        (run / "digests" / "tensors.json").write_text(json.dumps({"tensors": tensors, "buffers": buffers}))
        with pytest.raises(mh.DataError, match="the run's list of parameters and buffers can't be read"):
            compare_runs(run, honest)
    for forged in ({"step": "1"}, {"digest": 5}):
        (run / "metrics.jsonl").write_text(json.dumps(lines[0] | forged) + "\n")
        with pytest.raises(mh.DataError, match=r"a line of metrics\.jsonl does not hold the metrics of a step"):
            compare_runs(run, honest)


def test_a_run_writes_through_no_link(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious\n")
    for name in ("events.jsonl", "metrics.jsonl", "logs/worker-0.log", LOCK):
        path = run / name
        kept = path.with_name("kept")
        path.rename(kept)
        path.symlink_to(outside)
        with suppress(mh.ManyhandsError):
            train(run, steps=3)
        assert outside.read_text() == "precious\n", name
        path.unlink()
        kept.rename(path)
    (run / "digests").rename(run / "kept")
    (tmp_path / "other").mkdir()
    (run / "digests").symlink_to(tmp_path / "other")
    with pytest.raises(mh.ConfigError, match="a folder of the run directory is a link"):
        train(run, steps=3)
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("address", ["local", "owned", "memory://bucket/folder", "http://127.0.0.1:9/folder"])
def test_checkpoints_that_only_the_manifest_names_are_not_followed(run: Path, tmp_path: Path, address: str) -> None:
    """They may belong to another run of the user, whose old checkpoints would be deleted."""
    mine = tmp_path / "mine"
    checkpoints = tmp_path / "checkpoints" if address == "owned" else mine / "checkpoints"
    train(mine, steps=4, checkpoint_every=1, checkpoint_dir=checkpoints)
    before = sorted(path.name for path in checkpoints.iterdir())
    manifest = json.loads((run / "manifest.json").read_text())
    place = address if "://" in address else str(checkpoints)
    (run / "manifest.json").write_text(json.dumps(manifest | {"checkpoints": place}))
    message = "the run's checkpoints are in a place that only its manifest names"
    if address == "owned":
        message = "the checkpoints here belong to another run"
    with pytest.raises(mh.ConfigError, match=message):
        train(run, steps=6, adopt=True, keep_checkpoints=1)
    with pytest.raises(mh.ConfigError, match=message):
        mh.export(run, tmp_path / "out")
    (run / "events.jsonl").unlink()
    assert message in run_history(RunDirectory.open_existing(run)).advice
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_a_corpus_names_only_its_own_files(tmp_path: Path) -> None:
    made = tmp_path / "made"
    mh.Dataset.from_records([{"tokens": [1, 2, 3, 4]}] * 8).write(made, format="tokens", workers=0, progress=False)
    assert len(mh.TokenFile(made, 4)) > 0
    manifest = json.loads((made / "_manifest.json").read_text())
    (file,) = manifest["files"]
    secret = (made / file["name"]).rename(tmp_path / "secret")
    (made / file["name"]).symlink_to(secret)
    with pytest.raises(mh.DataError, match="a token file can't be read: it is a link or a path that leads out"):
        mh.TokenFile(made, 4)
    for name in ("../secret", str(secret), 7):
        (made / "_manifest.json").write_text(json.dumps(manifest | {"files": [file | {"name": name}]}))
        with pytest.raises(mh.DataError, match="names something that is not a file of its folder"):
            mh.TokenFile(made, 4)
