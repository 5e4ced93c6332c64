"""The sample command prints what a run shows at its end, for any number of workers, and leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import manyhands as mh

RECIPE = """
[model]
path = "sample_parts:model"
[loss]
path = "sample_parts:loss"
[data]
path = "sample_parts:points"
[optimizer]
path = "torch.optim:SGD"
arguments = { lr = 0.1 }
[batch]
global_size = 4
micro_size = 1
[sample]
path = "sample_parts:sample"
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

def sample(model):
    return f"sampled {model(torch.randn(4)).tolist()}"
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manyhands.cli.main", "sample", "recipe.toml", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=240)


def test_the_sample_command_prints_what_the_run_shows(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "sample_parts.py").write_text(PARTS)
    recipe = mh.load_recipe(tmp_path / "recipe.toml").recipe
    texts = [mh.train(recipe, steps=steps, run_dir=tmp_path / "run", show=False).sample for steps in (1, 2)]
    assert texts[0] != texts[1]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    found = run(tmp_path, "--workers", "3", "--step", "1", "--set", "strategy.sharding=zero3")
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{texts[0]}\n"
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "recipe.toml").write_text(RECIPE.partition("[sample]")[0])
    found = run(tmp_path, "--workers", "1")
    assert found.returncode == 2
    assert "the recipe has no sample function" in found.stderr
