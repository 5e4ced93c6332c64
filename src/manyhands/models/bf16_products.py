"""bf16 matrix products computed in fp32 on CPUs that would emulate them.

On such CPUs torch emulates the instructions. On a Xeon with AVX-512 this takes four times as long as the same product
in fp32. If oneDNN does not support bf16, torch uses plain loops, which take a hundred times as long. A product of two
bf16 numbers is exact in fp32, and sums are fp32 either way, so no precision is lost. The bits of the results differ
from those of a CPU with bf16 instructions, and from those of emulation. The numerics identity therefore records the
instructions.

This is a torch dispatch mode below autograd, so models, losses, backward and optimizers are unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from manyhands.errors import ConfigError
from manyhands.numerics.arithmetic import bf16_instructions

MAX_ELEMENTS = 1 << 21
"""The number of elements of the larger factor, and of the product, that are in fp32 at a time: 8 MiB each."""

MAX_RETAINED = 1 << 22
"""The largest buffer, in elements of fp32, that is retained between products: 16 MiB."""

_Compute = Callable[..., Any]


def bf16_products_in_fp32(enabled: bool = True) -> AbstractContextManager[object]:
    """Return a context that computes this thread's products of bf16 CPU tensors in fp32, and rounds the results.

    The context does nothing if not `enabled`, or if the CPU has bf16 instructions. Don't use it for compiled code,
    because torch compiles nothing under a dispatch mode.
    """
    if enabled and not bf16_instructions():
        return _ProductsInFp32()  # type: ignore[no-untyped-call]
    return nullcontext()


class _ProductsInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        compute, kwargs = _products().get(func), kwargs or {}
        if compute is not None and _are_plain_bf16(args):
            return compute(func, *args, **kwargs)
        if _is_composite(func):  # a composite operation may contain such products; only autograd decomposes it
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


@cache
def _products() -> dict[OpOverload, _Compute]:
    """Return the functions that compute each kind of product."""
    aten = torch.ops.aten
    computes: dict[OpOverload, _Compute] = {
        aten.mm.default: lambda func, left, right: _matrix_product(aten.mm.out, None, left, right),
        aten.addmm.default: lambda func, *args, **factors: _matrix_product(aten.addmm.out, *args, **factors),
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    }
    unsplit = (
        aten.bmm,
        aten.baddbmm,
        aten.convolution,
        aten.convolution_backward,
        aten.mkldnn_rnn_layer,
        aten.mkldnn_rnn_layer_backward,
        aten._grouped_mm,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    return computes | {packet.default: _product for packet in unsplit}


def _are_plain_bf16(args: Sequence[Any]) -> bool:
    """Return True if the tensors of a product are dense bf16 tensors on a CPU."""
    first = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if first is None or first.dtype is not torch.bfloat16 or not first.is_cpu:
        return False
    return all(arg.layout is torch.strided for arg in args if isinstance(arg, Tensor))


@cache
def _is_composite(func: OpOverload) -> bool:
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def _rounded(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _product(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Compute a product in one piece."""
    return tree_map(_rounded, func(*tree_map(_widened, args), **kwargs))


def _attention(func: OpOverload, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Compute attention. Return its output, and the log-sum-exps, which are always fp32."""
    output, log_sums = func(*tree_map(_widened, args), **kwargs)
    return _rounded(output), log_sums


def _matrix_product(func: OpOverload, added: Tensor | None, left: Tensor, right: Tensor, **factors: float) -> Tensor:
    """Return left [m, k] times right [k, n], plus `added`, which is expanded to [m, n].

    The larger factor is converted in parts, so that it is never completely in fp32.
    """
    (rows, inner), columns = left.shape, right.shape[1]
    product = left.new_empty(rows, columns)
    by_columns = columns > rows
    buffers = _buffers()
    smaller = buffers[0].widened(left if by_columns else right)
    others = [] if added is None else [_widened(added).expand(rows, columns)]
    length = max(64, MAX_ELEMENTS // max(1, inner, min(rows, columns)))
    for start in range(0, max(rows, columns), length):
        part = (slice(None), slice(start, start + length)) if by_columns else (slice(start, start + length),)
        factor = buffers[1].widened((right if by_columns else left)[part])
        out = buffers[2].of(product[part].shape)
        factors_in_order = (smaller, factor) if by_columns else (factor, smaller)
        product[part] = func(*(other[part] for other in others), *factors_in_order, **factors, out=out)
    return product


class _Buffer:
    """fp32 memory that is reused. New memory would cost page faults, and would fragment the heap."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, shape: Sequence[int]) -> Tensor:
        """Return an uninitialised tensor of this shape, valid until the next call."""
        numel = prod(shape)
        if numel > MAX_RETAINED:
            return torch.empty(shape)
        if numel > self._memory.numel():
            with torch.inference_mode(False):  # an inference tensor can't be used outside of inference mode
                self._memory = torch.empty(numel)
        return self._memory[:numel].view(shape)

    def widened(self, matrix: Tensor) -> Tensor:
        """Return a copy of the matrix in fp32 with the same memory layout."""
        if matrix.stride(0) == 1:
            return self.of(matrix.T.shape).copy_(matrix.T).T
        return self.of(matrix.shape).copy_(matrix)


_local = threading.local()


def _buffers() -> tuple[_Buffer, _Buffer, _Buffer]:
    """Return this thread's buffers: one for the smaller factor, one for a part of the larger factor, and one for a part
    of the product.
    """
    if not hasattr(_local, "buffers"):
        _local.buffers = _Buffer(), _Buffer(), _Buffer()
    found: tuple[_Buffer, _Buffer, _Buffer] = _local.buffers
    return found


@contextmanager
def mixed_types_explained(model: nn.Module) -> Iterator[None]:
    """In this block, turn torch's error about a mixture of bf16 and fp32 into a ConfigError that names fp32 buffers.

    Only parameters are stored in bf16. Buffers stay in fp32, since many need the precision (rotary frequencies).
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if "bfloat16" not in text.lower() or "type" not in text:
            raise
        names = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.float32]
        listed = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        hint = "cast floating-point inputs to the dtype of the parameters, for example x.to(self.fc.weight.dtype)"
        if names:
            hint += f"; where the model uses a buffer ({listed}), cast it: buffer.to(x.dtype)"
        raise ConfigError(
            "the model computes with bf16 and fp32 tensors together",
            expected="with precision bf16, parameters are in bf16; buffers and inputs keep their types",
            got=text,
            hint=hint,
        ) from error
