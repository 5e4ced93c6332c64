"""Wrong commands and runs: a clear error states what failed, where and what to do, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.storage.sealed import seal
from support.command import run_command
from test_bad_input import RECIPE, SUPPORT, recipe

# - The command line


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown field": (["--set", "sead=3"], ["sead is not known", "--set sead=3", "did you mean 'seed'?"]),
    "wrong type": (["--set", "seed=x"], ["seed has a wrong value", "--set seed=x", "integer", "'x'"]),
    "batch": (
        ["--set", "batch.global_size=7"],
        [
            "batch.global_size can't be divided into micro-batches",
            "--set batch.global_size=7",
            "use global_size = 6 or 8",
        ],
    ),
    "workers": (["--workers", "5"], ["5 workers are too many for a step of 4 micro-batches", "at most 4 workers"]),
    "no workers": (["--workers", "0"], ["0 is not an integer of at least 1"]),
    "sharding": (
        ["--sharding", "zero9"],
        ["strategy.sharding has an unknown value", "ddp, zero1, zero2", "did you mean 'zero3'?"],
    ),
    "transport": (
        ["--transport", "shared"],
        ["strategy.transport has an unknown value", "did you mean 'shared-memory'?"],
    ),
    "a file as run_dir": (["--run-dir", RECIPE], ["not a run directory", RECIPE, "got: a file", "nothing was written"]),
    "a foreign run_dir": (["--run-dir", str(SUPPORT)], ["not a run directory", "a directory with", "__init__.py"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_workers_start(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, texts = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    code, output = run_command(capsys, monkeypatch, "train", RECIPE, *options)
    assert code == 2
    for text in texts:
        assert text in output, output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe_or_script_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = run_command(capsys, monkeypatch, "train", SUPPORT / "fault.toml")
    assert code == 2
    assert f"there is no recipe {SUPPORT / 'fault.toml'}" in output
    assert "did you mean 'faulty.toml'?" in output
    code, output = run_command(capsys, monkeypatch, "run", "nowhere.py")
    assert code == 2
    assert "there is no such script" in output


MODULE = """
import os, torch
from torch import nn
import manyhands as mh

def corpus(kind):
    if kind == "file":
        return open("/nowhere/corpus.bin")
    raise mh.DataError("the corpus isn't there", where="/nowhere/corpus.bin", hint="run download.sh")

def model():
    return nn.Linear(8, 8 + int(os.environ["RANK"]))
"""


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        pytest.param(
            ["data.path=own:corpus", "data.arguments.kind=data"],
            1,
            "the corpus isn't there\n  where: /nowhere/corpus.bin\n  what to do: run download.sh\n",
            id="DataError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["data.path=own:corpus", "data.arguments.kind=file"],
            1,
            "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/corpus.bin'\n",
            id="FileNotFoundError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model.path=own:model", "strategy.units=[]"],
            2,
            "workers 0 and 1 don't have the same model: they differ in weight\n  expected: [8, 8] ",
            id="ConfigError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors_of_workers_are_printed_unchanged(tmp_path: Path, changes: list[str], code: int, expected: str) -> None:
    (tmp_path / "own.py").write_text(MODULE)
    for name in ("faulty.py", "faulty.toml", "full_disk.py"):
        (tmp_path / name).write_text((SUPPORT / name).read_text())
    options = [option for change in changes for option in ("--set", change)]
    command = ["train", "faulty.toml", "--workers", "2", "--run-dir", "run", *options]
    ended = subprocess.run(
        [sys.executable, "-m", "manyhands.cli.main", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == code, ended.stderr
    assert expected in ended.stderr
    if "FileNotFoundError" in expected:  # an error of Python: with the lines of the user's code
        assert "own.py" in ended.stderr
        assert f"(raised by [data], {tmp_path}/faulty.toml:" in ended.stderr
        assert "/manyhands/" not in ended.stderr
        assert len(ended.stderr.splitlines()) < 10
    else:
        assert ended.stderr.startswith(expected)
        assert "Traceback" not in ended.stderr


# - Runs


class Differs:
    """A loss whose gradient for one parameter changes its sign at a given step."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        out = model(batch)
        if (self.calls - 1) // 4 >= self.step:
            bias = model[2].bias
            out = out - bias.detach() + (2 * bias.detach() - bias)
        return out.square().mean()


def run_into(folder: Path, **changes: Any) -> Path:
    mh.train(recipe(**changes), steps=4, run_dir=folder, digest_every=1, show=False)
    return folder


def test_compare_reports_where_runs_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same = run_into(tmp_path / "one"), run_into(tmp_path / "same")
    other, seed = (
        run_into(tmp_path / "other", loss=Differs(2), attributes={"recipe.loss.calls": "keep"}),
        run_into(tmp_path / "seed", seed=1),
    )
    code, output = run_command(capsys, monkeypatch, "compare", one, same)
    assert (code, output.split(":")[0]) == (0, "equal")
    assert "after each of 4 steps" in output
    code, output = run_command(capsys, monkeypatch, "compare", one, other)
    assert code == 1
    assert "different: the digests first differ after step 3 (the same after step 2)" in output
    assert "parameter '2.bias', block 0 (elements 0 to 7): the first of 1 differing blocks, in 1 parameters" in output
    code, output = run_command(capsys, monkeypatch, "compare", "--json", one, other)
    found = json.loads(output)
    assert (code, found["equal"], found["step"], found["tensor"], found["block"]) == (1, False, 3, "2.bias", 0)
    code, output = run_command(capsys, monkeypatch, "compare", one, seed)
    assert code == 1
    assert "first differ after step 1" in output
    assert "recipe: seed is 0 in one run and 1 in the other" in output
    code, output = run_command(capsys, monkeypatch, "compare", one, tmp_path)
    assert code == 2
    assert "this is not a run directory" in output
    code, output = run_command(capsys, monkeypatch, "compare", one, tmp_path / "nowhere")
    assert code == 2
    assert "there is no run directory here" in output


class Counts(nn.Module):
    """Adds `by` to a buffer in every forward; the weights don't depend on it."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.by = by
        self.register_buffer("seen", torch.zeros(600, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[550] += self.by
        out: Tensor = self.layer(x)
        return out


def test_compare_names_a_buffer_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (run_into(tmp_path / str(by), model=partial(Counts, by)) for by in (1, 2))
    code, output = run_command(capsys, monkeypatch, "compare", one, other)
    assert code == 1
    assert "different: the digests first differ after step 1" in output
    assert "buffer 'seen', block 1 (elements 512 to 599): the first of 1 differing blocks" in output


def test_a_run_is_not_resumed_with_another_recipe(tmp_path: Path) -> None:
    run_into(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(mh.CheckpointError, match="belongs to another recipe: seed differs") as caught:
        mh.train(recipe(seed=1), steps=6, run_dir=tmp_path / "run", show=False)
    assert caught.value.expected == "0 (saved)"
    assert caught.value.got == "1 (this recipe)"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_run_is_resumed_with_other_numerics_only_if_accepted(tmp_path: Path) -> None:
    run_into(tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/manifest.json")
    saved = json.loads(manifest.read_text())
    saved["identity"]["torch"] = "1.0"
    manifest.write_text(seal(saved))
    with pytest.raises(mh.NumericsError, match="started with different numerics: torch differs") as caught:
        mh.train(recipe(), steps=6, run_dir=tmp_path / "run", show=False)
    assert caught.value.expected == "1.0 (saved)"
    assert "--accept-new-numerics" in str(caught.value.hint)
    summary = mh.train(recipe(), steps=6, run_dir=tmp_path / "run", show=False, accept_new_numerics=True)
    assert summary.digest == mh.train(recipe(), steps=6, show=False).digest


def test_a_recipe_file_is_not_a_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run_command(capsys, monkeypatch, "run", "-n", "2", RECIPE)
    assert code == 2
    assert f"manyhands train {RECIPE} --workers N" in output.replace("\n", ""), output
