"""Bad input: a clear error states what failed, where and what to do, on all workers; none waits for another first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from oracle import oracle_run
from support.positions import sample_indices
from support.threads import host_groups, run_threads, thread_groups

SUPPORT = Path(__file__).resolve().parent / "support"
RECIPE = str(SUPPORT / "faulty.toml")
SECONDS = 240.0  # errors take milliseconds; the time that peers wait for a stalled worker is longer
SAMPLES = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Samples(torch.utils.data.Dataset[Tensor]):
    """64 samples [8]."""

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Tensor:
        return SAMPLES[index]


class LostSample(Samples):
    """A data set in which the file of one sample is missing."""

    def __getitem__(self, index: int) -> Tensor:
        if index == LOST:
            return torch.load("/nowhere/sample.pt")
        return SAMPLES[index]


LOST = 29


class Poison(torch.autograd.Function):
    """Adds 0 to the loss, and NaN to the parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:
        ctx.save_for_backward(param)
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        poisoned = torch.zeros_like(ctx.saved_tensors[0])
        poisoned.view(-1)[3] = float("nan")
        return poisoned


class Sparse(nn.Module):
    """A model whose embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(torch.zeros(len(x), dtype=torch.long)))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def other_weights() -> nn.Module:
    built = model()
    nn.init.zeros_(built[2].weight)
    return built


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def sgd(params: list[tuple[str, nn.Parameter]], lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def recipe(**changes: Any) -> mh.Recipe:
    defaults: dict[str, Any] = {
        "model": model,
        "loss": loss,
        "optimizer": sgd,
        "data": Samples(),
        "batch": mh.Batch(global_size=8, micro_size=2),
    }
    return mh.Recipe(**{**defaults, **changes})


def on_all(work: Callable[[int, Group], Any], workers: int = 2) -> list[Any]:
    """Call `work(rank, group)` in a thread for each rank. Return the results or errors, by rank."""
    results: list[Any] = [None] * workers

    def run(rank: int, make: Callable[[], Group]) -> None:
        try:
            results[rank] = work(rank, make())
        except Exception as error:
            results[rank] = error

    makers = enumerate(thread_groups(workers, stall_seconds=3 * SECONDS))
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in makers]
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), results
    return results


def trained(recipe: mh.Recipe, strategy: mh.Strategy, group: Group, steps: int = 2) -> str:
    with mh.Engine(recipe, strategy, group) as engine:
        for batch in engine.batches(steps):
            engine.step(batch)
        return engine.digest()


class Unknown(torch.optim.Optimizer):
    """An optimizer that Manyhands does not know."""


class Hidden:
    """Functions whose option is in an object, where workers don't compare it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def weights(self) -> nn.Module:
        return other_weights() if self.rank else model()

    def shapes(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8 + self.rank))

    def sgd(self, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return sgd(params, 0.1 + self.rank)


def nan_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """NaN in micro-batch 2 of step 2."""
    return loss(model, batch) * (float("nan") if torch.equal(batch[0], SAMPLES[FIRST_OF_MICRO_BATCH]) else 1.0)


FIRST_OF_MICRO_BATCH = int(sample_indices(0, len(SAMPLES), range(12, 13))[0])


ON_ALL: dict[str, tuple[Callable[[int], mh.Recipe], type[Exception], list[str]]] = {
    "optimizer: LBFGS": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.LBFGS([param for _, param in named])),
        mh.ConfigError,
        ["torch.optim.lbfgs.LBFGS can't be used: it uses all parameters together", "AdamW"],
    ),
    "optimizer: SparseAdam": (
        lambda rank: recipe(
            optimizer=lambda named: torch.optim.SparseAdam([p for _, p in named]), optimizer_kind="elementwise"
        ),
        mh.ConfigError,
        ["SparseAdam can't be used: it requires sparse gradients"],
    ),
    "optimizer: Muon for a bias": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.Muon(named)),
        mh.ConfigError,
        ["torch.optim.Muon was given a parameter that is not a matrix: 0.bias or 2.bias", "(8,)", "torch.optim.AdamW"],
    ),
    "optimizer: Muon for matrices only": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.Muon([p for _, p in named if p.ndim == 2])),
        mh.ConfigError,
        ["leaves out 2 trainable parameter(s): 0.bias, 2.bias"],
    ),
    "optimizer: unknown": (
        lambda rank: recipe(optimizer=lambda named: Unknown(named, {"lr": 0.1})),
        mh.ConfigError,
        ["Unknown is not known", "optimizer_kind = 'elementwise'", "'per-parameter'"],
    ),
    "optimizer: unknown among several": (
        lambda rank: recipe(
            optimizer=lambda named: [torch.optim.SGD(named[1:], lr=0.1), Unknown(named[:1], {"lr": 0.1})]
        ),
        mh.ConfigError,
        ["Unknown is not known"],
    ),
    "optimizer: none": (
        lambda rank: recipe(optimizer=lambda named: []),
        mh.ConfigError,
        ["recipe.optimizer did not return an optimizer"],
    ),
    "optimizer: one is none": (
        lambda rank: recipe(optimizer=lambda named: [torch.optim.SGD(named, lr=0.1), "Muon"]),
        mh.ConfigError,
        ["recipe.optimizer did not return an optimizer", "a list of them", "'Muon'"],
    ),
    "optimizer: a parameter twice": (
        lambda rank: recipe(
            optimizer=lambda named: [torch.optim.SGD(named, lr=0.1), torch.optim.AdamW(named[2:3], lr=0.1)]
        ),
        mh.ConfigError,
        ["two of recipe.optimizer's optimizers have the parameter '2.weight'", "param groups 0 and 1"],
    ),
    "optimizer: kind": (
        lambda rank: recipe(optimizer_kind="matrix"),
        mh.ConfigError,
        ["recipe.optimizer_kind has an unknown value", "elementwise, per-parameter"],
    ),
    "optimizer: leaves out": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.SGD(named[1:], lr=0.1)),
        mh.ConfigError,
        ["leaves out 1 trainable parameter(s): 0.weight"],
    ),
    "model: not a model": (lambda rank: recipe(model=lambda: len), mh.ConfigError, ["did not return a model"]),
    "model: other weights": (
        lambda rank: recipe(model=Hidden(rank).weights),
        mh.ConfigError,
        ["workers 0 and 1 don't have the same model: they differ in 2.weight", "(worker 0)", "(worker 1)"],
    ),
    "model: other shapes": (
        lambda rank: recipe(model=Hidden(rank).shapes),
        mh.ConfigError,
        ["don't have the same model: they differ in 1.weight", "[8, 8]", "[9, 8]"],
    ),
    "recipes: seed": (
        lambda rank: recipe(seed=rank),
        mh.ConfigError,
        ["workers 0 and 1 don't have the same recipe: they differ in seed", "0 (worker 0)", "1 (worker 1)"],
    ),
    "recipes: batch": (
        lambda rank: recipe(batch=mh.Batch(global_size=8 + 8 * rank, micro_size=2)),
        mh.ConfigError,
        ["they differ in batch.global_size", "8 (worker 0)", "16 (worker 1)"],
    ),
    "recipes: lr": (
        lambda rank: recipe(optimizer=Hidden(rank).sgd),
        mh.ConfigError,
        ["don't have the same optimizer: they differ in", "lr", "0.1 (worker 0)", "1.1 (worker 1)"],
    ),
    "loss: nothing": (lambda rank: recipe(loss=lambda *_: None), mh.ConfigError, ["did not return a loss", "None"]),
    "loss: not scalar": (
        lambda rank: recipe(loss=lambda model, batch: model(batch)),
        mh.ConfigError,
        ["did not return a loss", "a tensor of shape (2, 8)"],
    ),
    "gradient: sparse": (
        lambda rank: recipe(model=Sparse),
        mh.ConfigError,
        ["the gradient of 'embedding.weight' is sparse", "sparse=False"],
    ),
    "weight: zero": (
        lambda rank: recipe(loss=lambda model, batch: (model(batch).sum(), 0.0)),
        mh.NumericsError,
        ["the global batch has no weight", "step 1", "a positive sum"],
    ),
    "loss: NaN": (
        lambda rank: recipe(loss=nan_loss),
        mh.NumericsError,
        [
            "the loss of micro-batch 2 is nan",
            f"step 2, samples 12 to 13 in the run's order (in recipe.data: {FIRST_OF_MICRO_BATCH}, ",
            "no weight has been changed",
        ],
    ),
    "data: empty": (lambda rank: recipe(data=[]), mh.DataError, ["recipe.data is empty"]),
}


@pytest.mark.parametrize("case", ON_ALL)
def test_all_workers_raise_the_same_error(case: str) -> None:
    make, kind, texts = ON_ALL[case]
    errors = on_all(lambda rank, group: trained(make(rank), mh.Strategy(), group))
    for error in errors:
        assert type(error) is kind, error
        for text in texts:
            assert text in str(error), error
    assert str(errors[0]) == str(errors[1])


def test_different_strategies_are_reported() -> None:
    for error in on_all(lambda rank, group: trained(recipe(), mh.Strategy(sharding=("ddp", "zero1")[rank]), group)):
        assert isinstance(error, mh.ConfigError), error
        assert "don't have the same strategy: they differ in sharding" in str(error)


def test_more_workers_than_micro_batches_are_refused() -> None:
    for error in on_all(lambda rank, group: trained(recipe(), mh.Strategy(), group), workers=5):
        assert isinstance(error, mh.ConfigError), error
        assert "5 workers are too many for a step of 4 micro-batches" in str(error)
        assert "at most 4 workers" in str(error)


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("group_kind", "workers"), [("auto", 1), ("auto", 2), ("distributed", 1)])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(
    sharding: str, group_kind: str, workers: int
) -> None:
    def work(rank: int, group: Group | None) -> str:
        poisoned = False
        calls = 0

        def sometimes_poisoned(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(model, batch) + (Poison.apply(model[2].weight) if poisoned and micro_batch() == 2 else 0.0)

        def micro_batch() -> int:
            mine = engine.my_micro_batches(engine.step_index)
            return mine[(calls - 1) % len(mine)]

        strategy = mh.Strategy(sharding=sharding, transport=group_kind)
        with mh.Engine(recipe(loss=sometimes_poisoned), strategy, group) as engine:
            for batch in engine.batches(1):
                engine.step(batch)
            before, poisoned = engine.digest(), True
            with pytest.raises(mh.NumericsError) as caught:
                engine.step(next(engine.batches()))
            assert caught.value.what == "the gradient of '2.weight' is not finite in micro-batch 2"
            assert "step 2, samples 12 to 13" in str(caught.value.where)
            assert engine.digest() == before
            poisoned = False
            for batch in engine.batches(3):
                engine.step(batch)
            return engine.digest()

    undisturbed = on_all(lambda rank, group: trained(recipe(), mh.Strategy(), group, steps=3), workers=1)
    found = [work(0, None)] if group_kind == "distributed" else on_all(work, workers)
    assert found == undisturbed * workers


REFUSED_STEPS = {
    "gradient": "the gradient of '2.weight' is not finite in micro-batch 2",
    "loss": "the loss of micro-batch 2 is nan",
    "weight": "the global batch has no weight",
}


@pytest.mark.parametrize("cause", REFUSED_STEPS)
@pytest.mark.parametrize(("hosts", "workers"), [(1, 1), (1, 3), (2, 2)])
def test_training_continues_unchanged_after_a_refused_step(cause: str, hosts: int, workers: int) -> None:
    """A step is refused twice, then succeeds. Weights, momentum, buffers and schedule are as without the refusals."""

    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

    def summed(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        return model(batch).square().sum(), float(len(batch))

    normed_recipe = recipe(
        model=normed, loss=summed, schedule=lambda front: torch.optim.lr_scheduler.StepLR(front, 1, 0.5)
    )

    def work(group: Group) -> tuple[str, Tensor]:
        disturbed, computed = False, 0

        def sometimes_wrong(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
            nonlocal computed
            mine = engine.my_micro_batches(engine.step_index)
            micro_batch, computed = mine[computed % len(mine)], computed + 1
            loss, weight = summed(model, batch)
            if disturbed and cause == "weight":
                return loss, 0.0
            if disturbed and micro_batch == 2:
                loss = loss * float("nan") if cause == "loss" else loss + Poison.apply(model[2].weight)
            return loss, weight

        with mh.Engine(replace(normed_recipe, loss=sometimes_wrong), mh.Strategy(), group) as engine:
            for batch in engine.batches(4):
                disturbed = engine.step_index == 2
                if disturbed:
                    before = engine.full_state_dict()
                    for _ in range(2):
                        with pytest.raises(mh.NumericsError) as caught:
                            engine.step(next(engine.batches()))
                        assert caught.value.what == REFUSED_STEPS[cause]
                    disturbed = False
                    state = engine.full_state_dict()
                    assert all(torch.equal(state[name], value) for name, value in before.items())
                engine.step(batch)
            return engine.digest(), engine.model[1].running_mean

    expected = oracle_run(normed_recipe, 4)
    makers = thread_groups(workers) if hosts == 1 else host_groups(hosts, workers)
    for digest, mean in run_threads(len(makers), work, makers=makers):
        assert digest == expected.digests[-1]
        assert torch.equal(mean, expected.buffers["1.running_mean"])


def test_all_workers_report_a_missing_sample() -> None:
    errors = on_all(lambda rank, group: trained(recipe(data=LostSample()), mh.Strategy(), group, steps=8))
    reader = next(error for error in errors if isinstance(error, mh.DataError))
    assert f"recipe.data[{LOST}] raised FileNotFoundError" in str(reader)
    assert "/nowhere/sample.pt" in str(reader)
    assert "micro-batch" in str(reader.where)
    other = next(error for error in errors if error is not reader)
    assert isinstance(other, mh.WorkerError)
    assert f"raised DataError: recipe.data[{LOST}] raised FileNotFoundError" in str(other)


def test_different_collective_calls_are_reported() -> None:
    def work(rank: int, group: Group) -> None:
        with mh.Engine(recipe(), mh.Strategy(), group) as engine:
            if rank == 1:
                engine.digest()
            for batch in engine.batches(1):
                engine.step(batch)

    errors = on_all(work)
    assert any(isinstance(error, mh.ConfigError) for error in errors)
    for error in errors:  # a worker that sees the other one fail first reports that failure
        assert isinstance(error, (mh.ConfigError, mh.WorkerError)), error
        assert "made different collective calls" in str(error)
    assert any("step 0 / digest" in str(error) for error in errors)


def test_a_worker_that_leaves_early_is_reported() -> None:
    def work(rank: int, group: Group) -> None:
        engine = mh.Engine(recipe(), mh.Strategy(), group)
        if rank == 1:
            group.membership.leave()  # type: ignore[attr-defined]  # like a program that exits without closing
        for batch in engine.batches(1 - rank):
            engine.step(batch)

    error = on_all(work)[0]
    assert isinstance(error, mh.WorkerError)
    assert error.rank == 1
    assert "worker 1 has left the group" in str(error)


def test_a_sum_of_gradients_that_overflows_names_the_step_to_skip() -> None:
    def overflowing(model: Any, batch: Tensor) -> Tensor:
        weight = model[2].weight
        zero = (weight - weight.detach()).sum()  # its gradient is 1
        return loss(model, batch) + zero * (3e38 if engine.step_index == 1 else 1.0)

    with mh.Engine(recipe(loss=overflowing)) as engine:
        batches = engine.batches()
        engine.step(next(batches))
        with pytest.raises(mh.NumericsError, match="although every micro-batch's gradients are finite") as caught:
            engine.step(next(batches))
        assert caught.value.where == "step 2"
        assert str(caught.value.hint).endswith("--skip-step 2")
        with pytest.raises(mh.ConfigError, match="because it failed after step 1: "):
            engine.digest()
