"""Generators are seeded behind every call of a unit, so what a unit draws doesn't depend on its predecessors' draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manyhands as mh
from manyhands.engine.step.hooks import around_forward
from manyhands.engine.units.unit_plan import called_units
from manyhands.models.modes import silent_in_evaluation
from manyhands.numerics.seeds import DrawDetector, generators_state, preserved_generators, restore_generators
from oracle import oracle_run
from support.models import gpt_recipe, next_token_loss
from support.odd_models import Odd, recipe_of
from support.threads import run_threads
from support.training import train_with_engine

STEPS = 2


class Draws(nn.Module):
    """Draws from every generator, `more` times more often than it needs to."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(32, 32), more

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.more):
            random.random(), np.random.rand(), torch.rand(3)
        return F.dropout(self.linear(x), 0.3, self.training) * random.random() * float(np.random.rand())


class Everywhere(Odd):
    """Random numbers in units, between them, and inside a module that contains units and is recomputed."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.blocks[1], self.blocks[2], self.last = Draws(more), Draws(), Draws()

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = F.dropout(self.blocks[0](self.tokens(tokens)), 0.2, self.training)
        x = checkpoint(self.middle, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return self.head(self.norm(self.last(self.blocks[1](self.blocks[2](x))))).float()

    def middle(self, x: Tensor) -> Tensor:
        """Draw only from torch, whose checkpoint restores no other generator."""
        return self.blocks[0](self.blocks[3](x)) * torch.rand(()) + self.blocks[3](x)  # type: ignore[no-any-return]


class Nested(nn.Module):
    """Its `body` contains units, and its activations are recomputed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Odd()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.body(tokens)
        return out


@pytest.mark.parametrize("model", [Everywhere, Nested])
def test_draws_have_the_oracles_bits(model: type[nn.Module]) -> None:
    recipe = recipe_of(model)
    expected = oracle_run(recipe, STEPS).digests[-1]
    for workers, sharding in ((1, "ddp"), (2, "zero3"), (3, "zero2")):
        train = partial(train_with_engine, recipe, mh.Strategy(sharding=sharding), steps=STEPS)
        outcomes = run_threads(workers, lambda group, train=train: train(group=group))
        assert {outcome.digest for outcome in outcomes} == {expected}
    if model is Nested:
        strategy = mh.Strategy(activation_checkpointing=("body",))
        assert train_with_engine(recipe, strategy, steps=STEPS).digest == expected


class Wrapped(nn.Module):
    """Calls another unit of the model, and draws after it. own: recompute this part, as the model's author chose."""

    def __init__(self, shared: nn.Module, own: bool) -> None:
        super().__init__()
        self.shared, self.linear, self.own = shared, nn.Linear(32, 32), own

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, x, use_reentrant=False) if self.own else self.part(x)  # type: ignore[no-untyped-call]
        return self.linear(x)  # type: ignore[no-any-return]

    def part(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.shared(x)), 0.3, self.training)


def test_a_recomputed_call_of_another_unit_draws_the_same_numbers() -> None:
    def model(own: bool) -> nn.Module:
        made, shared = Odd(), nn.Linear(32, 32)
        made.blocks = nn.ModuleList(Wrapped(shared, own) for _ in range(4))
        made._modules = {"shared": shared, **made._modules}  # so it is a unit of its own
        assert {"shared", "blocks.0"} <= set(called_units(made))
        return made

    plain, own = (recipe_of(partial(model, own)) for own in (False, True))
    expected = oracle_run(plain, STEPS).digests[-1]
    assert oracle_run(own, STEPS).digests[-1] == expected
    assert train_with_engine(plain, mh.Strategy(), steps=STEPS).digest == expected
    assert train_with_engine(own, mh.Strategy(), steps=STEPS).digest == expected
    recomputed = mh.Strategy(activation_checkpointing=("blocks.*",))
    assert train_with_engine(plain, recomputed, steps=STEPS).digest == expected


def test_draws_dont_depend_on_how_many_an_earlier_unit_made() -> None:
    """Only what blocks.1 draws for itself changes, and that isn't used."""

    class Discards(Draws):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return x

    def model(more: int) -> nn.Module:
        made = Everywhere()
        made.blocks[1] = Discards(more)
        return made

    recipes = [recipe_of(partial(model, more)) for more in (0, 1, 700)]
    assert len({train_with_engine(recipe, mh.Strategy(), steps=1).digest for recipe in recipes}) == 1


def test_python_and_numpy_are_seeded_only_behind_draws() -> None:
    seen = []

    def draws_in_loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((random.random(), float(np.random.rand())))
        before = random.getstate(), np.random.get_state()[2]
        loss = model(batch[0].float()).square().mean()
        assert (random.getstate(), np.random.get_state()[2]) == before
        return loss  # type: ignore[no-any-return]

    recipe = mh.Recipe(
        model=lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
        loss=draws_in_loss,
        optimizer=torch.optim.SGD,
        data=torch.utils.data.TensorDataset(torch.ones(8, 4)),
        batch=mh.Batch(global_size=4, micro_size=2),
    )
    train_with_engine(recipe, mh.Strategy(), steps=1)
    assert len(set(seen)) == 2


def test_generators_are_not_seeded_outside_of_steps() -> None:
    with mh.Engine(recipe_of(Everywhere), mh.Strategy()) as engine, engine.evaluating() as model:
        model.train()
        model(torch.zeros(1, 8, dtype=torch.long))
        first = torch.default_generator.initial_seed()
        torch.manual_seed(5)
        model(torch.zeros(1, 8, dtype=torch.long))
        assert torch.default_generator.initial_seed() == 5 != first


@pytest.mark.parametrize("reads_memory", [True, False])
@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: [random.getrandbits(32) for _ in range(624)],
        lambda: random.seed(3),
    ],
)
def test_draws_from_python_are_detected(draw: Callable[[], object], reads_memory: bool) -> None:
    detector = DrawDetector()
    assert detector._python is not None
    if not reads_memory:
        detector._python = None
    with preserved_generators():
        before = detector.marks()
        assert detector.marks() == before
        draw()
        assert detector.marks()[0] != before[0]
        assert detector.marks()[1] == before[1]


@pytest.mark.parametrize(
    "draw", [np.random.rand, lambda: np.random.bytes(624 * 4), lambda: np.random.seed(3), lambda: np.random.randn(2)]
)
def test_draws_from_numpy_are_detected(draw: Callable[[], object]) -> None:
    detector = DrawDetector()
    with preserved_generators():
        np.random.seed(7)  # an earlier test may have left the seed that one of the draws sets
        state = generators_state()
        before = detector.marks()
        draw()
        assert detector.marks()[1] != before[1]
        assert detector.marks()[0] == before[0]
        restore_generators(state)
        assert detector.marks() == before


def two(*modules: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(modules or (nn.Linear(2, 2), nn.Linear(2, 2)))


class Holder(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), []),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0", "1"]),
        (Holder(stem=nn.Linear(2, 2), act=nn.ReLU(), blocks=two()), ["stem", "blocks.0", "blocks.1"]),
        (Holder(layers=two(nn.Sequential(nn.Linear(2, 2)))), ["layers.0"]),
        (Holder(lists=two(two(), two())), ["lists.0.0", "lists.0.1", "lists.1.0", "lists.1.1"]),
        (Holder(parts=nn.ModuleDict({"h": two(), "norm": nn.LayerNorm(2)})), ["parts.h.0", "parts.h.1", "parts.norm"]),
        (Holder(body=Holder(stem=nn.Linear(2, 2), blocks=two()), head=nn.Linear(2, 2)),
         ["body.stem", "body.blocks.0", "body.blocks.1", "head"]),
        (Holder(blocks=two(Holder(inner=two())), other=Holder(a=nn.Linear(2, 2))), ["blocks.0", "other"]),
    ],
)  # fmt: skip
def test_units_are_outermost_blocks_and_other_modules_with_parameters(model: nn.Module, expected: list[str]) -> None:
    assert called_units(model) == expected


def test_a_module_with_two_names_is_one_unit() -> None:
    shared = nn.Linear(2, 2)
    assert called_units(Holder(first=shared, blocks=two(shared, nn.Linear(2, 2)))) == ["first", "blocks.1"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripted_modules_have_hooks_too() -> None:
    class Scripted(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1] = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3)))

    recipe = recipe_of(Scripted)
    expected = oracle_run(recipe, STEPS).digests[-1]
    sharded = mh.Strategy(sharding="zero3", transport="distributed", units=("blocks.1",))
    for strategy in (mh.Strategy(activation_checkpointing=("blocks.*",)), sharded):
        assert train_with_engine(recipe, strategy, steps=STEPS).digest == expected


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_removed_hooks_of_scripted_modules_leave_nothing_behind() -> None:
    module = torch.jit.script(nn.Linear(2, 2))
    calls: list[object] = []
    before = module.__dict__.get("forward")
    handles = [
        handle
        for name in ("outer", "inner")
        for handle in around_forward(module, partial(calls.append, name), lambda result: calls.append(type(result)))
    ]
    module(torch.ones(1, 2))
    assert calls == ["inner", "outer", Tensor, Tensor]
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 3))
    assert calls[4:] == ["inner", "outer", type(None), type(None)]
    for handle in reversed(handles):
        handle.remove()
    module(torch.ones(1, 2))
    assert len(calls) == 8
    assert module.__dict__.get("forward") is before


def test_the_seed_behind_a_call_never_changes() -> None:
    """A change would change the bits of every model with dropout."""
    seeds = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result = next_token_loss(model, batch)
        seeds.append(torch.default_generator.initial_seed())
        return result

    train_with_engine(gpt_recipe(loss=loss), mh.Strategy(), steps=1)
    assert seeds[0] == 6_131_440_145_364_523_271


def test_modules_of_torch_draw_nothing_in_evaluation_mode_except_for_some() -> None:
    """Nothing is seeded after the calls of these modules in evaluations."""

    class Noise(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value + torch.rand(())

    model = nn.Sequential(
        nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.ReLU(), Noise()), nn.FractionalMaxPool2d(2, 3)
    )
    assert silent_in_evaluation(model) == {"0", "1", "2.0"}
    quiet = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(), nn.RReLU(), nn.MultiheadAttention(4, 2)
    )
    model = quiet.eval()
    state = torch.get_rng_state()
    model[:4](torch.zeros(1, 3, 8, 8))
    model[4](*[torch.zeros(2, 1, 4)] * 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(silent_in_evaluation(model)) == len(dict(model.named_modules()))
