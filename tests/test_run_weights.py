"""A run starts with the weights of another run, bit for bit, and records which ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyhands as mh
from support.exporting import FrozenStem, Trained
from support.models import conv_recipe, gpt_recipe
from support.threads import run_threads


def started(recipe: mh.Recipe, workers: int = 1, sharding: str = "zero3") -> list[tuple[str, dict[str, Any], int]]:
    """The digest before the first step, the complete state, and the bytes that were read, on each worker."""

    def work(group: Any) -> tuple[str, dict[str, Any], int]:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group=group) as engine:
            return engine.digest(), engine.full_state_dict(), engine.weights_read_bytes

    return run_threads(workers, work)


@pytest.mark.parametrize(("precision", "workers", "sharding"), [("fp32", 2, "zero3"), ("bf16", 3, "zero2")])
def test_a_run_starts_with_the_bits_of_another(precision: str, workers: int, sharding: str, tmp_path: Path) -> None:
    """Trained, frozen and tied parameters, and buffers. The number of workers differs, and so may the precision."""
    for number, recipe in enumerate((gpt_recipe(precision), conv_recipe(precision, model=FrozenStem))):
        trained = Trained(recipe, tmp_path / str(number), workers=5 - workers)
        for other in (recipe, replace(recipe, precision="fp32")):
            found = started(replace(other, weights=trained.checkpoint, seed=5), workers, sharding)
            assert {digest for digest, *_ in found} == {trained.digest}
            for name, value in trained.full.items():
                assert torch.equal(found[0][1][name].float(), value.float()), name


def test_a_worker_reads_what_it_stores(tmp_path: Path) -> None:
    recipe = gpt_recipe("fp32")
    trained = Trained(recipe, tmp_path)
    size = sum(value.nbytes for name, value in trained.full.items() if name != "head.weight")
    read = [count for *_, count in started(replace(recipe, weights=tmp_path), 2)]
    facts = 2 * 4096  # blocks are not divided
    assert max(read) <= size / 2 + facts
    assert sum(read) >= size


def test_the_source_is_recorded_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the new run is resumed after the other one has gone on, or has been deleted."""
    run, recipe = tmp_path / "second", replace(conv_recipe(seed=5), weights=tmp_path / "first")
    first = mh.train(conv_recipe(), steps=2, run_dir=tmp_path / "first", show=False)
    source = tmp_path / "first" / "checkpoints" / "step-00000002"
    recorded = {"path": str(source), "step": 2, "digest": first.digest}
    mh.train(recipe, steps=1, run_dir=run, show=True)
    assert f"first (step 2, digest {first.digest})" in " ".join(capsys.readouterr().err.split())
    assert json.loads((run / "manifest.json").read_text())["initial_weights"] == recorded
    mh.train(conv_recipe(), steps=3, run_dir=tmp_path / "first", show=False)
    resumed = mh.train(recipe, steps=2, run_dir=run, show=False)
    assert json.loads((run / "manifest.json").read_text())["initial_weights"] == recorded
    assert mh.train(replace(recipe, weights=source), steps=2, show=False).digest == resumed.digest
    (tmp_path / "first").rename(tmp_path / "moved")
    mh.train(recipe, steps=3, run_dir=run, show=False)


def test_checkpoints_in_a_store_are_a_source(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    place = f"memory://bucket/{tmp_path.name}"
    first = mh.train(conv_recipe(), steps=1, run_dir=tmp_path / "run", checkpoint_dir=place, show=False)
    assert started(replace(conv_recipe(seed=5), weights=place))[0][0] == first.digest
    assert mh.Weights(path=place).path == place


class Wider(nn.Module):
    """The model of `conv_recipe` under another name, with a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_recipe().model()
        self.extra = nn.Linear(2, 2)


def test_names_are_changed_as_for_files(tmp_path: Path) -> None:
    Trained(conv_recipe(), tmp_path)
    weights = mh.Weights(path=tmp_path, rename={"^": "body."}, allow_missing=["extra.*"])
    state = started(replace(conv_recipe(seed=5), model=Wider, weights=weights))[0][1]
    plain = mh.load_model(tmp_path, conv_recipe()).state_dict()
    assert all(torch.equal(state[f"body.{name}"], value) for name, value in plain.items())
    with pytest.raises(mh.ConfigError, match=r"the initial weights don't fit the model") as caught:
        started(replace(conv_recipe(), model=Wider, weights=tmp_path))
    assert "body." in (caught.value.hint or "")


def cut(folder: Path) -> None:
    (file,) = folder.glob("worker-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])


def flip(folder: Path) -> None:
    (file,) = folder.glob("worker-*.safetensors")
    content = bytearray(file.read_bytes())
    tensors = 8 + int.from_bytes(content[:8], "little")
    content[tensors:] = bytes(byte ^ 4 for byte in content[tensors:])
    file.write_bytes(content)


def link(folder: Path) -> None:
    (file,) = folder.glob("worker-*.safetensors")
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("damage", [cut, flip, link, lambda folder: (folder / "manifest.json").unlink()])
def test_a_damaged_source_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    checkpoint = Trained(gpt_recipe("fp32"), tmp_path).checkpoint
    damage(checkpoint)
    with pytest.raises(mh.CheckpointError):
        started(replace(gpt_recipe("fp32"), weights=tmp_path))


RECIPE = """
weights = "runs/first"
[model]
path = "torch.nn:Linear"
arguments = { in_features = 4, out_features = 4 }
[loss]
path = "start_parts:loss"
[data]
path = "start_parts:points"
[optimizer]
path = "torch.optim:SGD"
arguments = { lr = 0.1 }
[batch]
global_size = 4
micro_size = 2
"""

PARTS = """
import torch

def points():
    return list(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

def loss(model, batch):
    return model(batch).square().mean()
"""


def test_a_recipe_file_names_a_run(tmp_path: Path) -> None:
    """A path is relative to the recipe's folder; an address stays as it is."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "start_parts.py").write_text(PARTS)
    loaded = mh.load_recipe(tmp_path / "recipe.toml")
    first = mh.train(replace(loaded.recipe, weights=None), steps=1, run_dir=tmp_path / "runs" / "first", show=False)
    assert started(loaded.recipe)[0][0] == first.digest
    weights = mh.load_recipe(tmp_path / "recipe.toml", ["weights=s3://bucket/run"]).recipe.initial_weights
    assert weights is not None
    assert weights.path == "s3://bucket/run"
