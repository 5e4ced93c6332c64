"""The new command writes a recipe that trains, validates and learns; it overwrites nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.main import app


def test_a_new_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that it names; and it learns."""
    folder = tmp_path / "a" / "first"
    written = CliRunner().invoke(app, ["new", str(folder)])
    assert written.exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "parts.py", "recipe.toml"]
    assert len((folder / "README.md").read_text().splitlines()) == 3
    command = [
        sys.executable,
        "-m",
        "manyhands.cli.main",
        "train",
        str(folder / "recipe.toml"),
        "--steps",
        "2",
        "--json",
    ]
    options = ["--run-dir", str(tmp_path / "run"), "--workers", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {"loss", "accuracy", "confidence"} <= set(
        json.loads(done.stdout.splitlines()[-1])["validations"]["validation"]
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = mh.load_recipe(folder / "recipe.toml")
    found = mh.train(loaded.recipe, steps=60, show=False).validations["validation"]
    sys.modules.pop("parts", None)
    assert found["accuracy"] > 0.6


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for folder, code in (
        (tmp_path, "is not empty"),
        (tmp_path / "notes", "is not empty"),
        (Path("/proc/x"), "written"),
    ):
        refused = CliRunner().invoke(app, ["new", str(folder)])
        assert isinstance(refused.exception, mh.ConfigError)
        assert code in str(refused.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(app, ["new", str(tmp_path / "empty")]).exit_code == 0
