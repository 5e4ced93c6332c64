"""Models that could silently train wrongly have the same bits everywhere, or are refused by name.

Cases are run with one worker and with several, and with gradients exchanged during backward and after it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from manyhands.comm.group import Group
from oracle import oracle_run
from support.threads import run_threads

SHARDINGS = ("ddp", "zero2", "zero3")
GATHERED = mh.Strategy(sharding="zero3", offload="disk")
"""Offload to disk, so that parameters are unsharded on demand. In shared memory zero3 would leave them in place."""
WIDTH = 8
SAMPLES = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(index)) for index in range(24)]


def recipe(model: Callable[[], nn.Module], **changes: Any) -> mh.Recipe:
    """4 micro-batches of 2 samples [WIDTH] a step."""
    fields: dict[str, Any] = {
        "loss": lambda model, batch: model(batch.to(next(model.parameters()).dtype)).float().square().mean(),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
        "data": SAMPLES,
        "batch": mh.Batch(global_size=8, micro_size=2),
    }
    return mh.Recipe(model=model, **fields | changes)


class Net(nn.Module):
    """Two linear layers. Subclasses modify the model in `__init__` or `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


# What works


class Subclass(nn.Parameter):
    """A custom parameter class."""


class Subclasses(Net):
    """Parameters of another class, and with an attribute that other code looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = Subclass(self.last.weight.detach().clone())
        self.last.weight.no_decay = True

    def forward(self, x: Tensor) -> Tensor:
        assert type(self.last.weight) is Subclass
        assert self.last.weight.no_decay
        return super().forward(x)


class Noncontiguous(Net):
    """Transposed, every second element, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.last.bias = nn.Parameter(torch.randn(2 * WIDTH)[::2])
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.empty.sum()


class Contiguous(Noncontiguous):
    """The same with parameters that are contiguous, as the engine lays them out: a product's bits depend on it."""

    def __init__(self) -> None:
        super().__init__()
        for param in self.parameters():
            param.data = param.data.contiguous()


class Gradients(torch.autograd.Function):
    """The identity; its gradient is expanded (strides 0) or transposed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sum(0, keepdim=True).expand_as(grad) if grad[0, 0] > 0 else grad.t()


class StrangeGradients(Net):
    """Gradients that aren't contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(x, Gradients.apply(self.first.weight), self.first.bias)))


class OtherGradientDtype(Net):
    """bf16 parameters that request fp32 gradients."""

    def __init__(self) -> None:
        super().__init__()
        for param in self.parameters():
            param.grad_dtype = None  # whatever comes

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Frozen(Net):
    """Frozen parameters of many dtypes, which keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool)
        self.kept = nn.ParameterList(nn.Parameter(torch.ones(3).to(kind), requires_grad=False) for kind in kinds)
        self.kinds = kinds

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(param.dtype for param in self.kept) == self.kinds
        return super().forward(x) + sum(param.detach().sum().abs().to(x.dtype) for param in self.kept)


class Counts(Net):
    """Integer, boolean, half and complex buffers that a forward changes, by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(WIDTH, dtype=torch.bool))
        self.register_buffer("smooth", torch.zeros(WIDTH, dtype=torch.float16))
        self.register_buffer("wave", torch.zeros(2, dtype=torch.complex64), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen | (x.detach()[0] > 0)
        self.smooth.mul_(0.5).add_(x.detach().mean(0).half())
        self.wave[0] += torch.complex(x.detach().float().mean(), x.detach().float().amax())
        return super().forward(x)


class FrozenStatistics(Net):
    """Running statistics in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return super().forward(x - self.mean)


class EvalPart(Net):
    """A part that stays in eval mode by overriding `train`, in a model that was put into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.eval()

    def train(self, mode: bool = True) -> EvalPart:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        assert self.drop.training
        assert not self.norm.training
        return super().forward(self.drop(self.norm(x)))


class DisjointViews(Net):
    """Two parameters in one storage, side by side."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2 * WIDTH)
        self.first.bias, self.last.bias = nn.Parameter(flat[:WIDTH]), nn.Parameter(flat[WIDTH:])


class ByHand(Net):
    """A gradient that the loss sets itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hand = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.hand.grad = x.detach().mean(0).to(self.hand.dtype)
        return super().forward(x)


class Reparametrized(Net):
    """torch's weight norm and spectral norm: the weight is computed; spectral norm's vectors are buffers."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.first)
        nn.utils.parametrizations.spectral_norm(self.last)


class Recurrent(Net):
    """An LSTM, which holds its parameters in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lstm(x[:, None])[0][:, 0])


WORKS: dict[str, tuple[type[nn.Module], str]] = {
    "parameters of a subclass": (Subclasses, "fp32"),
    "parameters of a subclass in bf16": (Subclasses, "bf16"),
    "parameters that aren't contiguous": (Noncontiguous, "fp32"),
    "gradients that aren't contiguous": (StrangeGradients, "fp32"),
    "gradients of another dtype": (OtherGradientDtype, "bf16"),
    "frozen parameters of many dtypes": (Frozen, "fp32"),
    "frozen parameters of many dtypes in bf16": (Frozen, "bf16"),
    "buffers of many dtypes": (Counts, "fp32"),
    "statistics in a frozen parameter": (FrozenStatistics, "fp32"),
    "a part in eval mode": (EvalPart, "fp32"),
    "parameters side by side in one storage": (DisjointViews, "fp32"),
    "a gradient set by hand": (ByHand, "fp32"),
    "torch's parametrizations": (Reparametrized, "fp32"),
    "an LSTM": (Recurrent, "fp32"),
}
BUFFERS: dict[type[nn.Module], dict[str, str]] = {
    Counts: {"seen": "last", "*": "mean"},
    FrozenStatistics: {"*": "mean"},
}
AS_PLAIN: dict[str, type[nn.Module]] = {
    "parameters that aren't contiguous": Contiguous,
    "gradients that aren't contiguous": StrangeGradients,
    "a part in eval mode": EvalPart,
    "an LSTM": Recurrent,
}


STRATEGIES = {
    **{sharding: mh.Strategy(sharding=sharding) for sharding in SHARDINGS},
    "gathered": GATHERED,
    "no overlap": mh.Strategy(overlap=False),
}
QUICK_WAYS = [("gathered", 1), ("zero3", 1), ("ddp", 2), ("gathered", 2), ("no overlap", 2), ("zero2", 3), ("zero3", 3)]
REST = [way for way in product(STRATEGIES, (1, 2, 3)) if way not in QUICK_WAYS]


@pytest.mark.parametrize(
    "ways", [pytest.param(QUICK_WAYS, id="quick"), pytest.param(REST, id="rest", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", WORKS)
def test_the_case_has_the_same_bits(case: str, ways: list[tuple[str, int]]) -> None:
    model, precision = WORKS[case]
    made = recipe(model, precision=precision, buffers=BUFFERS.get(model, {}))

    def one(group: Group, strategy: mh.Strategy) -> tuple[str, dict[str, Tensor]]:
        with mh.Engine(made, strategy, group) as engine:
            for batch in engine.batches(3):
                engine.step(batch)
            return engine.digest(), engine.full_state_dict() | dict(engine.model.named_buffers())

    ((digest, state),) = run_threads(1, lambda group: one(group, mh.Strategy()))
    if case in AS_PLAIN:
        assert digest == oracle_run(recipe(AS_PLAIN[case]), 3).digests[-1]
    for way, workers in ways:
        for found, its_state in run_threads(workers, lambda group, way=way: one(group, STRATEGIES[way])):
            assert found == digest
            for name, value in state.items():
                assert its_state[name].dtype == value.dtype
                assert torch.equal(its_state[name], value), name


@pytest.mark.parametrize("model", [Frozen, Counts, FrozenStatistics, Noncontiguous])
def test_the_model_survives_a_checkpoint(model: type[nn.Module], tmp_path: Path) -> None:
    def one(group: Group, load: Path | None) -> tuple[str, dict[str, Tensor]]:
        with mh.Engine(recipe(model, buffers=BUFFERS.get(model, {})), mh.Strategy(), group) as engine:
            if load is not None:
                engine.load(load)
            for batch in engine.batches(3):
                engine.step(batch)
                if load is None and engine.step_index == 2:
                    engine.save(tmp_path)
            return engine.digest(), engine.full_state_dict() | dict(engine.model.named_buffers())

    ((digest, state),) = run_threads(1, lambda group: one(group, None))
    for found, its_state in run_threads(2, lambda group: one(group, tmp_path / "step-00000002")):
        assert found == digest
        assert all(torch.equal(its_state[name], value) for name, value in state.items())


# What is refused when the model is built


def changed(change: Callable[[Net], None]) -> Callable[[], nn.Module]:
    """A model that was modified while it was built."""

    def model() -> nn.Module:
        net = Net()
        change(net)
        return net

    return model


def share_data(net: Net) -> None:
    net.last.weight = nn.Parameter(net.first.weight.data)


def share_part(net: Net) -> None:
    net.last.bias = nn.Parameter(net.first.weight.data[2])


def buffer_of_param(net: Net) -> None:
    net.register_buffer("copy", net.first.weight.detach()[1:])


def attribute_of_param(net: Net) -> None:
    net.flat = net.first.weight.view(-1)


def list_of_views(net: Net) -> None:
    net.rows = [row.detach() for row in net.first.weight]


def expanded(net: Net) -> None:
    net.first.bias = nn.Parameter(torch.zeros(1).expand(WIDTH))


def windows(net: Net) -> None:
    net.last.weight = nn.Parameter(torch.zeros(2 * WIDTH).as_strided((WIDTH, WIDTH), (1, 1)))


def lazy(net: Net) -> None:
    net.last = nn.LazyLinear(WIDTH)


def sparse(net: Net) -> None:
    net.table = nn.Parameter(torch.eye(WIDTH).to_sparse())


def meta(net: Net) -> None:
    net.last = nn.Linear(WIDTH, WIDTH, device="meta")


def meta_buffer(net: Net) -> None:
    net.register_buffer("there", torch.zeros(3, device="meta"))


def sparse_buffer(net: Net) -> None:
    net.register_buffer("table", torch.eye(3).to_sparse())


def in_dtype(dtype: torch.dtype) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        net.last.weight = nn.Parameter(net.last.weight.detach().to(dtype))

    return change


def all_frozen(net: Net) -> None:
    net.requires_grad_(False)


NOT_BUILT: dict[str, tuple[Callable[[Net], None], str]] = {
    "two parameters of one tensor": (share_data, "parameter 'first.weight' and 'last.weight' share memory"),
    "a parameter inside another": (share_part, "parameter 'first.weight' and 'last.bias' share memory"),
    "a buffer inside a parameter": (buffer_of_param, "parameter 'first.weight' and 'copy' share memory"),
    "an attribute that is a view": (attribute_of_param, "parameter 'first.weight' and 'flat' share memory"),
    "a list of views": (list_of_views, r"parameter 'first.weight' and 'rows\[\d\]' share memory"),
    "an expanded parameter": (expanded, "elements of parameter 'first.bias' share memory"),
    "a parameter of windows": (windows, "elements of parameter 'last.weight' share memory"),
    "a lazy module": (lazy, "parameter 'last.weight' has no shape yet"),
    "a sparse parameter": (sparse, "parameter 'table' is not a plain tensor"),
    "a parameter on meta": (meta, "parameter 'last.weight' was not built in fp32 on the CPU"),
    "a buffer on meta": (meta_buffer, "buffer 'there' is not supported"),
    "a sparse buffer": (sparse_buffer, "buffer 'table' is not supported"),
    "fp64": (in_dtype(torch.float64), "parameter 'last.weight' was not built in fp32"),
    "fp16": (in_dtype(torch.float16), "parameter 'last.weight' was not built in fp32"),
    "bf16": (in_dtype(torch.bfloat16), "parameter 'last.weight' was not built in fp32"),
    "complex": (in_dtype(torch.complex64), "parameter 'last.weight' was not built in fp32"),
    "nothing to train": (all_frozen, "the model has no trainable parameter"),
}


@pytest.mark.parametrize("case", NOT_BUILT)
def test_the_model_is_refused_when_it_is_built(case: str) -> None:
    change, message = NOT_BUILT[case]
    made = recipe(changed(change))
    with pytest.raises(mh.ConfigError, match=message):
        mh.Engine(made)
