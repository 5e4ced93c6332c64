"""The new command: writes a recipe to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyhands.errors import ConfigError
from manyhands.output import say

RECIPE = """\
# A recipe: everything that decides the result. Try it:  manyhands train recipe.toml --dry-run
name = "first"
steps = 200                # or: epochs = 3
seed = 0

[model]
path = "parts:Model"       # parts.py, next to this file
arguments = { width = 64 }

[loss]
path = "parts:loss"

[data]
path = "parts:training_data"

[optimizer]
path = "torch.optim:AdamW"
arguments = { lr = 1e-3 }

[batch]
global_size = 32           # samples in a step
micro_size = 8             # samples that forward and backward process together

[validation]
data = { path = "parts:validation_data" }
metrics = ["accuracy", "parts:confidence"]
every = "50 steps"
"""

PARTS = '''\
"""The parts of the recipe: the model, the loss, the metrics and the data. Replace them with your own."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES, FEATURES = 3, 8


class Model(nn.Module):
    """Classifies rows of FEATURES numbers."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, CLASSES))

    def forward(self, rows):
        return self.layers(rows)


def loss(model, batch):
    """Return the mean loss of a micro-batch."""
    rows, labels = batch
    return nn.functional.cross_entropy(model(rows), labels)


def confidence(output, batch):
    """A metric: return a sum and its weight. Here, the probability of the most likely class."""
    best = output.softmax(dim=1).max(dim=1).values
    return best.sum(), len(best)


def training_data():
    """Return a map-style data set. This one is made up: load your own here."""
    return made_up_data(1000, seed=1)


def validation_data():
    return made_up_data(200, seed=2)


def made_up_data(count, seed):
    rows = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(rows, rows[:, :CLASSES].argmax(dim=1))
'''

README = """\
Train: `manyhands train recipe.toml --run-dir runs/first --keep-best validation.loss:min`. The same command resumes.
Replace the parts in `parts.py` and the settings in `recipe.toml`. `manyhands train recipe.toml --dry-run` tries them.
Weights: `manyhands export runs/first exported`, or `mh.load_model("runs/first", mh.load_recipe("recipe.toml").recipe)`.
"""


def new_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder: new or empty.", show_default=False)],
) -> None:
    """Write a recipe to begin with: recipe.toml, parts.py with a model, a loss, a metric and data, and README.md.

    Example: `manyhands new first`, then `manyhands train first/recipe.toml`
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                "the folder for the new recipe is not empty",
                where=str(folder.absolute()),
                expected="a new path, or an empty folder",
                hint="choose another path; nothing was written",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("recipe.toml", RECIPE), ("parts.py", PARTS), ("README.md", README)):
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the new recipe can't be written: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="choose a folder that you may write to",
        ) from error
    say(f"wrote recipe.toml, parts.py and README.md; next: manyhands train {folder / 'recipe.toml'}", to_stdout=True)
