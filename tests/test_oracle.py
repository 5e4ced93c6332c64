"""One worker of the engine gives the bits of plain PyTorch, whatever the optimizer, the precision and the path."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

import manyhands as mh
from oracle import OracleRun, add_as_tree, oracle_run
from support.models import (
    Wide,
    conv_recipe,
    gpt_recipe,
    grouped,
    mean_loss,
    padded_recipe,
    partly_used_recipe,
)
from support.training import Outcome, train_with_engine

STEPS = 4
OPTIMIZERS = {
    "AdamW": grouped(AdamW, lr=3e-3),
    "AdamW fused": grouped(AdamW, lr=3e-3, fused=True),
    "AdamW foreach": grouped(AdamW, lr=3e-3, foreach=True),
    "Adam amsgrad": grouped(Adam, lr=3e-3, amsgrad=True),
    "SGD": grouped(SGD, lr=0.1),
    "SGD momentum": grouped(SGD, lr=0.1, momentum=0.9),
    "SGD nesterov": grouped(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": grouped(Adagrad, lr=1e-2),
    "RMSprop": grouped(RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": grouped(NAdam, lr=3e-3),
    "RAdam": grouped(RAdam, lr=3e-3),
    "Adadelta": grouped(Adadelta, lr=1.0),
    "Adamax": grouped(Adamax, lr=3e-3),
    "Rprop": lambda named_params: Rprop([param for _, param in named_params], lr=1e-3),
    "ASGD": grouped(ASGD, lr=0.1, t0=1),
}


def agree(recipe: mh.Recipe, *, steps: int = STEPS, **strategy: Any) -> tuple[OracleRun, Outcome]:
    """Train with plain PyTorch and with the engine, and check that the results are equal."""
    expected = oracle_run(recipe, steps)
    found = train_with_engine(recipe, mh.Strategy(**strategy), steps=steps)
    assert list(found.losses) == expected.losses
    assert list(found.norms) == expected.norms
    assert found.digest == expected.digests[-1]
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in found.buffers.items():
        assert torch.equal(buffer, expected.buffers[name]), name
    return expected, found


# All optimizers in fp32, clipped. In bf16 only two, since the update of the fp32 master weights is the same.
OFTEN = {(name, "fp32", 0.5) for name in OPTIMIZERS} | {
    (name, "bf16", None) for name in ("AdamW fused", "SGD momentum")
}


@pytest.mark.parametrize(
    ("optimizer", "precision", "clip_norm"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow)
        for case in product(OPTIMIZERS, ("fp32", "bf16"), (None, 0.5))
    ],
)
def test_one_worker_gives_the_oracles_bits(optimizer: str, precision: str, clip_norm: float | None) -> None:
    recipe = gpt_recipe(precision, optimizer=OPTIMIZERS[optimizer], clip_norm=clip_norm)
    expected, _ = agree(recipe)
    assert len(set(expected.digests)) == STEPS
    assert min(expected.norms) > 0.5  # so that clipping does something


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlap_and_sharding_change_no_bit(precision: str, overlap: bool, sharding: str) -> None:
    agree(gpt_recipe(precision), sharding=sharding, overlap=overlap, units=("blocks.0", "blocks.1"))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_are_the_mean_over_the_micro_batches(precision: str, overlap: bool) -> None:
    expected, _ = agree(conv_recipe(precision), overlap=overlap)
    assert expected.buffers["norm_1.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parameter_without_gradient_is_not_updated(precision: str, overlap: bool) -> None:
    recipe = partly_used_recipe(precision)
    expected, _ = agree(recipe, overlap=overlap)
    at_first = oracle_run(recipe, 0).params
    assert torch.equal(expected.params["never.weight"], at_first["never.weight"])
    assert not torch.equal(expected.params["sometimes.weight"], at_first["sometimes.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unequal_weights_are_exact(precision: str) -> None:
    agree(padded_recipe(precision))


def test_a_mean_loss_weighs_all_micro_batches_equally() -> None:
    agree(gpt_recipe(loss=mean_loss))


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused", "Adagrad"])
def test_a_parameter_longer_than_a_run_of_the_update_has_the_same_bits(optimizer: str) -> None:
    agree(gpt_recipe("bf16", model=Wide, optimizer=OPTIMIZERS[optimizer]), steps=2)


def test_the_order_of_sums_is_the_binary_counter() -> None:
    def letters(count: int) -> str:
        return add_as_tree([_Name(chr(ord("a") + index)) for index in range(count)]).text  # type: ignore[arg-type, attr-defined]

    assert letters(1) == "a"
    assert letters(5) == "(((ab)(cd))e)"
    assert letters(6) == "(((ab)(cd))(ef))"
    assert letters(7) == "(((ab)(cd))((ef)g))"
    assert letters(8) == "(((ab)(cd))((ef)(gh)))"


class _Name:
    """A value that records how it was added."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: _Name) -> _Name:
        return _Name(f"({self.text}{other.text})")
