"""Sources and destinations of exports: runs, checkpoints, folders, damage, sizes, and the command."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.checkpoint.export import parse_size, plan_shards
from manyhands.storage.sealed import seal
from manyhands.storage.tensor_file import TensorEntry
from support.command import run_command
from support.exporting import FrozenStem, Trained, assert_same, contents, weights
from support.models import conv_recipe, gpt_recipe

# - Where it comes from and where it goes


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps with the checkpoints of steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("runs") / "first"
    mh.train(gpt_recipe(), steps=3, run_dir=path, checkpoint_every=1, digest_every=1, show=False)
    return path


def test_a_runs_checkpoint_is_found(run_dir: Path, tmp_path: Path) -> None:
    last = mh.export(run_dir, tmp_path / "last")
    assert (last.step, last.checkpoint) == (3, str(run_dir / "checkpoints" / "step-00000003"))
    assert mh.export(run_dir, tmp_path / "second", step=2).step == 2
    assert mh.export(run_dir / "checkpoints", tmp_path / "third").digest == last.digest
    assert mh.export(run_dir / "checkpoints" / "step-00000001", tmp_path / "one", step=1).step == 1
    assert contents(tmp_path / "third") == contents(tmp_path / "last")


def test_an_empty_folder_is_filled_and_leftovers_are_removed(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    calls: list[tuple[int, int]] = []
    summary = mh.export(run_dir, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert os.listdir(tmp_path) == ["out"]
    assert calls == sorted(calls)
    assert calls[-1] == (summary.weights_bytes, summary.weights_bytes)


@pytest.mark.parametrize(("cwd", "run", "out"), [("step-00000002", ".", "../../out"), (".", "step-00000002", "../out")])
def test_relative_paths_work(tmp_path: Path, cwd: str, run: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(conv_recipe(model=FrozenStem), tmp_path / "checkpoints")
    monkeypatch.chdir(trained.checkpoint.parent / cwd)
    mh.export(run, out)
    assert_same(weights(tmp_path / "out"), trained.own)


def flip_bits(path: Path) -> None:
    """Change every 16th byte of the data, so that weights are damaged, too (moments are not read)."""
    data = bytearray(path.read_bytes())
    for place in range(8 + int.from_bytes(data[:8], "little"), len(data), 16):
        data[place] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_bits, truncate, Path.unlink])
@pytest.mark.parametrize("where", ["step-*/worker-0", "step-*/worker-1", "frozen-*/worker-1"])
def test_a_damaged_checkpoint_is_refused_and_named_and_nothing_is_written(
    tmp_path: Path, where: str, damage: Callable[[Path], None]
) -> None:
    checkpoint = Trained(conv_recipe(model=FrozenStem), tmp_path / "checkpoints", 2).checkpoint
    (path,) = checkpoint.parent.glob(f"{where}.safetensors")
    damage(path)
    (tmp_path / "out").mkdir()
    with pytest.raises(mh.CheckpointError, match=r"damaged|missing or broken") as caught:
        mh.export(checkpoint, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "out"]
    assert os.listdir(tmp_path / "out") == []


def changed(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(seal(json.loads(path.read_text()) | fields))


def test_weights_that_differ_from_the_manifests_digest_are_refused(tmp_path: Path) -> None:
    checkpoint = Trained(gpt_recipe(), tmp_path / "checkpoints").checkpoint
    changed(checkpoint, digest="0" * 64)
    with pytest.raises(mh.CheckpointError, match="not those that were saved"):
        mh.export(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoint = Trained(gpt_recipe(), tmp_path / "checkpoints").checkpoint
    for found, hint in (
        (4, "a development version before 0.1.0 wrote it"),
        (6, "a newer version of Manyhands wrote it"),
    ):
        (checkpoint / "manifest.json").write_text(f'{{"format": {found}, "step": 2}}')
        with pytest.raises(mh.CheckpointError, match="another format") as caught:
            mh.export(checkpoint.parent, tmp_path / "out")
        assert (caught.value.expected, caught.value.got) == ("5", str(found))
        assert hint in str(caught.value)


def taken_file(path: Path) -> None:
    path.write_text("mine")


def taken_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


@pytest.mark.parametrize("take", [taken_file, taken_folder])
def test_an_existing_destination_is_not_changed(run_dir: Path, tmp_path: Path, take: Callable[[Path], None]) -> None:
    take(tmp_path / "out")
    with pytest.raises(mh.ConfigError, match="the export's destination is not empty"):
        mh.export(run_dir, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").is_file() or os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_two_exports_to_one_folder_do_not_mix(run_dir: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "of-another-process").write_text("")
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(mh.ConfigError, match=r"another process is exporting(?s:.*)RANK"):
        mh.export(run_dir, out)
    assert os.listdir(tmp_path) == [".out.partial"]
    assert os.listdir(partial) == ["of-another-process"]
    os.close(other)  # as when that process is killed
    mh.export(run_dir, out)
    assert os.listdir(tmp_path) == ["out"]
    assert "of-another-process" not in os.listdir(out)


def test_wrong_export_options_are_refused(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(mh.ConfigError, match="no checkpoint of step 7") as caught:
        mh.export(run_dir, out, step=7)
    assert caught.value.expected == "one of 1, 2, 3"
    with pytest.raises(mh.ConfigError, match="no checkpoint of step 2"):
        mh.export(run_dir / "checkpoints" / "step-00000001", out, step=2)
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(mh.ConfigError, match="there is no checkpoint here"):
            mh.export(nothing, out)
    with pytest.raises(mh.ConfigError, match="weights can't have this dtype"):
        mh.export(run_dir, out, dtype="fp8")
    with pytest.raises(mh.ConfigError, match="max_shard_size can't be parsed"):
        mh.export(run_dir, out, max_shard_size="large")
    with pytest.raises(mh.CheckpointError, match="the export can't be written"):
        mh.export(run_dir, "/proc/export")
    (tmp_path / "file").touch()
    with pytest.raises(mh.CheckpointError, match="the export can't be written"):
        mh.export(run_dir, tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("2GiB", 2**31), ("7B", 7), ("7", 7), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", 0, -1, "5G5", "5 apples", "GB", "0.1B"])
def test_an_invalid_size_is_refused(text: str | int) -> None:
    with pytest.raises(mh.ConfigError):
        parse_size(text)


def test_shards_are_filled_in_order() -> None:
    entries = [TensorEntry(f"t{index}", torch.int8, (numel,)) for index, numel in enumerate([6, 6, 2, 20, 1, 9, 0])]
    planned = [[entry.name for entry in shard] for shard in plan_shards(entries, 10).values()]
    assert planned == [["t0"], ["t1", "t2"], ["t3"], ["t4", "t5", "t6"]]
    assert list(plan_shards(entries, 20))[-1] == "model-00003-of-00003.safetensors"
    assert list(plan_shards(entries, 44)) == ["model.safetensors"]


# - The command


def test_the_export_command_prints_its_result(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = mh.export(run_dir, tmp_path / "by hand", step=2, dtype="bf16", max_shard_size="20KB").digest
    options = ("--step", 2, "--dtype", "bf16", "--max-shard-size", "20KB")
    code, text = run_command(capsys, monkeypatch, "export", run_dir, tmp_path / "out", *options)
    assert code == 0
    for part in (
        "after step 2",
        "in bfloat16",
        "model.safetensors.index.json",
        digest,
        "no config.json",
        "step-00000002",
    ):
        assert part in text
    assert contents(tmp_path / "out") == contents(tmp_path / "by hand")
    code, text = run_command(capsys, monkeypatch, "export", run_dir, tmp_path / "json", "--json")
    shown = json.loads(text)
    assert (code, shown["step"], shown["files"], shown["has_config"]) == (0, 3, ["model.safetensors"], False)


def test_the_export_command_prints_errors(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = run_command(capsys, monkeypatch, "export", run_dir, tmp_path / "out", "--step", 9)
    assert code == 2
    assert "the run has no checkpoint of step 9" in text
    assert "Traceback" not in text
