"""Models as users bring them, unchanged, have the same bits with any number of workers and any sharding."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import manyhands as mh
from oracle import oracle_run
from support.real_models import RECIPES
from support.threads import run_threads
from support.training import Outcome, train_with_engine

STRATEGIES = {
    "ddp": mh.Strategy(sharding="ddp"),
    "zero2": mh.Strategy(sharding="zero2"),
    # In shared memory zero3 would leave parameters in place; from a disk they are unsharded.
    "zero3": mh.Strategy(sharding="zero3", offload="disk"),
}
QUICK = [("zero3", 1), ("ddp", 2), ("zero3", 2), ("zero2", 3)]
REST = [way for way in product(STRATEGIES, (1, 2, 3)) if way not in QUICK]
STEPS = 2
NEEDS = {"keras": ["keras"], "resnet": ["torchvision"], "winding": [], "lora": ["peft"], "lora on bf16": ["peft"]}
IN_BF16 = ("gpt2", "llama", "bert", "t5", "mixtral", "lora", "lora on bf16", "winding")
OFTEN = {(name, "fp32") for name in RECIPES if name not in ("keras", "vit", "bert")} | {
    (name, "bf16") for name in ("gpt2", "mixtral", "lora")
}
JOBS = [
    pytest.param(name, precision, ways, marks=[] if (name, precision) in OFTEN and ways is QUICK else pytest.mark.slow)
    for name, precision in [*((name, "fp32") for name in RECIPES), *((name, "bf16") for name in IN_BF16)]
    for ways in (QUICK, REST)
]
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    # transformers 5.24 renamed gradient checkpointing; peft and many scripts still use the old name.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"),
]


def needed(name: str) -> None:
    for package in NEEDS.get(name, ["transformers"]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} isn't installed")


def run_all(recipe: mh.Recipe, workers: int, strategy: mh.Strategy) -> list[Outcome]:
    return run_threads(workers, lambda group: train_with_engine(recipe, strategy, steps=STEPS, group=group))


def id_of(value: str | list[tuple[str, int]]) -> str:
    return value.replace(" ", "-") if isinstance(value, str) else "quick" if value is QUICK else "rest"


@pytest.mark.parametrize(("name", "precision", "ways"), JOBS, ids=id_of)
def test_a_users_model_has_the_same_bits_with_any_workers_and_sharding(
    name: str, precision: str, ways: list[tuple[str, int]]
) -> None:
    needed(name)
    recipe = RECIPES[name](precision)
    expected = run_all(recipe, 1, mh.Strategy(sharding="ddp"))[0]
    assert len(set(expected.losses)) == STEPS
    for sharding, workers in ways:
        for found in run_all(recipe, workers, STRATEGIES[sharding]):
            assert (found.digest, found.losses, found.norms) == (expected.digest, expected.losses, expected.norms)
            for key, buffer in found.buffers.items():
                assert torch.equal(buffer, expected.buffers[key]), key


@pytest.mark.parametrize("name", ["gpt2", "t5", "resnet", "winding"])
def test_a_users_model_has_the_bits_of_plain_pytorch(name: str) -> None:
    needed(name)
    recipe = RECIPES[name]("fp32")
    run = oracle_run(recipe, STEPS)
    found = train_with_engine(recipe, mh.Strategy(), steps=STEPS)
    assert (found.digest, found.losses) == (run.digests[-1], tuple(run.losses))


def test_some_micro_batches_do_not_use_some_of_mixtrals_experts() -> None:
    needed("mixtral")
    recipe = RECIPES["mixtral"]("fp32")
    torch.manual_seed(0)
    model = recipe.model()
    used = []
    for first in range(0, 8, 2):
        batch = {"input_ids": torch.stack([recipe.data[first + index]["input_ids"] for index in range(2)])}
        logits = model(**batch).router_logits[0]
        used.append(set(logits.argmax(-1).tolist()))
    assert any(len(experts) < 8 for experts in used)
    assert len({frozenset(experts) for experts in used}) > 1


def test_keras_statistics_are_the_same_on_all_workers_and_survive_a_checkpoint(tmp_path: Path) -> None:
    needed("keras")
    recipe = RECIPES["keras"]("fp32")

    def work(workers: int, **options: object) -> list[dict[str, torch.Tensor]]:
        def one(group: object) -> dict[str, torch.Tensor]:
            with mh.Engine(recipe, mh.Strategy(), group) as engine:  # type: ignore[arg-type]
                if "load" in options:
                    engine.load(options["load"])  # type: ignore[arg-type]
                for batch in engine.batches(STEPS):
                    engine.step(batch)
                    if options.get("save") and engine.step_index == 1:
                        engine.save(options["save"])  # type: ignore[arg-type]
                return engine.full_state_dict()

        return run_threads(workers, one)

    (expected,) = work(1, save=tmp_path)
    moving = [name for name in expected if "moving_mean" in name]
    assert moving
    assert all(bool(expected[name].abs().sum() > 0) for name in moving)
    for found in (*work(3), *work(2, load=tmp_path / "step-00000001")):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_keras_statistics_in_bf16_are_refused() -> None:
    needed("keras")
    with pytest.raises(mh.ConfigError, match=r"frozen parameter .*moving_mean' changes in forward"):
        train_with_engine(RECIPES["keras"]("bf16"), mh.Strategy(), steps=1)


@pytest.mark.slow
def test_a_users_model_has_the_same_bits_in_processes(tmp_path: Path) -> None:
    needed("gpt2")
    expected = train_with_engine(RECIPES["gpt2"]("bf16"), mh.Strategy(), steps=STEPS).digest
    script = ROOT / "tests" / "support" / "real_model_worker.py"
    command = [sys.executable, "-m", "manyhands.cli.main", "run", "--workers", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), "distributed", "zero3", "gpt2"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("worker-*.json"))]
    assert found == [expected] * 2
