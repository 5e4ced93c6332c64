"""Changes to a model during training that could silently give wrong results are refused by name.

Cases are run with one worker and with several, and with gradients exchanged during backward and after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from oracle import oracle_run
from support.threads import run_threads
from support.training import train_with_engine
from test_trust_nothing import GATHERED, SHARDINGS, WIDTH, Net, recipe


class Late(Net):
    """Calls a function in this worker's forward number `at`, which a subclass defines."""

    at = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.hidden: list[nn.Module] = []
        self.frozen = nn.Parameter(torch.ones(300, 300), requires_grad=False)
        self.register_buffer("statistics", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.happens()
        x = super().forward(x)
        for module in [*self.hidden, getattr(self, "late", nn.Identity())]:
            x = module(x)
        return x * self.frozen[0, 0]

    def happens(self) -> None:
        """Overridden."""


def happening(what: Callable[[Late], None], at: int = 3) -> Callable[[], nn.Module]:
    class Happening(Late):
        def happens(self) -> None:
            what(self)

    Happening.at = at
    return Happening


def late_module(net: Late) -> None:
    net.late = nn.Linear(WIDTH, WIDTH)


def hidden_module(net: Late) -> None:
    net.hidden.append(nn.Linear(WIDTH, WIDTH))


def replaced(net: Late) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach().clone())


def removed(net: Late) -> None:
    net.first = nn.Identity()


def new_data(net: Late) -> None:
    net.first.weight.data = net.first.weight.detach().clone()


def new_frozen_data(net: Late) -> None:
    net.frozen.data = net.frozen.detach() + 1


def to_other_dtype(net: Late) -> None:
    net.last.double().float()


def in_place(net: Late) -> None:
    with torch.no_grad():
        net.first.weight.clamp_(-0.1, 0.1)


def in_place_frozen(net: Late) -> None:
    with torch.no_grad():
        net.frozen.add_(1)


def unfreeze(net: Late) -> None:
    net.frozen.requires_grad_(True)


def late_buffer(net: Late) -> None:
    net.register_buffer("cache", torch.ones(3))


def no_buffer(net: Late) -> None:
    net.statistics = None


def longer_buffer(net: Late) -> None:
    net.statistics = torch.zeros(WIDTH + 1)


def double_buffer(net: Late) -> None:
    net.statistics = net.statistics.double()


RULES = {"calls": "keep", "hidden": "keep"}

HAPPENS: dict[str, tuple[Callable[[Late], None], str]] = {
    "a parameter comes late": (late_module, "parameter 'late.weight' was added after the engine was created"),
    "a parameter is replaced": (replaced, "parameter 'first.weight' was replaced or removed"),
    "a parameter is removed": (removed, "parameter 'first.weight' was replaced or removed"),
    "a parameter is assigned other data": (new_data, "the data of parameter 'first.weight' was replaced"),
    "a frozen parameter is assigned other data": (new_frozen_data, "the data of parameter 'frozen' was replaced"),
    "a module is cast": (to_other_dtype, "the data of parameter 'last.weight' was replaced"),
    "a parameter is changed in place": (in_place, "parameter 'first.weight' was changed in place"),
    "a frozen parameter is changed": (in_place_frozen, "parameter 'frozen' was changed in place"),
    "a frozen parameter is made trainable": (unfreeze, "parameter 'frozen' was frozen when the engine was created"),
    "a buffer comes late": (late_buffer, "buffer 'cache' was registered after the engine was created"),
    "a buffer is removed": (no_buffer, "buffer 'statistics' was removed"),
    "a buffer has another shape": (longer_buffer, "buffer 'statistics' has a different shape or dtype"),
    "a buffer has another dtype": (double_buffer, "buffer 'statistics' has a different shape or dtype"),
}


@pytest.mark.parametrize(
    "strategy", [mh.Strategy(), mh.Strategy(overlap=False), GATHERED], ids=["zero2", "after", "zero3"]
)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("case", HAPPENS)
def test_changes_in_a_forward_are_refused(case: str, at: int, strategy: mh.Strategy) -> None:
    what, message = HAPPENS[case]
    made = recipe(happening(what, at), attributes=RULES)
    with pytest.raises(mh.ConfigError, match=message):
        train_with_engine(made, strategy, steps=2)
    with pytest.raises((mh.ConfigError, mh.WorkerError), match=message):
        run_threads(2, lambda group: train_with_engine(made, strategy, steps=2, group=group))


@pytest.mark.parametrize("strategy", [mh.Strategy(), GATHERED], ids=["zero2", "zero3"])
@pytest.mark.parametrize("case", [case for case in HAPPENS if "buffer has another" not in case])
def test_changes_between_steps_are_refused(case: str, strategy: mh.Strategy) -> None:
    what, message = HAPPENS[case]
    with mh.Engine(recipe(Late, attributes=RULES), strategy) as engine:
        batches = engine.batches(3)
        engine.step(next(batches))
        if strategy is GATHERED and what in (in_place, in_place_frozen):
            with pytest.raises(RuntimeError, match="refers to a single memory location"):
                what(engine.model)  # the parameter is resharded, so torch itself raises
            return
        what(engine.model)
        with pytest.raises(mh.ConfigError, match=message):
            engine.step(next(batches))


def test_a_module_in_a_plain_list_is_refused() -> None:
    with pytest.raises(mh.ConfigError, match="a trainable parameter that the model doesn't have"):
        train_with_engine(recipe(happening(hidden_module, 1), attributes=RULES), mh.Strategy(), steps=1)


def test_a_criterion_with_parameters_is_refused() -> None:
    criterion = nn.Linear(WIDTH, 1)
    made = recipe(Net, loss=lambda model, batch: criterion(model(batch)).square().mean())
    with pytest.raises(mh.ConfigError, match="a trainable parameter that the model doesn't have"):
        train_with_engine(made, mh.Strategy(), steps=1)
    criterion.requires_grad_(False)
    train_with_engine(made, mh.Strategy(), steps=1)


def test_an_embedding_that_renormalizes_itself_is_refused() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(10, WIDTH, max_norm=0.1), nn.Linear(WIDTH, WIDTH))

    made = recipe(
        model,
        data=[torch.tensor([index % 10, 3]) for index in range(24)],
        loss=lambda model, batch: model(batch).square().mean(),
    )
    with pytest.raises(mh.ConfigError, match=r"parameter '0.weight' was changed in place"):
        train_with_engine(made, mh.Strategy(), steps=1)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_gradient_from_outside_a_step_is_refused(overlap: bool) -> None:
    with mh.Engine(recipe(Net), mh.Strategy(overlap=overlap)) as engine:
        batches = engine.batches(2)
        engine.step(next(batches))
        param = engine.model.first.weight
        param.grad = torch.ones_like(param)
        with pytest.raises(mh.ConfigError, match=r"parameter 'first.weight' already has a gradient before the step"):
            engine.step(next(batches))


def test_a_parameter_frozen_for_some_steps_has_the_bits_of_plain_pytorch() -> None:
    def one(group: Group, sharding: str, overlap: bool) -> str:
        with mh.Engine(recipe(Net), mh.Strategy(sharding=sharding, overlap=overlap), group) as engine:
            for batch in engine.batches(4):
                engine.model.first.requires_grad_(engine.step_index not in (1, 2))
                engine.step(batch)
            return engine.digest()

    class FrozenForSome(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.first.requires_grad_(self.calls // 4 not in (1, 2))
            self.calls += 1
            return super().forward(x)

    expected = oracle_run(recipe(FrozenForSome), 4).digests[-1]
    for workers in (1, 2, 3):
        for sharding, overlap in [*((sharding, True) for sharding in SHARDINGS), (SHARDINGS[-1], False)]:
            found = run_threads(
                workers, lambda group, sharding=sharding, overlap=overlap: one(group, sharding, overlap)
            )
            assert found == [expected] * workers


class Output:
    """A result like those of libraries' models, which contains the loss."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "an object": (Output, "Output(?s:.*)return only its loss"),
    "loss and logits": (
        lambda loss: (loss, torch.zeros(2, 5)),
        r"shape \(2, 5\) as the weight(?s:.*)return only its loss",
    ),
    "three things": (lambda loss: (loss, loss, loss), "tuple(?s:.*)return only its loss"),
    "a number": (lambda loss: loss.item(), r"float(?s:.*)before \.item\(\)"),
    "a detached loss": (lambda loss: loss.detach(), r"without a gradient(?s:.*)without detach\(\)"),
    "a vector": (lambda loss: loss.expand(2), r"shape \(2,\)(?s:.*)return loss\.mean\(\)"),
}


@pytest.mark.parametrize("case", RESULTS)
def test_an_invalid_loss_is_refused(case: str) -> None:
    make, got = RESULTS[case]
    made = recipe(Net, loss=lambda model, batch: make(model(batch).square().mean()))
    with pytest.raises(mh.ConfigError, match=rf"recipe.loss did not return a loss(?s:.*){got}"):
        train_with_engine(made, mh.Strategy(), steps=1)
