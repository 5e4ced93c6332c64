"""A dry run shows what a run costs, and keeps nothing, also if its workers are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import manyhands as mh
from support.models import conv_recipe

RECIPE = """
steps = 50
[model]
path = "dry_parts:Net"
[loss]
path = "dry_parts:loss"
[data]
path = "dry_parts:points"
[optimizer]
path = "torch.optim:AdamW"
arguments = { lr = 0.1 }
[batch]
global_size = 4
micro_size = 2
[validation]
data = { path = "dry_parts:points" }
every = "10 steps"
batch = 2
"""

PARTS = """
import os, signal, torch
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(300, 300)

def points():
    return list(torch.randn(8, 300, generator=torch.Generator().manual_seed(0)))

def loss(model, batch):
    return model(batch).square().mean()
"""

KILLED = """
import manyhands.training.engine as engine

save = engine.Engine.save

def killed(self, *arguments, **options):
    save(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

engine.Engine.save = killed
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "manyhands.cli.main", "train", "recipe.toml", "--dry-run", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=240, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "dry_parts.py").write_text(PARTS)
    return tmp_path


def files_in(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return found - {"tmp", "recipe.toml", "dry_parts.py"}


def test_the_command_prints_what_a_run_costs_and_keeps_nothing(folder: Path) -> None:
    found = run(folder, "--workers", "2", "--json", "--run-dir", "run")
    assert found.returncode == 0, found.stderr
    assert not files_in(folder)
    figures = json.loads(found.stdout)
    assert (figures["steps"], figures["parameters"], list(figures["validation_seconds"])) == (50, 90300, ["validation"])
    assert 12 * 90300 < figures["checkpoint_bytes"] < 13 * 90300
    assert len(figures["peak_memory_bytes_per_worker"]) == 2
    assert figures["total_seconds"] == figures["first_step_seconds"] + 49 * figures["step_seconds"]
    refused = run(folder, "--hosts", "2")
    assert (refused.returncode, "one host" in refused.stderr) == (2, True)
    assert not files_in(folder)


@pytest.mark.slow
def test_killed_workers_leave_nothing(folder: Path) -> None:
    (folder / "dry_parts.py").write_text(PARTS + KILLED)
    found = run(folder, "--workers", "2")
    assert found.returncode == 1
    assert "SIGKILL" in found.stderr
    assert not files_in(folder)


def test_a_dry_run_changes_no_run(tmp_path: Path) -> None:
    """The text names everything, a single step is enough, and mistakes are found as in a run."""
    held_out = [torch.zeros(1)] * 4
    validations = {"one": mh.Validation(data=held_out, samples=3), "two": mh.Validation(data=held_out)}
    recipe = mh.Recipe(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=list(torch.randn(6, 1, generator=torch.Generator().manual_seed(0))),
        batch=mh.Batch(global_size=2, micro_size=1),
        epochs=2,
        validation=validations,
    )
    found = mh.dry_run(recipe, folder=tmp_path, show=False)
    text = str(found)
    assert all(part in text for part in ("for 6 steps", "validation  one", "validation  two", "checkpoint", "memory"))
    assert mh.dry_run(conv_recipe(), steps=1, folder=tmp_path, show=False).steps == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(mh.ConfigError, match="number of steps is not set"):
        mh.dry_run(conv_recipe())
