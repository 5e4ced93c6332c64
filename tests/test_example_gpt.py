"""The GPT example: its data set reads and caches the standard library safely; its model learns, and samples alike."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import manyhands as mh
from manyhands.corpus.job import prepare_corpus
from manyhands.corpus.recipe import read_corpus_recipe
from manyhands.errors import DataError
from manyhands.prepare.options import Options

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "gpt"


def load(name: str) -> ModuleType:
    """The example's modules are found by path; under a name of our own, so that other tests' `gpt` isn't touched."""
    qualified = f"example_gpt_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, EXAMPLE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


gpt, text = load("gpt"), load("text")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    (folder / "site-packages").mkdir(parents=True)
    (folder / "package").mkdir()
    (folder / "b.py").write_text("print('b')\n" * 40)
    (folder / "package" / "a.py").write_text("# é, two bytes\n" * 40)
    (folder / "empty.py").touch()
    (folder / "notes.txt").write_text("not Python")
    (folder / "dangling.py").symlink_to(folder / "nowhere.py")
    (folder / "site-packages" / "other.py").write_text("not ours\n" * 100)
    return folder


def dataset(library: Path, length: int = 16) -> torch.utils.data.Dataset:
    return text.StandardLibraryText(length=length, cache=str(library.parent / "cache"), source=str(library))


def tiny(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return gpt.GPT(**{"length": 16, "width": 24, "depth": 2, "heads": 2, **changes})


def test_text_holds_the_source_in_order_of_path(library: Path) -> None:
    data = dataset(library)
    expected = (library / "b.py").read_bytes() + (library / "package" / "a.py").read_bytes()
    assert data.path.read_bytes() == expected
    assert len(data) == (len(expected) - 1) // 16
    assert data[1].dtype == torch.int64
    assert bytes(data[1].tolist()) == expected[16:33]
    assert data[0][-1] == data[1][0]
    with pytest.raises(IndexError):
        data[len(data)]


def test_text_is_read_again_only_when_the_source_changed(library: Path) -> None:
    first = dataset(library)
    written = first.path.stat().st_mtime_ns
    assert dataset(library).path.stat().st_mtime_ns == written
    (library / "c.py").write_text("pass\n")
    assert dataset(library).path != first.path
    assert not list(first.path.parent.glob("*.part"))


def test_text_is_sent_to_a_loader_process_without_its_bytes(library: Path) -> None:
    data = dataset(library)
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[3], data[3])


def test_text_may_be_cached_by_many_workers_at_once(library: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()

    def work() -> list[int]:
        (there / os.environ["RANK"]).touch()
        while len(list(there.iterdir())) < 4:
            time.sleep(0.001)
        return dataset(library)[0].tolist()

    items = mh.launch(work, workers=4)
    assert all(item == items[0] for item in items)
    cache = library.parent / "cache"
    assert [file.suffix for file in cache.iterdir()] == [".bytes"]


def test_missing_short_or_uncacheable_text_is_a_data_error(library: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Python source"):
        dataset(library / "site-packages" / "nothing")
    with pytest.raises(DataError, match="too short"):
        dataset(library, length=10_000)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        text.StandardLibraryText(cache=str(tmp_path / "file"), source=str(library))


def test_user_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text.user_cache() == tmp_path / "manyhands"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text.user_cache() == tmp_path / ".cache" / "manyhands"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_a_sum_in_fp32_with_its_weight(dtype: torch.dtype, tied: bool) -> None:
    model = tiny(tied=tied, dropout=0.1).to(dtype)
    batch = torch.randint(0, 256, (3, 17))
    loss, weight = gpt.loss(model, batch)
    assert loss.dtype == torch.float32
    assert weight == 3 * 16
    assert float(loss.detach()) / weight == pytest.approx(5.55, abs=0.5)  # it knows nothing: about ln 256
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.head.weight is model.token_embedding.weight) == tied


def test_model_sees_no_future() -> None:
    model = tiny().eval()
    tokens = torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 0
    with torch.no_grad():
        assert torch.allclose(model(tokens)[0, :10], model(changed)[0, :10], atol=1e-6)


def test_model_learns_the_text(library: Path) -> None:
    data, model = dataset(library), tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = gpt.warmup_cosine(optimizer, warmup=3, steps=30)
    batch = torch.stack([data[i] for i in range(16)])
    losses = []
    for _ in range(30):
        loss, weight = gpt.loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()) / weight)
    assert losses[-1] < 0.5 * losses[0]


def test_schedule_rises_falls_and_stays() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = gpt.warmup_cosine(optimizer, warmup=4, steps=20, floor=0.1)
    rates = []
    for _ in range(25):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:21] == sorted(rates[4:21], reverse=True)
    assert rates[20:] == pytest.approx([0.2] * 5)


def test_sample_is_repeatable_and_changes_no_state() -> None:
    model = tiny(dropout=0.5)
    model.train()
    model.blocks[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = gpt.sample(model, prompt="def é", length=40)
    assert first.startswith("def é")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert gpt.sample(model, prompt="def é", length=40) == first
    assert gpt.sample(model, prompt="def é", length=40, seed=1) != first
    assert isinstance(gpt.sample(model.to(torch.bfloat16), prompt="", length=3, top_k=1000), str)


def test_library_files_leave_out_tests(library: Path) -> None:
    (library / "test").mkdir()
    (library / "test" / "c.py").write_text("pass\n")
    found = [file.relative_to(library).as_posix() for file in text.library_files(str(library))]
    assert found == ["b.py", "package/a.py"]
    assert len(text.library_files(str(library), tests=True)) == 3
    with pytest.raises(DataError, match="no Python source"):
        text.library_files(str(library.parent / "nowhere"))


def test_prepared_tokens_are_trained_on_and_sampled(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        (library / f"module_{number}.py").write_text(
            f"def function_{number * number}(x):\n    return x + {number}\n" * 3
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    overrides = [f"input.arguments={{source='{library}'}}", "tokenizer.vocabulary=300", "clean.max_repeated_lines=1"]
    overrides.append("validation.fraction=0.3")
    document = read_corpus_recipe(EXAMPLE / "prepare.toml", overrides)
    summary = prepare_corpus(document, "prepared/gpt-stdlib", Options(workers=0, progress=False))
    assert summary.figures.vocabulary == 300
    changes = [
        "data.arguments.length=16",
        "validation.data.arguments.length=16",
        "steps=2",
        "batch.global_size=8",
        "batch.micro_size=4",
        "batch.virtual_workers=2",
    ]
    changes.append("model.arguments={vocabulary=300, length=16, width=24, depth=1, heads=2}")
    changes.append("sample.arguments.length=9")
    loaded = mh.load_recipe(EXAMPLE / "recipe.toml", changes)
    assert loaded.recipe.data.vocabulary == 300
    trained = mh.train(loaded.recipe, steps=2, strategy=loaded.strategy, run_dir="runs/one", show=False)
    assert len(trained.digest) == 64
    assert set(trained.validations["validation"]) >= {"loss", "perplexity"}
    model = gpt.GPT(vocabulary=300, length=16, width=24, depth=1, heads=2)
    said = gpt.sample(model, length=5, tokenizer="prepared/gpt-stdlib/tokenizer.json")
    assert said.startswith("def ")


def test_recipe_names_exist() -> None:
    recipe = tomllib.loads((EXAMPLE / "recipe.toml").read_text())
    prepare = tomllib.loads((EXAMPLE / "prepare.toml").read_text())
    assert hasattr(text, prepare["input"]["path"].partition(":")[2])
    assert recipe["data"]["path"] == "manyhands:TokenFile"
    assert recipe["data"]["arguments"]["path"] == f"prepared/{prepare['name']}"
    assert recipe["validation"]["data"]["arguments"]["path"] == f"prepared/{prepare['name']}/validation"
    assert prepare["validation"]
    assert recipe["model"]["arguments"]["vocabulary"] == prepare["tokenizer"]["vocabulary"]
    for section in ("model", "loss", "schedule", "sample"):
        module, _, name = recipe[section]["path"].partition(":")
        assert hasattr(load(module), name), section
    model = gpt.GPT(**recipe["model"]["arguments"])
    assert recipe["data"]["arguments"]["length"] == model.length
    optimizer = torch.optim.AdamW(model.parameters(), **recipe["optimizer"]["arguments"])
    gpt.warmup_cosine(optimizer, **recipe["schedule"]["arguments"])
    assert recipe["schedule"]["arguments"]["steps"] == recipe["steps"]
    batch = recipe["batch"]
    assert batch["global_size"] == batch["micro_size"] * batch["virtual_workers"]
