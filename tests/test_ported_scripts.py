"""Mistakes that people make who port a training script of their own: each is refused with what to write instead."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import manyhands as mh
from manyhands.cli.main import app

SAMPLES = [torch.ones(4) for _ in range(8)]


def recipe(**changes: Any) -> mh.Recipe:
    options: dict[str, Any] = {
        "model": lambda: nn.Linear(4, 1),
        "loss": lambda model, batch: model(batch).mean(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "data": SAMPLES,
        "batch": mh.Batch(global_size=4, micro_size=2),
    }
    return mh.Recipe(**options | changes)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1)


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "model": (lambda: nn.Linear(4, 1), r"recipe\.model is a model, not(?s:.*)lambda: Net\(\)(?s:.*)class Linear"),
    "loss": (lambda: nn.MSELoss(), r"recipe\.loss is a loss of torch\.nn(?s:.*)MSELoss\(\)\(model\(batch\[0\]\)"),
    "optimizer": (optimizer, r"recipe\.optimizer can't be called(?s:.*)lambda params: (?s:.*)class SGD"),
    "schedule": (
        lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 2),
        r"recipe\.schedule can't be called(?s:.*)lambda optimizer: (?s:.*)class StepLR",
    ),
    "collate": (lambda: {"x": 1}, r"recipe\.collate can't be called"),
    "sample": (lambda: "text", r"recipe\.sample can't be called"),
    "data": (lambda: DataLoader(SAMPLES), r"recipe\.data is a DataLoader(?s:.*)pass the data set itself"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("field", OBJECTS)
def test_an_object_in_place_of_its_function_is_refused(field: str) -> None:
    make, message = OBJECTS[field]
    with pytest.raises(mh.ConfigError, match=message):
        recipe(**{field: make()})


def test_classes_are_functions_too() -> None:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)

    assert mh.train(recipe(model=Net), steps=1, show=False).digest


def test_a_recipe_of_another_type_is_refused(tmp_path: Path) -> None:
    uses: list[Callable[[Any], Any]] = [
        lambda given: mh.train(given, steps=1),
        lambda given: mh.dry_run(given, steps=1),
        lambda given: mh.evaluate(given, tmp_path),
        mh.Engine,
    ]
    for use in uses:
        for given, hint in (("recipe.toml", "load_recipe"), (types.SimpleNamespace(recipe=recipe()), "recipe, and")):
            with pytest.raises(mh.ConfigError, match=rf"the recipe has the wrong type(?s:.*){hint}"):
                use(given)


@pytest.mark.parametrize("use", [lambda strategy: mh.train(recipe(), steps=1, strategy=strategy), mh.Engine])
def test_a_strategy_of_another_type_is_refused(use: Callable[[Any], Any]) -> None:
    given: Any = (recipe(), "zero2") if use is mh.Engine else ("zero2",)
    with pytest.raises(mh.ConfigError, match=r"the strategy has the wrong type(?s:.*)sharding=\"zero2\""):
        use(*given)


def test_a_model_inside_a_wrapper_of_torch_is_refused() -> None:
    with pytest.raises(mh.ConfigError, match=r"a model inside DataParallel(?s:.*)return the model itself"):
        mh.train(recipe(model=lambda: nn.DataParallel(nn.Linear(4, 1))), steps=1, show=False)


@pytest.mark.parametrize(
    "factory",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda params: torch.optim.SGD([param for param in params if param.requires_grad], lr=0.1),
    ],
)
def test_an_optimizer_factory_that_expects_something_else_is_told_what_it_gets(factory: Callable[[Any], Any]) -> None:
    with pytest.raises(AttributeError) as raised:
        mh.train(recipe(optimizer=factory), steps=1, show=False)
    assert "(name, parameter) pairs" in raised.value.__notes__[0]


def test_a_schedule_that_fails_for_one_of_several_optimizers_names_it() -> None:
    def two(params: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        groups = [{"params": [params[0]]}, {"params": [params[1]]}]
        return [torch.optim.SGD(groups[:1], lr=0.1), torch.optim.AdamW(groups[1:], lr=0.1)]

    def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        rates = [0.1] if isinstance(optimizer, torch.optim.SGD) else [0.1, 0.1]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=4)

    with pytest.raises(ValueError, match="max_lr must have the same length") as raised:
        mh.train(recipe(optimizer=two, schedule=one_cycle), steps=1, show=False)
    assert "index 1, AdamW, which has 1 param group" in raised.value.__notes__[0]


def test_a_batch_of_another_loader_is_refused() -> None:
    with (
        mh.Engine(recipe()) as engine,
        pytest.raises(mh.ConfigError, match=r"not from engine\.batches(?s:.*)got: Tensor(?s:.*)data set"),
    ):
        engine.step(torch.ones(4, 4))  # type: ignore[arg-type]


def test_a_run_that_has_its_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mh.train(recipe(), steps=2, run_dir=tmp_path / "run", show=False)
    mh.train(recipe(), steps=1, run_dir=tmp_path / "run", show=False)
    assert capsys.readouterr().err == ""
    mh.train(recipe(), steps=1, run_dir=tmp_path / "run")
    assert capsys.readouterr().err == "the run already has 2 steps, so there is nothing to train up to step 1\n"


@pytest.mark.parametrize(
    ("command", "file", "advice"), [("train", "a.py", "manyhands run --workers"), ("run", "a.toml", "manyhands train")]
)
def test_a_file_of_the_other_kind_is_refused_with_its_command(
    command: str, file: str, advice: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text("import torch\n" if file == "a.py" else "steps = 1\n")
    with pytest.raises(mh.ConfigError, match=advice):
        app([command, str(tmp_path / file)], standalone_mode=False)


def test_a_folder_of_checkpoints_is_refused_with_the_newest_in_it(tmp_path: Path) -> None:
    with mh.Engine(recipe()) as engine:
        for batch in engine.batches(steps=2):
            engine.step(batch)
            engine.save(tmp_path)
        with pytest.raises(mh.CheckpointError, match=r"holds checkpoints(?s:.*)step-00000002"):
            engine.load(tmp_path)


def test_samples_of_different_shapes_need_a_collate_function() -> None:
    ragged = [torch.zeros(1 + index % 3) for index in range(16)]
    given = recipe(data=ragged)
    with pytest.raises(mh.DataError, match=r"default_collate raised RuntimeError(?s:.*)set recipe\.collate"):
        mh.train(given, steps=1, show=False)
