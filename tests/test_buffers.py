"""Buffers that forward changes become their mean, their last value or an error, alike for any number of workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from support.positions import sample_indices
from support.threads import run_threads
from support.training import Outcome, train_with_engine
from test_bad_input import on_all
from test_trust_nothing import SAMPLES, WIDTH, Net, recipe

MICRO_BATCHES, SIZE = 4, 2


class Contrast(Net):
    """Keeps a queue of samples, as MoCo does, with a pointer to the oldest one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(6, WIDTH))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        pointer = int(self.queue_pointer)
        self.queue[pointer : pointer + SIZE] = x.detach()
        self.queue_pointer[...] = (pointer + SIZE) % len(self.queue)
        return super().forward(x) + self.queue.mean()


class Clusters(Net):
    """Centroids of k-means, and how many samples each has got: integers that depend on the samples."""

    def __init__(self, counter: torch.dtype = torch.int64) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.stack(SAMPLES[:3]))
        self.register_buffer("counts", torch.zeros(3, dtype=counter))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.centroids).argmin(1)
        self.counts += torch.bincount(nearest, minlength=3).to(self.counts.dtype)
        self.centroids.index_copy_(0, nearest, x.detach())
        return super().forward(x)


class Features(Net):
    """Random features that each forward draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.features.normal_()
        return super().forward(x + torch.cos(x @ self.features))


class Alike(nn.Module):
    """Spectral norm, a counter and a flag: every micro-batch changes them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("steps", torch.tensor(0.1))
        self.register_buffer("has_begun", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        self.steps *= 1.3
        self.has_begun.fill_(True)
        return self.norm(self.inner(x))


def outcomes(made: mh.Recipe, workers: int, sharding: str = "zero2", steps: int = 3) -> list[Outcome]:
    return run_threads(
        workers, lambda group: train_with_engine(made, mh.Strategy(sharding=sharding), steps=steps, group=group)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "a queue, last": (Contrast, {"queue": "last"}),
    "a queue and its pointer, last": (Contrast, {"queue*": "last"}),
    "centroids, last": (Clusters, {"c*": "last"}),
    "centroids, mean": (lambda: Clusters(torch.float64), {"*": "mean"}),
    "features, last": (Features, {"features": "last"}),
    "features, mean": (Features, {"feat*": "mean", "*": "refuse"}),
    "alike": (Alike, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_buffers_have_the_same_bits_with_any_number_of_workers(case: str) -> None:
    model, rules = CASES[case]
    made = recipe(model, buffers=rules)
    (expected,) = outcomes(made, 1)
    for workers, sharding in ((2, "zero3"), (3, "ddp")):
        for found in outcomes(made, workers, sharding):
            assert (found.digest, found.losses) == (expected.digest, expected.losses)
            for name, value in expected.buffers.items():
                assert torch.equal(found.buffers[name], value), name


def test_the_last_value_is_that_after_the_last_micro_batch() -> None:
    made = recipe(Contrast, buffers={"queue": "last"})
    (found,) = set(map(str, (outcome.buffers["queue"] for outcome in outcomes(made, 3))))
    expected = torch.zeros(6, WIDTH)
    for step in range(3):
        first = step * MICRO_BATCHES * SIZE + (MICRO_BATCHES - 1) * SIZE
        indices = sample_indices(made.seed, len(made.data), range(first, first + SIZE)).tolist()
        expected[step * SIZE : (step + 1) * SIZE] = torch.stack([made.data[index] for index in indices])
    assert found == str(expected)


def test_the_mean_of_equal_values_is_that_value() -> None:
    made = recipe(Alike, batch=mh.Batch(global_size=6, micro_size=2))
    (outcome,) = outcomes(made, 1, steps=2)
    expected = torch.tensor(0.1) * 1.3 * 1.3
    assert outcome.buffers["steps"] == expected
    assert outcome.buffers["has_begun"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_buffer_without_a_meaningful_mean_is_reported_once(workers: int) -> None:
    made = recipe(lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), Features()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcomes(made, workers)
    texts = [str(each.message) for each in caught if "buffer" in str(each.message)]
    assert len(texts) == 1
    assert "buffer '1.features' differs between the micro-batches of a step, and becomes their mean" in texts[0]
    assert "set buffers={'1.features': 'mean'}" in texts[0]


class Observed(nn.Module):
    """Stores the mean of its inputs in a buffer of another kind."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        self.register_buffer("observed", buffer)

    def forward(self, x: Tensor) -> Tensor:
        self.observed = x.mean(0).to(self.observed.dtype)
        return self.linear(x) * self.observed.float().mean()


REFUSED: dict[str, tuple[Callable[[], mh.Recipe], str]] = {
    "integers": (
        lambda: recipe(Clusters, buffers={"centroids": "last"}),
        "buffer 'counts' has integers that differ between the micro-batches of a step",
    ),
    "integers, mean": (
        lambda: recipe(Clusters, buffers={"*": "mean"}),
        "buffer 'counts' has integers that differ between the micro-batches of a step",
    ),
    "8-bit floats": (
        lambda: recipe(lambda: Observed(torch.zeros(WIDTH).to(torch.float8_e4m3fn))),
        "buffer 'observed' has 8-bit floats that differ between the micro-batches of a step",
    ),
    "expanded": (
        lambda: recipe(lambda: Observed(torch.zeros(1).expand(WIDTH))),
        "buffer 'observed' changes in forward, and its elements share memory",
    ),
    "refuse": (
        lambda: recipe(Features, buffers={"features": "refuse"}),
        "buffer 'features' was changed in forward, which recipe.buffers refuses",
    ),
    "no such buffer": (
        lambda: recipe(Features, buffers={"feature": "last"}),
        "recipe.buffers: 'feature' matches no buffer of the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_changes_are_refused_on_all_workers(case: str) -> None:
    make, message = REFUSED[case]
    made = make()
    for error in on_all(lambda rank, group: train_with_engine(made, mh.Strategy(), steps=1, group=group)):
        assert isinstance(error, mh.ConfigError), error
        assert message in str(error)


def test_the_last_value_of_a_buffer_of_8_bit_floats_may_be_kept() -> None:
    made = recipe(lambda: Observed(torch.zeros(WIDTH).to(torch.float8_e4m3fn)), buffers={"observed": "last"})
    assert len({found.digest for workers in (1, 3) for found in outcomes(made, workers)}) == 1


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(mh.ConfigError, match=r"unknown rule for 'queue'(?s:.*)mean, last, refuse(?s:.*)'first'"):
        recipe(Contrast, buffers={"queue": "first"})


def test_the_start_of_a_run_names_the_buffers_and_another_rule_is_another_recipe(tmp_path: Path) -> None:
    def train(rules: dict[str, str], steps: int) -> Any:
        made = recipe(lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), Contrast()), buffers=rules)
        return mh.train(made, steps=steps, run_dir=tmp_path / "run", show=False)

    train({"*.queue": "last"}, 1)
    log = " ".join((tmp_path / "run" / "logs" / "worker-0.log").read_text().split())
    assert "buffers that forward changes: 0.running_mean, 0.running_var (mean over the micro-batches);" in log
    assert "0.num_batches_tracked, 1.queue_pointer (equal after all micro-batches)" in log
    assert "1.queue (last micro-batch)" in log
    with pytest.raises(mh.CheckpointError, match="another recipe: buffers differs"):
        train({"*.queue": "mean"}, 2)
    # The report advises to name the default, "mean", and an error advises to replace "refuse". Neither makes another
    # recipe. The rule of each buffer counts, and not the pattern that gives it.
    train({"1.queue_pointer": "mean", "1.queue": "last", "0.*": "mean"}, 2)
    with pytest.raises(mh.CheckpointError, match="another recipe: buffers differs"):
        train({"1.queue": "mean", "*.queue": "last"}, 3)
    with pytest.raises(mh.ConfigError, match=r"changed in forward, which recipe\.buffers refuses"):
        train({"*.queue": "last", "0.*": "refuse"}, 3)
