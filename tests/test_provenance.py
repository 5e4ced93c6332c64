"""A run records its code, packages and data, and can be trained again and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.main import app
from manyhands.training.provenance import MOST_DIFF_BYTES, code_of, data_digests
from support.models import conv_recipe

RECIPE = """
steps = 3
[model]
path = "origin_parts:model"
[loss]
path = "origin_parts:loss"
[data]
path = "origin_parts:points"
[optimizer]
path = "torch.optim:SGD"
arguments = { lr = 0.1 }
[batch]
global_size = 4
micro_size = 1
"""

PARTS = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))

def points():
    return list(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

def loss(model, batch):
    return model(batch).square().mean()
"""


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True, env=variables
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a recipe."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "origin_parts.py").write_text(PARTS)
    (tmp_path / ".gitignore").write_text("runs\n__pycache__\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    yield tmp_path
    sys.modules.pop("origin_parts", None)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "manyhands.cli.main", *arguments]
    return subprocess.run(program, capture_output=True, text=True, cwd=folder, timeout=240)


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def test_a_run_is_reproduced_or_the_difference_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = mh.load_recipe(project / "recipe.toml")
    given = {"recipe_as_used": loaded.settings, "skip_steps": [2], "show": False}
    mh.train(loaded.recipe, steps=3, run_dir=project / "runs" / "first", **given)  # type: ignore[arg-type]
    commit = git(project, "rev-parse", "HEAD")
    assert manifest(project / "runs" / "first")["code"] == {"commit": commit, "dirty": False}
    assert not (project / "runs" / "first" / "code.diff").exists()
    again = command(project, "reproduce", "recipe.toml", "runs/first", "--run-dir", "runs/again", "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert "equal: runs/first and runs/again" in again.stdout
    assert "code" not in again.stdout.partition("equal:")[2]
    (project / "origin_parts.py").write_text(PARTS.replace("0.5", "0.25"))
    (project / "more.py").touch()
    other = command(project, "reproduce", "recipe.toml", "runs/first", "--workers", "1", "--json")
    assert other.returncode == 1, other.stderr
    compared = json.loads(other.stdout.splitlines()[-1])
    assert (compared["equal"], compared["tensor"]) == (False, "0.weight")
    assert any("code: dirty is False in one run and True in the other" in each for each in compared["differences"])
    (run,) = (project / "runs").glob("*-again-*")
    assert "+    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.25)" in (run / "code.diff").read_text()
    found = manifest(run)["code"]
    assert (found["commit"], found["dirty"], found["untracked"]) == (commit, True, ["more.py"])
    assert found["diff_bytes"] == (run / "code.diff").stat().st_size
    first = str(project / "runs" / "first")
    for arguments in ([first, "--run-dir", first], [str(project / "runs")]):
        refused = CliRunner().invoke(app, ["reproduce", str(project / "recipe.toml"), *arguments])
        assert isinstance(refused.exception, mh.ConfigError)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, ["reproduce", str(project / "recipe.toml"), first])
    assert isinstance(refused.exception, mh.ConfigError)
    assert (refused.exception.got, refused.exception.where) == ("WORLD_SIZE=2", None)


def test_a_resumed_run_keeps_the_code_of_earlier_steps(project: Path) -> None:
    run = project / "runs" / "first"

    def train(steps: int) -> dict[str, Any]:
        loaded = mh.load_recipe(project / "recipe.toml")
        mh.train(loaded.recipe, steps=steps, run_dir=run, show=False)
        return manifest(run)

    before = train(1)["code"]
    assert "earlier_code" not in train(2)
    (project / "recipe.toml").write_text(RECIPE + "# changed\n")
    changed = train(3)
    assert changed["earlier_code"] == [{**before, "until_step": 2}]
    assert (run / "code.diff").exists()
    git(project, "commit", "-q", "-a", "-m", "second")
    last = train(4)
    assert not (run / "code.diff").exists()
    assert [each["until_step"] for each in last["earlier_code"]] == [2, 3]
    assert last["code"]["commit"] != before["commit"]


def test_the_diff_is_bounded_and_settings_of_git_do_not_matter(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without git, and outside of a repository."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    git(project, "config", "diff.external", "false")
    git(project, "config", "color.ui", "always")
    (project / "recipe.toml").write_text(RECIPE + "# long\n" * 300_000)
    loaded = mh.load_recipe(project / "recipe.toml", [])
    code = code_of(loaded.recipe)
    assert code is not None
    assert code.diff.startswith(b"diff --git")
    assert (len(code.diff), code.facts["diff_bytes"] > 2_000_000) == (MOST_DIFF_BYTES, True)
    (project / ".git").rename(project / "not-git")
    assert code_of(loaded.recipe) is None
    monkeypatch.setenv("PATH", "")
    assert code_of(loaded.recipe) is None


class WithDigest(torch.utils.data.Dataset[torch.Tensor]):
    """Data with a digest."""

    def __init__(self, digest: object) -> None:
        self.digest = digest

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


def test_digests_of_prepared_data_are_recorded(tmp_path: Path) -> None:
    """Of a token file, also if it is wrapped, and of validations; not of data without a digest."""
    from dataclasses import replace

    digests = []
    for name, last in (("one", 9), ("same", 9), ("other", 8)):
        records = [{"tokens": list(range(start, start + last))} for start in (0, 100)]
        mh.Dataset.from_records(records).write(tmp_path / name, format="tokens", workers=0)
        digests.append(mh.TokenFile(tmp_path / name, length=4).digest)
    assert digests[0] == digests[1] != digests[2]
    tokens = mh.TokenFile(tmp_path / "one", length=4)
    part = torch.utils.data.Subset(tokens, [0])
    recipe = replace(conv_recipe(), data=part, validation={"held_out": mh.Validation(data=WithDigest("abc"))})
    assert data_digests(recipe) == {"data": digests[0], "held_out": "abc"}
    both = torch.utils.data.ConcatDataset([tokens, WithDigest(3)])
    assert data_digests(replace(conv_recipe(), data=both)) == {}
    pytest.importorskip("safetensors")  # imports it
    mh.train(conv_recipe(), steps=1, run_dir=tmp_path / "run", show=False)
    assert manifest(tmp_path / "run")["prepared_data"] == {}
    assert {"torch", "numpy", "safetensors"} <= set(manifest(tmp_path / "run")["versions"])
