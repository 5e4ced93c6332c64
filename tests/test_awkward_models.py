"""Models that ended with a bare error of torch: they train with the same bits everywhere, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.errors import ConfigError
from oracle import oracle_run
from support.training import train_with_engine

SAMPLES = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
BLOCKS = ("blocks.0", "blocks.1")
SHARDED = mh.Strategy(sharding="zero3", transport="distributed", units=BLOCKS)
RECOMPUTED = mh.Strategy(activation_checkpointing=("blocks.*",))


def squared(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0]).float().square().mean()  # type: ignore[no-any-return]


def recipe_of(model: Callable[[], nn.Module], loss: Callable[..., Any] = squared, **changes: Any) -> mh.Recipe:
    return mh.Recipe(
        model=model,
        loss=loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=torch.utils.data.TensorDataset(SAMPLES),
        batch=mh.Batch(global_size=4, micro_size=2),
        **changes,
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Dotted(Net):
    """One of its parameters has a name that is no path to a module, as in tensordict's modules."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters["scale.of.all"] = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._parameters["scale.of.all"]


class PythonTypes(Net):
    """Its large buffer is created with a type of Python."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1200, 1000, dtype=bool))  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask[0, :8]


def penalized(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Backward goes through the graph twice."""
    x = batch[0].clone().requires_grad_()
    result = model(x).sum()
    (gradient,) = torch.autograd.grad(result, x, create_graph=True)
    return gradient.square().mean() + result / 100


def mapped(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.vmap(lambda x: model(x).square().mean())(batch[0]).mean()


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [
        (recipe_of(Dotted), SHARDED),
        (recipe_of(PythonTypes), mh.Strategy(offload="disk")),
        (recipe_of(Net, penalized), RECOMPUTED),
        (recipe_of(Net, penalized), SHARDED),
        (recipe_of(Net, mapped), SHARDED),
    ],
    ids=["dotted name", "type of Python", "second backward recomputed", "second backward sharded", "vmap"],
)
def test_an_awkward_model_has_the_oracles_bits(recipe: mh.Recipe, strategy: mh.Strategy) -> None:
    expected = oracle_run(recipe, 2).digests[-1]
    assert train_with_engine(recipe, mh.Strategy(), steps=2).digest == expected
    assert train_with_engine(recipe, strategy, steps=2).digest == expected


def gradients(model: nn.Module, batch: list[Tensor]) -> Tensor:
    of_params = torch.func.grad(lambda params: torch.func.functional_call(model, params, (batch[0],)).square().mean())
    found = of_params(dict(model.named_parameters())).values()
    return squared(model, batch) + sum(gradient.square().sum() for gradient in found)


def jacobian(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.func.jacrev(model)(batch[0][0]).square().mean()  # type: ignore[no-any-return]


def tangent(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))[1].square().mean()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own, in jvp
@pytest.mark.parametrize("loss", [gradients, jacobian, tangent])
def test_transforms_of_sharded_parameters_are_refused(loss: Callable[..., Tensor]) -> None:
    recipe = recipe_of(Net, loss)
    assert train_with_engine(recipe, mh.Strategy(), steps=2).digest == oracle_run(recipe, 2).digests[-1]
    with pytest.raises(ConfigError, match=r"transform of torch\.func") as caught:
        train_with_engine(recipe, SHARDED, steps=1)
    assert "zero2" in str(caught.value.hint)


class Scaled(Net):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


@pytest.mark.parametrize(
    ("model", "expected"), [(Scaled, "buffer ('scale'), cast it"), (Net, "cast floating-point inputs")]
)
def test_a_mixture_of_types_names_the_buffers(model: type[nn.Module], expected: str) -> None:
    with pytest.raises(ConfigError, match="bf16 and fp32") as caught:
        train_with_engine(recipe_of(model, precision="bf16"), mh.Strategy(), steps=1)
    assert expected in str(caught.value.hint)
    assert "BFloat16" in str(caught.value)


def test_recomputed_blocks_find_the_key_value_cache_as_it_was() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=True
    )
    tokens = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    recipe = mh.Recipe(
        model=lambda: transformers.GPT2LMHeadModel(config),
        loss=lambda model, batch: model(batch[0], labels=batch[0]).loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=torch.utils.data.TensorDataset(tokens),
        batch=mh.Batch(global_size=4, micro_size=2),
    )
    expected = train_with_engine(recipe, mh.Strategy(), steps=2).digest
    strategy = mh.Strategy(activation_checkpointing=("transformer.h.*",))
    assert train_with_engine(recipe, strategy, steps=2).digest == expected
