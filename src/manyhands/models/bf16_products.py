"""bf16 matrix products computed in fp32 on CPUs that would emulate them.

There torch emulates the instructions, and takes four times as long as for the same product in fp32 (a Xeon with
AVX-512) or a hundred times (its plain loops, where oneDNN has no bf16). A product of two bf16 numbers is exact in fp32,
and both ways add in fp32: nothing is lost but the emulation. The bits differ from those of a CPU that has the
instructions, as they would anyway; which it was is part of the numerics identity.

A torch dispatch mode does it, below autograd: models, losses and optimizers stay as they are, in backward, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from manyhands.numerics.arithmetic import bf16_instructions

MOST_ELEMENTS = 1 << 21
"""Of the larger factor of a matrix product, and of the product, how many are in fp32 at a time: 8 MiB each."""

MOST_KEPT = 1 << 22
"""So many elements of fp32 a buffer keeps between products: 16 MiB."""

_Compute = Callable[..., Any]


def bf16_products_in_fp32(wanted: bool = True) -> AbstractContextManager[object]:
    """While it is entered, this thread's products of bf16 tensors on a CPU are computed in fp32, unless the CPU has
    instructions for them, or it isn't wanted. Not for compiled code, which torch won't compile under a dispatch mode.
    """
    if wanted and not bf16_instructions():
        return _ProductsInFp32()  # type: ignore[no-untyped-call]
    return nullcontext()


class _ProductsInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        compute, kwargs = _products().get(func), kwargs or {}
        if compute is not None and _are_plain_bf16(args):
            return compute(func, *args, **kwargs)
        if _is_composite(func):  # of the ones above, perhaps: without autograd it's not taken apart before
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


@cache
def _products() -> dict[OpOverload, _Compute]:
    """What computes which product."""
    aten = torch.ops.aten
    computes: dict[OpOverload, _Compute] = {
        aten.mm.default: lambda func, left, right: _matrix_product(aten.mm.out, None, left, right),
        aten.addmm.default: lambda func, *args, **factors: _matrix_product(aten.addmm.out, *args, **factors),
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    }
    whole = (
        aten.bmm,
        aten.baddbmm,
        aten.convolution,
        aten.convolution_backward,
        aten.mkldnn_rnn_layer,
        aten.mkldnn_rnn_layer_backward,
        aten._grouped_mm,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    return computes | {packet.default: _product for packet in whole}


def _are_plain_bf16(args: Sequence[Any]) -> bool:
    """Whether the tensors of a product are of bf16, dense, on a CPU, and of torch's own kind."""
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
    """The product as a whole."""
    return tree_map(_rounded, func(*tree_map(_widened, args), **kwargs))


def _attention(func: OpOverload, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Its output, and the logarithms of sums of exponentials, which are in fp32 in any case."""
    output, log_sums = func(*tree_map(_widened, args), **kwargs)
    return _rounded(output), log_sums


def _matrix_product(func: OpOverload, added: Tensor | None, left: Tensor, right: Tensor, **factors: float) -> Tensor:
    """left [m, k] times right [k, n], plus `added`, which can be expanded to [m, n]; the larger of the two a part at a
    time."""
    (rows, inner), columns = left.shape, right.shape[1]
    product = left.new_empty(rows, columns)
    by_columns = columns > rows
    buffers = _buffers()
    whole = buffers[0].widened(left if by_columns else right)
    others = [] if added is None else [_widened(added).expand(rows, columns)]
    length = max(64, MOST_ELEMENTS // max(1, inner, min(rows, columns)))
    for start in range(0, max(rows, columns), length):
        part = (slice(None), slice(start, start + length)) if by_columns else (slice(start, start + length),)
        factor = buffers[1].widened((right if by_columns else left)[part])
        out = buffers[2].of(product[part].shape)
        two = (whole, factor) if by_columns else (factor, whole)
        product[part] = func(*(other[part] for other in others), *two, **factors, out=out)
    return product


class _Buffer:
    """Memory of fp32 that is used again and again: fresh one costs page faults, and leaves holes between what lasts."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, shape: Sequence[int]) -> Tensor:
        """Uninitialised. Until the next call."""
        numel = prod(shape)
        if numel > MOST_KEPT:
            return torch.empty(shape)
        if numel > self._memory.numel():
            with torch.inference_mode(False):  # a buffer that's made in it can't be used outside of it
                self._memory = torch.empty(numel)
        return self._memory[:numel].view(shape)

    def widened(self, matrix: Tensor) -> Tensor:
        """A matrix in fp32, with rows and columns where they were."""
        if matrix.stride(0) == 1:
            return self.of(matrix.T.shape).copy_(matrix.T).T
        return self.of(matrix.shape).copy_(matrix)


_local = threading.local()


def _buffers() -> tuple[_Buffer, _Buffer, _Buffer]:
    """This thread's: for one factor, a part of the other one, and their product."""
    if not hasattr(_local, "buffers"):
        _local.buffers = _Buffer(), _Buffer(), _Buffer()
    found: tuple[_Buffer, _Buffer, _Buffer] = _local.buffers
    return found
