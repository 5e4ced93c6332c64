"""Listeners that a recipe file or an option names."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manyhands.documents.recipe_file import check_recipe_file, load_recipe
from manyhands.errors import ConfigError
from manyhands.listeners import TensorBoardListener

SUPPORT = Path(__file__).resolve().parent / "support"
MINE = """
import manyhands as mh

class Watch(mh.Listener):
    def __init__(self, file="watched.txt"):
        self.file = file

    def ended(self, summary):
        open(self.file, "a").write(f"{summary.outcome} {summary.steps}")
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name in ("started.toml", "started.py"):
        shutil.copy(SUPPORT / name, tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    path = tmp_path / "started.toml"
    path.write_text(
        'listeners = ["csv", { path = "mine:Watch", arguments = { file = "own.txt" } }]\n' + path.read_text()
    )
    return path


def train(recipe: Path, *options: str) -> Path:
    run = recipe.parent / f"run-{len(options)}"
    command = [sys.executable, "-m", "manyhands", "train", recipe.name, "--workers", "1", "--steps", "2"]
    done = subprocess.run(
        [*command, "--run-dir", str(run), *options], cwd=recipe.parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return run


def test_listeners_of_a_recipe_and_of_the_option_get_the_figures(recipe: Path) -> None:
    run = train(recipe)
    with (run / "csv" / "steps.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (recipe.parent / "own.txt").read_text() == "completed 2"

    other = train(recipe, "--listener", "mine:Watch", "--listener", "tensorboard")
    assert (recipe.parent / "watched.txt").read_text() == "completed 2"
    assert (recipe.parent / "own.txt").read_text() == "completed 2"
    assert not (other / "csv").exists()
    named = json.loads((other / "recipe.json").read_text())["listeners"]
    assert [each.get("path") or each["name"] for each in named] == ["mine:Watch", "tensorboard"]


def test_only_another_folder_needs_another_listener_for_tensorboard(recipe: Path) -> None:
    assert load_recipe(recipe, ['listeners=["tensorboard"]']).listeners == []
    elsewhere = '{name="tensorboard", arguments={directory="curves"}}'
    (create,) = load_recipe(recipe, [f"listeners=[{elsewhere}]"]).listeners
    assert isinstance(create(recipe.parent), TensorBoardListener)


@pytest.mark.parametrize(
    ("listeners", "message"),
    [
        ('["cvs"]', "there is no such listener[\\s\\S]*did you mean 'csv'"),
        ('["mine:Wacth"]', "listeners.0.path: mine has no Wacth[\\s\\S]*did you mean 'Watch'"),
        ("[{}]", "a listener needs either a name or a path"),
        ('["no_such_module:Watch"]', "there is no module no_such_module"),
        *(
            (f'["csv", "{name}"]', f"the listener {name} needs a package[\\s\\S]*manyhands\\[{name}\\]")
            for name in ("wandb", "mlflow")
            if importlib.util.find_spec(name) is None
        ),
    ],
)
def test_wrong_listeners_are_refused_before_workers_start(recipe: Path, listeners: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_recipe_file(recipe, [f"listeners={listeners}"])
    assert "--set listeners" in str(caught.value)


def test_wrong_arguments_of_a_listener_are_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"listeners.1.arguments.fold: .*CSVListener takes no fold"):
        load_recipe(recipe, ['listeners=["csv", {name="csv", arguments={fold="here"}}]'])
