"""The examples with other people's models train, alike with one worker and two; their data are what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import manyhands as mh
from support.threads import run_threads
from support.training import train_with_engine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {  # what they need, and what is made smaller for a test
    "transformers/gpt2.toml": (
        "transformers",
        "model.arguments.n_layer=1 data.arguments.length=32 batch.global_size=16 batch.virtual_workers=4",
    ),
    "transformers/lora.toml": ("peft", "data.arguments.length=16 batch.global_size=8"),
    "vision/resnet.toml": ("torchvision", "data.arguments.size=16 batch.global_size=8 batch.micro_size=4"),
}


# peft asks transformers for a property by the name that it had before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_the_same_digest_with_one_and_two_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, overrides = EXAMPLES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed")
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = mh.load_recipe(ROOT / "examples" / name, overrides.split()).recipe
    (expected,) = run_threads(1, lambda group: train_with_engine(recipe, mh.Strategy(), steps=2, group=group))
    found = run_threads(2, lambda group: train_with_engine(recipe, mh.Strategy(), steps=2, group=group))
    assert [outcome.digest for outcome in found] == [expected.digest] * 2
    if recipe.sample is not None:
        assert recipe.sample(recipe.model()).startswith("def ")
    for module in ({"gpt2", "lora", "resnet", "stdlib_text", "text"} & set(sys.modules)) - before:
        del sys.modules[module]


@pytest.mark.slow
def test_an_example_trains_from_the_command_line(tmp_path: Path) -> None:
    package, overrides = EXAMPLES["vision/resnet.toml"]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed")
    recipe = str(ROOT / "examples" / "vision" / "resnet.toml")
    options = [word for override in overrides.split() for word in ("--set", override)]
    command = [sys.executable, "-m", "manyhands.cli.main", "train", recipe, "--workers", "2", "--steps", "2", "--json"]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run"), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["digest"]


def test_the_shapes_are_four_kinds_and_functions_of_their_index() -> None:
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("example_resnet", ROOT / "examples" / "vision" / "resnet.py")
    resnet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resnet)
    data = resnet.Shapes(count=8, size=16)
    assert [data[index][1] for index in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert data[5][0].shape == (3, 16, 16)
    assert bool((data[5][0] == data[5][0]).all())
    assert not bool((data[1][0] == data[5][0]).all())
    with pytest.raises(IndexError):
        data[8]
