"""bf16 products on CPUs without bf16 instructions: computed in fp32 and rounded once, anywhere in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import manyhands as mh
from manyhands.models import bf16_products as products
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.numerics import arithmetic as identity

LENGTH, WIDTH = 6, 16


@pytest.fixture(autouse=True)
def cpu_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_instructions", lambda: "")


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 5, 7), (7, 5, 3), (4, 4, 4), (1, 9, 1), (64, 300, 65)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_product_is_the_rounded_one_in_fp32(rows: int, inner: int, columns: int, transposed: bool) -> None:
    left, right = bf16(rows, inner), bf16(columns, inner, seed=1).T if transposed else bf16(inner, columns, seed=1)
    with bf16_products_in_fp32():
        assert same(left @ right, (left.float() @ right.float()).bfloat16())
        for added in (bf16(columns), bf16(rows, columns), bf16(rows, 1), bf16(1)):
            for factors in ({}, {"beta": 0.5, "alpha": 2.0}):
                expected = torch.addmm(added.float(), left.float(), right.float(), **factors).bfloat16()
                assert same(torch.addmm(added, left, right, **factors), expected)


@pytest.mark.parametrize("shape", [(200, 40, 90), (90, 40, 200)])
def test_a_large_product_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    monkeypatch.setattr(products, "MAX_ELEMENTS", 70 * max(inner, min(rows, columns)))
    left, right, added = bf16(rows, inner), bf16(inner, columns, seed=1), bf16(rows, columns, seed=2)
    wide = (added.float(), left.float(), right.float())
    if columns > rows:
        parts = [torch.addmm(wide[0][:, i : i + 70], wide[1], wide[2][:, i : i + 70]) for i in range(0, columns, 70)]
    else:
        parts = [torch.addmm(wide[0][i : i + 70], wide[1][i : i + 70], wide[2]) for i in range(0, rows, 70)]
    with bf16_products_in_fp32():
        assert same(torch.addmm(added, left, right), torch.cat(parts, dim=int(columns > rows)).bfloat16())


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_factors_are_fine(rows: int, inner: int, columns: int) -> None:
    left, right = bf16(rows, inner), bf16(inner, columns)
    with bf16_products_in_fp32():
        assert same(left @ right, torch.zeros(rows, columns, dtype=torch.bfloat16))
        assert same(torch.addmm(bf16(columns), left, right), bf16(columns).expand(rows, columns).contiguous())


def test_what_is_added_is_ignored_where_its_factor_is_zero() -> None:
    nowhere = torch.full((4,), float("nan"), dtype=torch.bfloat16)
    with bf16_products_in_fp32():
        assert torch.addmm(nowhere, bf16(3, 5), bf16(5, 4), beta=0).isfinite().all()


def test_attention_and_convolutions_are_the_rounded_ones_in_fp32() -> None:
    def of(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        result = function(*leaves)
        result.backward(torch.ones_like(result))
        return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    images, kernels, bias = bf16(2, 3, 8, 8), bf16(4, 3, 3, 3, seed=1), bf16(4, seed=2)
    wide = of(F.conv2d, images.float(), kernels.float(), bias.float())
    with bf16_products_in_fp32():
        narrow = of(F.conv2d, images, kernels, bias)
    assert all(same(one, other.bfloat16()) for one, other in zip(narrow, wide, strict=True))

    heads = [bf16(2, 3, LENGTH, WIDTH, seed=seed) for seed in range(3)]
    attention = F.scaled_dot_product_attention
    with torch.no_grad():
        expected = attention(*(each.float() for each in heads)).bfloat16()
    with bf16_products_in_fp32():
        found = of(attention, *heads)
    assert same(found[0], expected)
    exact = of(attention, *(each.float() for each in heads))
    assert all(torch.allclose(one.float(), other, atol=0.02) for one, other in zip(found, exact, strict=True))


class Asked(TorchDispatchMode):
    """Records, outside of the tested mode, the bf16 products that still reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func.overloadpacket in {product.overloadpacket for product in products._products()}:
            self.seen += 1
            if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
                self.narrow.add(str(func))
        return func(*args, **(kwargs or {}))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(WIDTH, WIDTH, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blw,hwv->bhlv", x, self.weight)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 3),
    "without bias": lambda: nn.Linear(WIDTH, 3, bias=False),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True),
    "attention": Attends,
    "convolution": lambda: nn.Conv1d(LENGTH, 4, 3, padding=1),
    "transposed convolution": lambda: nn.ConvTranspose1d(LENGTH, 4, 3),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "einsum": Einsum,
}


@pytest.fixture
def asked() -> Iterator[Asked]:
    with Asked() as mode:
        yield mode


@pytest.mark.parametrize("name", MODELS)
def test_no_bf16_product_of_a_model_reaches_the_cpu(name: str, asked: Asked) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, LENGTH, WIDTH)
    exact = model(x).detach()
    model, x = model.bfloat16(), x.bfloat16()
    asked.seen = 0
    with bf16_products_in_fp32():
        result = model(x)
        result.sum().backward()
    assert asked.seen > 0
    assert not asked.narrow
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), exact, atol=0.05)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients(), bf16_products_in_fp32():
            assert torch.equal(model(x), result)
    assert not asked.narrow


def test_training_works_after_inference() -> None:
    vars(products._local).clear()
    left, right = bf16(3, 5), bf16(5, 4)
    with bf16_products_in_fp32():
        with torch.inference_mode():
            expected = left @ right
        with torch.inference_mode():
            assert same(left @ right, expected)
        found = left.requires_grad_() @ right
        found.sum().backward()
    assert same(found.detach(), expected.clone())


def test_muon_multiplies_matrices_of_bf16(asked: Asked) -> None:
    param = nn.Parameter(torch.ones(WIDTH, WIDTH))
    param.grad = torch.randn(WIDTH, WIDTH)
    optimizer = torch.optim.Muon([param])
    with bf16_products_in_fp32():
        optimizer.step()
    assert asked.seen > 0
    assert not asked.narrow


def test_other_types_keep_their_bits() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        left, right = torch.randn(9, 5).to(dtype), torch.randn(5, 7).to(dtype)
        expected = left @ right
        with bf16_products_in_fp32():
            assert same(left @ right, expected)


class Adapted(nn.Module):
    """A frozen layer in its own type, and a trained one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).to(dtype).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.base.weight.dtype)) + self.adapter(x.to(self.adapter.weight.dtype))


@pytest.mark.parametrize(
    ("precision", "base", "compiled", "expected"),
    [
        ("fp32", torch.float32, False, False),
        ("fp32", torch.bfloat16, False, True),
        ("bf16", torch.float32, False, True),
        pytest.param("bf16", torch.float32, True, False, marks=pytest.mark.slow),
    ],
)
def test_which_models_compute_products_in_fp32(
    precision: str, base: torch.dtype, compiled: bool, expected: bool
) -> None:
    found = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found.append(isinstance(_get_current_dispatch_mode(), products._ProductsInFp32))
        result: Tensor = model(batch).float().square().mean()
        return result

    recipe = mh.Recipe(
        model=lambda: nn.Sequential(nn.Sequential(Adapted(base), Adapted(base))),
        loss=loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=[torch.ones(WIDTH)] * 4,
        batch=mh.Batch(global_size=2, micro_size=2),
        precision=precision,
        compile=compiled,
    )
    with mh.Engine(recipe) as engine:
        engine.step(next(iter(engine.batches())))
        with engine.evaluating() as model, torch.no_grad():
            loss(model, torch.ones(2, WIDTH))
    assert found == [expected, expected or compiled]


def test_cpus_with_bf16_instructions_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_instructions", lambda: "avx512_bf16")
    with bf16_products_in_fp32():
        assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("machine", "has", "expected"),
    [
        ("x86_64", {"avx512_bf16": True, "amx_bf16": True, "avx2": True}, "avx512_bf16+amx_bf16"),
        ("x86_64", {"avx2": True, "avx512_bf16": False}, ""),
        ("AMD64", {"avx_ne_convert": True}, "avx_ne_convert"),
        ("aarch64", {"bf16": False}, "aarch64"),
    ],
)
def test_which_instructions_a_cpu_has(
    monkeypatch: pytest.MonkeyPatch, machine: str, has: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(identity.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert identity.bf16_instructions() == expected
    cpu = torch.device("cpu")
    assert identity.numerics_identity(cpu, 1, cpu)["cpu_bf16"] == (expected or "none")
