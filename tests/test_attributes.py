"""State that forward keeps in attributes of modules, or in seeds, is refused by name; caches of constants are not."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from support.threads import run_threads
from support.training import Outcome, train_with_engine
from test_bad_input import on_all
from test_trust_nothing import GATHERED, WIDTH, Net, recipe


class Stateful(Net):
    """Has an attribute `state`, and calls a function in each forward that may use and change it."""

    use: Callable[[Stateful, Tensor], Any]

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.state = self.inner.state = self.initial()

    def initial(self) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        factor = type(self).use(self, x.detach())
        return super().forward(x) * (factor if isinstance(factor, (int, float, Tensor)) else 1)


def model_of(initial: Callable[[], Any], use: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    return type("Own", (Stateful,), {"initial": lambda self: initial(), "use": staticmethod(use)})


def outcomes(made: mh.Recipe, workers: int, strategy: mh.Strategy | None = None) -> list[Outcome]:
    return run_threads(
        workers, lambda group: train_with_engine(made, strategy or mh.Strategy(), steps=3, group=group), timeout=240
    )


def count(net: Any, x: Tensor) -> None:
    net.state += 1


def rebind(net: Any, x: Tensor) -> Tensor:
    net.state = 0.9 * net.state + 0.1 * x.mean(0)
    return 1 + net.state


def in_place(net: Any, x: Tensor) -> Tensor:
    net.state.mul_(0.9).add_(x.mean(0))
    return 1 + net.state


def array_in_place(net: Any, x: Tensor) -> float:
    net.state += x.mean().item()
    return 1 + float(net.state.sum())


def append(net: Any, x: Tensor) -> int:
    net.state.append(x.sum().item())
    return len(net.state)


def by_sample(net: Any, x: Tensor) -> None:
    net.state[round(x.sum().item(), 3)] = 1


def nested(net: Any, x: Tensor) -> None:
    net.state.of[1]["calls"] += 1


def hidden_module(net: Any, x: Tensor) -> None:
    net.state[0](x)


def hidden_teacher(net: Any, x: Tensor) -> None:
    with torch.no_grad():
        net.state[0].weight.lerp_(net.first.weight, 0.1)


def first_batch(net: Any, x: Tensor) -> float:
    if net.state is None:
        net.state = x.std().item()
    return net.state


def switch(net: Any, x: Tensor) -> int:
    net.state = "odd" if net.state == "even" else "even"
    return len(net.state)


def draw_torch(net: Any, x: Tensor) -> Tensor:
    return torch.rand(WIDTH, generator=net.state)


def draw_numpy(net: Any, x: Tensor) -> float:
    return float(net.state.random())


def draw_python(net: Any, x: Tensor) -> float:
    return net.state.random()


def in_submodule(net: Any, x: Tensor) -> int:
    net.inner.state += 1
    return net.inner.state


class Slotted:
    """An object without a __dict__."""

    __slots__ = ("calls", "unset")

    def __init__(self) -> None:
        self.calls = 0


def in_slot(net: Any, x: Tensor) -> int:
    net.state.calls += 1
    return net.state.calls


def advance(net: Any, x: Tensor) -> int:
    return next(net.state) % 7


def add_decimal(net: Any, x: Tensor) -> float:
    net.state += Decimal("0.1")
    return float(net.state)


def sparse(net: Any, x: Tensor) -> Tensor:
    factor = 1 + net.state.to_dense().sum()
    net.state = x.mean(0).to_sparse()
    return factor


def by_distribution(net: Any, x: Tensor) -> float:
    factor = 1 + net.state.loc.mean().item()
    net.state = torch.distributions.Normal(x.mean(0), 1.0)
    return factor


def other_function(net: Any, x: Tensor) -> Tensor:
    factor = net.state(x.mean())
    net.state = torch.sin if x.sum().view(torch.int32) % 2 else torch.cos
    return factor


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any], str]] = {
    "a counter": (int, count, "'state' of the model to a different value"),
    "a counter in a submodule": (int, in_submodule, "'inner.state' of the model to a different value"),
    "a moving average": (lambda: torch.zeros(WIDTH), rebind, "'state' of the model to a different value"),
    "a tensor in place": (lambda: torch.zeros(WIDTH), in_place, "'state' of the model in place"),
    "an array in place": (lambda: np.zeros(3), array_in_place, "'state' of the model in place"),
    "a list": (list, append, "'state' of the model to a different value"),
    "a queue": (lambda: deque(maxlen=2), append, "'state' of the model to a different value"),
    "a dict of samples": (dict, by_sample, "'state' of the model to a different value"),
    "an object": (lambda: SimpleNamespace(of=[0, {"calls": 1}]), nested, "'state' of the model to a different value"),
    "text": (lambda: "even", switch, "'state' of the model to a different value"),
    "a value of the first batch": (lambda: None, first_batch, "'state' of the model to a different value"),
    "a module in a list": (lambda: [nn.BatchNorm1d(WIDTH)], hidden_module, "'state' of the model in place"),
    "a teacher in a list": (
        lambda: [nn.Linear(WIDTH, WIDTH).requires_grad_(False)],
        hidden_teacher,
        "'state' of the model in place",
    ),
    "slots of an object": (Slotted, in_slot, "'state' of the model to a different value"),
    "a counter of itertools": (lambda: itertools.count(1), advance, "'state' of the model in place"),
    "a cycle of itertools": (lambda: itertools.cycle([1, 2, 3]), advance, "'state' of the model in place"),
    "a list's iterator": (lambda: iter(list(range(100))), advance, "'state' of the model in place"),
    "a generator function": (lambda: (number for number in range(100)), advance, "'state' of the model in place"),
    "a decimal number": (lambda: Decimal(0), add_decimal, "'state' of the model to a different value"),
    "a sparse tensor": (lambda: torch.zeros(WIDTH).to_sparse(), sparse, "'state' of the model to a different value"),
    "a distribution": (
        lambda: torch.distributions.Normal(torch.zeros(1), 1.0),
        by_distribution,
        "'state' of the model to a different value",
    ),
    "a function": (lambda: torch.tanh, other_function, "'state' of the model to a different value"),
    "a generator of torch": (lambda: torch.Generator().manual_seed(1), draw_torch, "draw from the global generators"),
    "a generator of numpy": (lambda: np.random.default_rng(1), draw_numpy, "draw from the global generators"),
    "a generator of Python": (lambda: random.Random(1), draw_python, "draw from the global generators"),
}


@pytest.mark.parametrize("case", STATES)
def test_state_in_an_attribute_is_refused_by_name(case: str) -> None:
    initial, use, message = STATES[case]
    made = recipe(model_of(initial, use))
    with pytest.raises(mh.ConfigError, match="forward changed the attribute") as caught:
        outcomes(made, 1)
    assert message in str(caught.value)
    for error in on_all(lambda rank, group: train_with_engine(made, mh.Strategy(), steps=3, group=group), workers=4):
        assert isinstance(error, (mh.ConfigError, mh.WorkerError)), error
        assert "forward changed the attribute" in str(error)


def test_a_value_of_the_first_batch_is_refused_in_the_first_step_of_several_workers() -> None:
    made = recipe(model_of(lambda: None, first_batch))
    for error in on_all(lambda rank, group: train_with_engine(made, mh.Strategy(), steps=1, group=group), workers=4):
        assert isinstance(error, mh.ConfigError), error
        assert "to different values on two workers" in str(error)
        assert "state; workers 0 and 1" in str(error.where)


NOT_RESTORED = ("a generator function", "a cycle of itertools")

RESTORED: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    case: (initial, use)
    for case, (initial, use, _) in STATES.items()
    if case not in ("a teacher in a list", "a counter in a submodule", *NOT_RESTORED)
}


@pytest.mark.parametrize("case", RESTORED)
def test_a_restored_attribute_starts_each_micro_batch_with_its_value_at_the_start_of_the_step(case: str) -> None:
    made = recipe(model_of(*RESTORED[case]), attributes={"*state": "restore"})
    (expected,) = outcomes(made, 1)
    for workers, strategy in ((2, GATHERED), (3, mh.Strategy(sharding="ddp"))):
        assert {found.digest for found in outcomes(made, workers, strategy)} == {expected.digest}


@pytest.mark.parametrize("case", NOT_RESTORED)
def test_an_attribute_that_can_not_be_restored_is_refused(case: str) -> None:
    made = recipe(model_of(*STATES[case][:2]), attributes={"*state": "restore"})
    with pytest.raises(mh.ConfigError, match="'state' of the model in a way that can't be undone"):
        outcomes(made, 1)


class LateValue(Net):
    """Keeps a value of one micro-batch from a later step on, which a buffer counts."""

    first_step = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.steps >= self.first_step and self.scale is None:
            self.scale = x.std().item()
        self.steps += 1
        return super().forward(x) * (self.scale or 1.0)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_value_of_a_micro_batch_of_a_later_step_is_refused(workers: int) -> None:
    made = recipe(type("Late", (LateValue,), {"first_step": 3}))
    for error in on_all(
        lambda rank, group: train_with_engine(made, mh.Strategy(), steps=4, group=group), workers=workers
    ):
        assert isinstance(error, (mh.ConfigError, mh.WorkerError)), error
        assert "forward changed the attribute 'scale'" in str(error)


class WithLossInside(Net):
    """Leaves an auxiliary loss for the loss function in an attribute, as models with experts do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.auxiliary = x.square().mean()
        return self.last(x)


def test_an_auxiliary_loss_in_an_attribute_is_restored_and_a_script_may_change_attributes_between_steps() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() * model.state + model.auxiliary

    def train(group: Any) -> str:
        with mh.Engine(made, mh.Strategy(), group) as engine:
            for batch in engine.batches(3):
                engine.model.state = 1.0 / (1 + engine.step_index)
                engine.step(batch)
                with engine.evaluating() as model:
                    model(torch.ones(1, WIDTH))
            return engine.digest()

    made = recipe(WithLossInside, loss=loss)
    with pytest.raises(mh.ConfigError, match=r"'auxiliary' of the model to a different value(?s:.*)'restore'"):
        run_threads(1, train)
    made = recipe(WithLossInside, loss=loss, attributes={"aux*": "restore", "state": "restore"})
    assert len({*run_threads(1, train), *run_threads(3, train)}) == 1


def test_an_attribute_may_be_kept() -> None:
    made = recipe(model_of(list, lambda net, x: net.state.append(x)), attributes={"*state": "keep"})
    assert {found.digest for workers in (1, 3) for found in outcomes(made, workers)} == {
        outcomes(recipe(Net), 1)[0].digest
    }
    with pytest.raises(mh.ConfigError, match=r"recipe.attributes has an unknown rule for 'state'"):
        recipe(Net, attributes={"state": "mean"})


class Memoized(Net):
    """Has a cache as gpytorch's modules have it: each forward empties it, and reads what it has filled in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner._memoize_cache = {}

    def forward(self, x: Tensor) -> Tensor:
        cache: Any = self.inner._memoize_cache
        cache.clear()
        cache["scale", ()] = self.first.weight.detach().std() + x.std()
        return super().forward(x) * cache["scale", ()]


@pytest.mark.parametrize("rule", ["keep", "restore"])
def test_the_rule_that_a_refusal_names_lets_a_model_with_a_cache_train(rule: str) -> None:
    with pytest.raises(mh.ConfigError) as caught:
        outcomes(recipe(Memoized), 1)
    hint = str(caught.value.hint)
    assert f"attributes={{'inner._memoize_cache': '{rule}'}}" in hint
    assert 'attributes = { "inner._memoize_cache" = "keep" }' in hint
    made = recipe(Memoized, attributes={"inner._memoize_cache": rule})
    assert len({found.digest for workers in (1, 2, 3) for found in outcomes(made, workers)}) == 1


class Rotary(Net):
    """Caches of constants, built in the first forward: a table, a dict by length, flags, an import."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.by_length: dict[Any, Tensor] = {}
        self.is_built = False
        self.length = 0
        self.times = SimpleNamespace()
        self.owners: dict[object, str] = {}
        self.key = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_built or self.length < x.shape[1]:
            self.table, self.length, self.is_built = torch.arange(x.shape[1]).float().cos(), x.shape[1], True
            self.times.scale = 0.5
            self.owners[self.times.__class__] = self.owners[self.key] = "keys with an address in their text"
        key = (x.shape[1], x.dtype)
        if key not in self.by_length:
            self.by_length[key] = torch.ones(key[0]) / 3
        return super().forward(x * self.table * self.by_length[key] * self.times.scale)


class Reparametrized(nn.Module):
    """Weights that torch's hooks and parametrizations recompute before each forward."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.old = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.first_call = True
        self.old.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        if self.first_call:
            self.new.register_full_backward_hook(lambda *_: None)
            self.first_call = False
        return F.relu(self.new(self.old(x)))


class Modes(Net):
    """Puts a part of itself into evaluation mode at the end of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(self.drop(x))
        self.drop.eval()
        return x


@pytest.mark.parametrize("model", [Rotary, Reparametrized, Modes])
def test_caches_of_constants_and_modes_are_allowed(model: Callable[[], nn.Module]) -> None:
    made = recipe(model)
    (expected,) = outcomes(made, 1)
    for workers in (2, 3):
        assert {found.digest for found in outcomes(made, workers)} == {expected.digest}


def seeds(call: Callable[[], Any]) -> Callable[[], nn.Module]:
    return model_of(lambda: None, lambda net, x: call() and None)


def forked() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.rand(3)


def with_state() -> None:
    state = random.getstate()
    random.seed(3)
    random.setstate(state)


SEEDS: dict[str, Callable[[], Any]] = {
    "torch.seed()": lambda: torch.seed(),
    "torch.manual_seed(5)": lambda: torch.manual_seed(5),
    "random.seed()": lambda: random.seed(),
    "random.seed(1)": lambda: random.seed(1),
    "numpy.random.seed(2)": lambda: np.random.seed(2),
}


@pytest.mark.parametrize("call", SEEDS)
def test_a_model_that_seeds_the_generators_is_refused(call: str) -> None:
    before = [torch.seed, torch.manual_seed, random.seed, np.random.seed]
    for error in on_all(
        lambda rank, group: train_with_engine(recipe(seeds(SEEDS[call])), mh.Strategy(), steps=1, group=group)
    ):
        assert "the model or the loss function seeds a global random generator" in str(error)
        assert isinstance(error, mh.WorkerError) or error.got == call
    assert before == [torch.seed, torch.manual_seed, random.seed, np.random.seed]


@pytest.mark.parametrize("call", [forked, with_state])
def test_a_model_may_seed_generators_and_restore_them(call: Callable[[], None]) -> None:
    assert outcomes(recipe(seeds(call)), 1)[0].digest == outcomes(recipe(Net), 1)[0].digest


def write(net: Any, x: Tensor) -> None:
    net.first.weight.data.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("strategy", [mh.Strategy(sharding="ddp"), mh.Strategy(sharding="zero3"), GATHERED], ids=str)
def test_writes_through_data_are_refused(strategy: mh.Strategy) -> None:
    message = "parameter 'first.weight' was changed in place by code other than the optimizer"
    made = recipe(model_of(lambda: None, write))
    for workers in (1, 2):
        for error in on_all(lambda rank, group: train_with_engine(made, strategy, steps=1, group=group), workers):
            assert message in str(error)

    def between(group: Any) -> None:
        with mh.Engine(recipe(Net), strategy, group) as engine:
            batches = engine.batches(2)
            engine.step(next(batches))
            write(engine.model, torch.empty(0))
            engine.step(next(batches))

    for error in on_all(lambda rank, group: between(group)):
        assert message in str(error) or "refers to a single memory location" in str(error)


def test_a_checkpoint_may_be_loaded_between_the_first_two_steps(tmp_path: Path) -> None:
    with mh.Engine(recipe(Net)) as engine:
        engine.save(tmp_path)
        start, batches = engine.digest(), engine.batches(2)
        engine.step(next(batches))
        engine.load(tmp_path / "step-00000000")
        assert engine.digest() == start
        engine.step(next(engine.batches(1)))


class ChangesModes(Net):
    """Changes modes of the process that change bits of the next micro-batch."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (torch.arange(300_000) * 0.37).sin().sum() * torch.ones(1).add(torch.tensor(1.0) / 3)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        return super().forward(x) * scale.float() * (torch.rand(1).float() + 1)


def test_modes_of_the_process_that_forward_changes_are_set_back() -> None:
    made = recipe(ChangesModes)
    assert len({found.digest for workers in (1, 3) for found in outcomes(made, workers)}) == 1
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (made.threads_per_worker, torch.float32)


def test_autocast_around_steps_uses_the_weights_of_each_step() -> None:
    def digest(whole: bool) -> str:
        def work(group: Any) -> str:
            with mh.Engine(made, mh.Strategy(), group) as engine, torch.autocast("cpu", torch.bfloat16, enabled=whole):
                for batch in engine.batches(3):
                    with torch.autocast("cpu", torch.bfloat16):
                        engine.step(batch)
                return engine.digest()

        return run_threads(1, work)[0]

    made = recipe(Net)
    assert digest(whole=True) == digest(whole=False)


@pytest.mark.parametrize("overlap", [True, False])
def test_hooks_that_change_gradients_run_before_the_engine_takes_them(overlap: bool) -> None:
    def halve(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.5)

    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self.first.weight, "is_hooked"):
                self.first.weight.is_hooked = True
                self.first.weight.register_post_accumulate_grad_hook(halve)
            return super().forward(x)

    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.weight.register_post_accumulate_grad_hook(halve)

    late, early = (outcomes(recipe(each), 1, mh.Strategy(overlap=overlap))[0].digest for each in (Late, Early))
    assert late == early


class Freezes(Net):
    """Freezes a parameter in forward."""

    always = True

    def forward(self, x: Tensor) -> Tensor:
        if self.always or x.sum() > 0:
            self.first.weight.requires_grad_(False)
        return super().forward(x)


def test_forward_may_freeze_a_parameter_in_all_micro_batches_of_a_step_only() -> None:
    made = recipe(Freezes)
    assert len({found.digest for workers in (1, 2, 3) for found in outcomes(made, workers)}) == 1
    made = recipe(type("Sometimes", (Freezes,), {"always": False}))
    with pytest.raises(mh.ConfigError, match=r"forward changed requires_grad of parameter 'first\.weight' in some"):
        outcomes(made, 1)
    for error in on_all(lambda rank, group: train_with_engine(made, mh.Strategy(), steps=3, group=group), workers=4):
        assert isinstance(error, (mh.ConfigError, mh.WorkerError)), error
        assert "first.weight" in str(error)


class Centered:
    """A loss with a moving average, as DINO's."""

    def __init__(self) -> None:
        self.center = torch.zeros(WIDTH)

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        found = model(batch)
        loss = (found - self.center).square().mean()
        self.center = 0.5 * self.center + 0.5 * found.detach().mean(0)
        return loss


class CenteredModule(nn.Module):
    """The same with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        found = model(batch)
        loss = (found - self.center).square().mean()
        self.center.mul_(0.5).add_(found.detach().mean(0))
        return loss


@pytest.mark.parametrize(("kind", "name"), [(Centered, "center"), (CenteredModule, "_buffers")])
def test_state_in_attributes_of_a_loss_is_refused_or_restored(kind: Callable[[], Any], name: str) -> None:
    with pytest.raises(mh.ConfigError, match=f"the loss function changed its attribute 'recipe.loss.{name}'"):
        outcomes(recipe(Net, loss=kind()), 1)

    def digest(group: Any) -> str:
        made = recipe(Net, loss=kind(), attributes={f"recipe.loss.{name}": "restore"})
        return train_with_engine(made, mh.Strategy(), steps=3, group=group).digest

    assert len({found for workers in (1, 2, 3) for found in run_threads(workers, digest)}) == 1
