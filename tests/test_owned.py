"""Optimizers that must see unsplit parameters: torch.optim's bits for any number of workers and any sharding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import manyhands as mh
from manyhands.comm.group import Group
from oracle import OracleRun, oracle_run
from support.models import (
    GPT_UNITS,
    OWNED,
    NamedParams,
    Wide,
    conv_recipe,
    gpt_recipe,
    muon_and_adamw,
    partly_used_recipe,
    warm_up,
)
from support.threads import run_threads
from support.training import Outcome, train_with_engine

STEPS = 2
SHARDINGS = ("ddp", pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3")
WORKERS = (1, 2, 3, 4)
QUICK_WORKERS = {"ddp": (2,), "zero2": (1, 4), "zero3": (3,)}
REST = {
    sharding: tuple({*WORKERS} - {*QUICK_WORKERS.get(sharding, ())}) for sharding in ("ddp", "zero1", "zero2", "zero3")
}


def assert_bits(recipe: mh.Recipe, expected: OracleRun, workers: int, **strategy: Any) -> None:
    """Check that all workers have the bits of plain PyTorch."""

    def work(group: Group) -> Outcome:
        return train_with_engine(recipe, mh.Strategy(**strategy), steps=len(expected.digests), group=group)

    for found in run_threads(workers, work):
        assert list(found.losses) == expected.losses
        assert list(found.norms) == expected.norms
        assert found.digest == expected.digests[-1]


@cache
def gpt_with(optimizer: str, precision: str, clip_norm: float | None) -> tuple[mh.Recipe, OracleRun]:
    recipe = gpt_recipe(precision, optimizer=OWNED[optimizer], clip_norm=clip_norm)
    return recipe, oracle_run(recipe, STEPS)


OFTEN = [("Muon and AdamW", "fp32", 0.5), ("Muon and AdamW", "bf16", None), ("Adafactor", "bf16", None)]
CASES = [
    pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow)
    for case in product(OWNED, ["fp32", "bf16"], [None, 0.5])
]
WAYS = [
    *(pytest.param(*way, id=f"{way[0]}-quick") for way in QUICK_WORKERS.items()),
    *(pytest.param(*way, id=f"{way[0]}-rest", marks=pytest.mark.slow) for way in REST.items()),
]


@pytest.mark.parametrize(("sharding", "numbers"), WAYS)
@pytest.mark.parametrize(("optimizer", "precision", "clip_norm"), CASES)
def test_every_sharding_and_number_of_workers_gives_the_oracles_bits(
    optimizer: str, precision: str, clip_norm: float | None, sharding: str, numbers: tuple[int, ...]
) -> None:
    recipe, expected = gpt_with(optimizer, precision, clip_norm)
    assert len(set(expected.digests)) == STEPS
    for workers in numbers:
        assert_bits(recipe, expected, workers, sharding=sharding, units=GPT_UNITS)


@pytest.mark.parametrize("sharding", ["zero1", "zero3"])
@pytest.mark.parametrize("optimizer", OWNED)
def test_state_on_a_disk_changes_no_bit(optimizer: str, sharding: str, tmp_path: Path) -> None:
    recipe, expected = gpt_with(optimizer, "bf16", None)
    assert_bits(recipe, expected, 2, sharding=sharding, units=GPT_UNITS, offload="disk", scratch=str(tmp_path))


@pytest.mark.parametrize("optimizer", OWNED)
def test_several_threads_per_worker_give_the_oracles_bits(optimizer: str) -> None:
    recipe = gpt_recipe("bf16", optimizer=OWNED[optimizer], threads_per_worker=2)
    expected = oracle_run(recipe, STEPS)
    for workers in (1, 2):
        assert_bits(recipe, expected, workers)


@pytest.mark.parametrize("optimizer", OWNED)
def test_units_chosen_automatically_change_no_bit(optimizer: str) -> None:
    recipe, expected = gpt_with(optimizer, "bf16", None)
    assert_bits(recipe, expected, 3, overlap=False)


MUON_OPTIONS: dict[str, dict[str, Any]] = {
    "original": {"adjust_lr_fn": "original"},
    "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw", "lr": 3e-3},
    "spectral_unclamped": {"adjust_lr_fn": "spectral_unclamped", "weight_decay": 0.0},
    "no nesterov": {"nesterov": False, "momentum": 0.8},
    "few steps": {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
}


@pytest.mark.parametrize("options", MUON_OPTIONS)
def test_muons_options_have_the_bits_of_torch(options: str) -> None:
    recipe = gpt_recipe("bf16", optimizer=muon_and_adamw(**MUON_OPTIONS[options]))
    expected = oracle_run(recipe, STEPS)
    assert expected.digests != gpt_with("Muon and AdamW", "bf16", 0.5)[1].digests or (
        options == "original"  # which is the default
    )
    assert_bits(recipe, expected, 2)


def muon_for_matrices(named_params: NamedParams) -> list[torch.optim.Optimizer]:
    """Return Muon for all matrices, and SGD for the other parameters."""
    matrices = [param for _, param in named_params if param.ndim == 2]
    return [
        torch.optim.Muon(matrices, lr=0.01),
        torch.optim.SGD([param for _, param in named_params if param.ndim != 2], lr=0.1, momentum=0.9),
    ]


class Transposed(nn.Module):
    """A model whose matrices are built as transposed views, which are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = Wide(), nn.Linear(61, 61)
        for linear in (self.wide.up, self.head):
            linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
        assert not self.wide.up.weight.is_contiguous()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.wide(tokens).to(self.head.weight.dtype)).float()


@pytest.mark.parametrize("sharding", ["zero2", pytest.param("ddp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("precision", "clip_norm"), [("fp32", 0.5), ("bf16", None)])
def test_matrices_longer_than_a_run_and_not_contiguous_have_the_same_bits(
    precision: str, sharding: str, clip_norm: float | None
) -> None:
    recipe = gpt_recipe(precision, model=Transposed, optimizer=muon_for_matrices, clip_norm=clip_norm)
    expected = oracle_run(recipe, 2)
    for workers in (1, 3):
        assert_bits(recipe, expected, workers, sharding=sharding)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_matrix_without_gradient_is_not_updated(precision: str, sharding: str) -> None:
    recipe = partly_used_recipe(precision, optimizer=muon_for_matrices)
    expected, at_first = oracle_run(recipe, STEPS), oracle_run(recipe, 0).params
    assert torch.equal(expected.params["never.weight"], at_first["never.weight"])
    for workers in (1, 3):
        assert_bits(recipe, expected, workers, sharding=sharding)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_parameters_of_four_dimensions_and_two_dtypes_have_owners(precision: str, sharding: str) -> None:
    recipe = conv_recipe(precision, optimizer=OWNED["Adafactor"])
    expected = oracle_run(recipe, STEPS)
    for workers in (1, 2, 3):
        assert_bits(recipe, expected, workers, sharding=sharding)


class Normalized(torch.optim.Optimizer):
    """A custom optimizer: steps along the smoothed direction of a parameter's gradient, with state of other shapes."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(size=torch.zeros(1), mean=torch.zeros(2, 3), steps=0)
                state["steps"] += 1
                state["size"].lerp_(param.grad.norm().view(1), 0.5)
                state["mean"].add_(param.mean())
                param.sub_(param.grad / state["size"], alpha=group["lr"] / (1 + float(state["mean"].sum()) ** 2))


def test_a_custom_optimizer_is_applied_by_owner_if_declared() -> None:
    recipe = gpt_recipe(optimizer=lambda named: Normalized([p for _, p in named], 0.1), optimizer_kind="per-parameter")
    expected = oracle_run(recipe, STEPS)
    for workers in WORKERS:
        assert_bits(recipe, expected, workers)


def test_custom_optimizer_state_of_any_shape_is_restored(tmp_path: Any) -> None:
    recipe = gpt_recipe(optimizer=lambda named: Normalized([p for _, p in named], 0.1), optimizer_kind="per-parameter")
    expected = oracle_run(recipe, STEPS).digests[-1]
    run_threads(2, lambda group: train_with_engine(recipe, mh.Strategy(), steps=1, group=group, save=tmp_path))
    for workers, sharding in ((1, "ddp"), (3, "zero2")):

        def resume(group: Group, sharding: str = sharding) -> Outcome:
            return train_with_engine(
                recipe, mh.Strategy(sharding=sharding), steps=STEPS, group=group, load=tmp_path / "step-00000001"
            )

        assert {outcome.digest for outcome in run_threads(workers, resume)} == {expected}


def another_schedule_for_muon(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Return a schedule that is constant at first, then decreases."""
    if isinstance(optimizer, torch.optim.Muon):
        return LambdaLR(optimizer, lambda step: 1 / (step + 1))
    return warm_up(optimizer)


def test_every_optimizer_has_its_schedule() -> None:
    recipe = gpt_recipe(optimizer=OWNED["Muon and AdamW"], schedule=another_schedule_for_muon)
    expected = oracle_run(recipe, STEPS)
    with mh.Engine(recipe) as engine:
        rates = [engine.step(batch).learning_rates for batch in engine.batches(STEPS)]
        assert engine.digest() == expected.digests[-1]
    assert rates == expected.learning_rates
    assert len({muon / adamw for muon, adamw in rates}) == STEPS


def test_each_worker_has_only_the_optimizer_state_of_its_own_matrices() -> None:
    def work(group: Group) -> set[str]:
        recipe = gpt_recipe(optimizer=OWNED["Muon and AdamW"])
        with mh.Engine(recipe, mh.Strategy(sharding="zero2"), group=group) as engine:
            for batch in engine.batches(1):
                engine.step(batch)
            shapes = {name: param.shape for name, param in engine.model.named_parameters()}
            mine = {
                piece.name: piece for piece, _ in engine.updater.slices if piece.name in engine.optimizer.unsplittable
            }
            for name, piece in mine.items():
                assert piece.start == 0
                assert engine.optimizer.state_of(piece)["momentum_buffer"].shape == shapes[name]
            return set(mine)

    owned = run_threads(3, work)
    everything = [name for names in owned for name in names]
    assert len(everything) == len(set(everything)) == 8
    assert all(owned)
