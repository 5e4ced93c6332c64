"""Quantizes the values that islands exchange: blocks of 256 values with 8, 4 or 2 bits each and one bf16 scale.

An island publishes the difference between the weights before and after its steps (DiLoCo, arXiv 2311.08105), with a few
bits per value (Streaming DiLoCo, arXiv 2501.18512, uses 4). All clusters decode the same bytes, so the bits of every
result are defined here, operation by operation:

1. With error feedback (as MuLoCo, arXiv 2505.23725, does for 2 bits), `c = value + residual`, else `c = value`.
2. A block is 256 values in row-major order. Blocks never cross tensors. The last block of a tensor is padded
   with zeros.
3. Let `a = max |c|` of the block. If `a < 2**-100`, the scale `s` is 0, and all `q` are 0.
4. 8 and 4 bits: `s = bf16(a / top)` with `top` = 127 or 7, and `q = round(c / s)`, which is in [-top, top].
   Decoded value: `q * s`.
5. 2 bits: `s = bf16(1.25 / 256 * sum |c|)`. The sum adds the second half of the block to the first, 128 + 128 values,
   then the halves of the result, 64 + 64, and so on. `q = floor(c / s)`, limited to [-2, 1]. Decoded value:
   `(q + 1/2) * s`.
6. The new residual is `c - decoded value`.
7. `q + 2**(bits - 1)` is stored, without a sign. The value with the lowest index has the lowest bits of its byte.

Every operation is in fp32 and rounds to the nearest value, ties to even. `c / s` is a division, never a product with
`1 / s`. A decoded value is exact, because `q` has at most 7 bits and `s` has 8. So only the order in which islands are
added can change the bits of a sum. All operations are element-wise, except for the maximum, which has no rounding. So
the result does not depend on threads, or on how many blocks are processed at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyhands.errors import InvariantError

CODEC_BLOCK = 256
"""The number of values that share a scale."""

CODEC_BITS = (8, 4, 2)
"""The numbers of bits per value that the codec supports."""

TINY = 2.0**-100
"""A block whose largest absolute value is below this is encoded as zeros."""

# The intermediate results of this many blocks fit into a core's caches. Fewer blocks would take longer because of the
# time of each call of torch, and more blocks would be hardly faster.
_BLOCKS_AT_ONCE = 1024


class NotFiniteError(ArithmeticError):
    """A value to encode is NaN or infinite. Or a block's sum is infinite, which only 2 bits need.

    index: the index of the first such value in the tensor, or of the largest value of the block.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite, or too large to be encoded")
        self.index = index


def num_blocks(numel: int) -> int:
    """Return the number of blocks, and so of scales, of a tensor."""
    return -(-numel // CODEC_BLOCK)


def codes_bytes(numel: int, bits: int) -> int:
    """Return the size of a tensor's codes. This is a multiple of 64 bytes, because the last block is padded."""
    return num_blocks(numel) * CODEC_BLOCK * bits // 8


@torch.no_grad()
def encode(values: Tensor, bits: int, codes: Tensor, scales: Tensor, residual: Tensor | None = None) -> None:
    """Write the codes and scales of a tensor, or of a part of it.

    values: [n] fp32 on the CPU, not changed. A part starts with a complete block; only the last part of a tensor may
    end with an incomplete block. bits: 8, 4 or 2. codes, scales: where the result is written, uint8
    [codes_bytes(n, bits)] and bf16 [num_blocks(n)]. residual: [n] fp32 for error feedback. It is added to the values,
    and becomes what the codes leave out.

    Raises NotFiniteError. Then the codes, the scales and the residual are incomplete, and must not be used.
    """
    n = values.numel()
    _check_codes(codes, scales, bits, num_blocks(n))
    _check(values, torch.float32, n, "values")
    if residual is not None:
        _check(residual, torch.float32, n, "residual")
    size = min(num_blocks(n), _BLOCKS_AT_ONCE) * CODEC_BLOCK
    padded, work = torch.empty(2, size).unbind()
    unsigned = torch.empty(size, dtype=torch.uint8)
    for first, last in _chunks(0, num_blocks(n)):
        start, end = first * CODEC_BLOCK, min(last * CODEC_BLOCK, n)
        error = None if residual is None else residual[start:end]
        blocks = _blocks(values[start:end], error, padded)
        q = work[: blocks.numel()].view(-1, CODEC_BLOCK)
        scale = _scales(blocks, bits, q)
        if not bool(torch.isfinite(scale).all()):
            raise NotFiniteError(start + _not_finite(blocks, scale))
        scales[first:last] = scale.view(-1)
        scale = scale.float()
        _unsigned(blocks, scale, bits, q)
        stored = unsigned[: q.numel()]
        stored.copy_(q.view(-1))
        codes[_codes_range(first, last, bits)] = _pack(stored, bits)
        if error is not None:
            _decode_unsigned(q, scale, bits)
            torch.sub(blocks.view(-1)[: end - start], q.view(-1)[: end - start], out=error)


@torch.no_grad()
def decode_add(total: Tensor, codes: Tensor, scales: Tensor, bits: int, first: int = 0) -> None:
    """Add decoded values to `total`, with one rounding each: `total[k] += value of element first + k`.

    total: [n] fp32 on the CPU, for any range of the tensor's elements. codes, scales: those of the complete tensor.
    """
    for place, values in _decoded(total, codes, scales, bits, first):
        place.add_(values)


def decode(codes: Tensor, scales: Tensor, bits: int, numel: int, first: int = 0) -> Tensor:
    """Return the values of the elements [first, first + numel) of a tensor, [numel] fp32.

    codes, scales: those of the complete tensor.
    """
    result = torch.empty(numel)
    for place, values in _decoded(result, codes, scales, bits, first):
        place.copy_(values)
    return result


def _decoded(result: Tensor, codes: Tensor, scales: Tensor, bits: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield consecutive parts of `result`, each with the decoded values of its elements."""
    n, blocks = result.numel(), scales.numel()
    _check_codes(codes, scales, bits, blocks)
    _check(result, torch.float32, n, "total")
    if not 0 <= first <= first + n <= blocks * CODEC_BLOCK:
        raise InvariantError("the codes lack some elements", expected=f"[{first}, {first + n})", got=f"{blocks} blocks")
    end = num_blocks(first + n) if n else 0
    work = torch.empty(min(end, _BLOCKS_AT_ONCE) * CODEC_BLOCK)
    for start, stop in _chunks(first // CODEC_BLOCK, end):
        q = work[: (stop - start) * CODEC_BLOCK]
        q.copy_(_unpack(codes[_codes_range(start, stop, bits)], bits))
        _decode_unsigned(q.view(-1, CODEC_BLOCK), scales[start:stop, None].float(), bits)
        begin = start * CODEC_BLOCK
        low, high = max(first, begin), min(first + n, stop * CODEC_BLOCK)
        yield result[low - first : high - first], q[low - begin : high - begin]


def _chunks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of blocks that are processed at once."""
    for start in range(first, last, _BLOCKS_AT_ONCE):
        yield start, min(start + _BLOCKS_AT_ONCE, last)


def _codes_range(first: int, last: int, bits: int) -> slice:
    """Return the range of the codes of the blocks [first, last)."""
    block = CODEC_BLOCK * bits // 8
    return slice(first * block, last * block)


def _blocks(values: Tensor, residual: Tensor | None, padded: Tensor) -> Tensor:
    """Return `values`, or values + residual, in blocks [blocks, 256]. The result may be a view of either argument."""
    n, size = values.numel(), num_blocks(values.numel()) * CODEC_BLOCK
    if residual is None and n == size:
        return values.view(-1, CODEC_BLOCK)
    if residual is None:
        padded[:n] = values
    else:
        torch.add(values, residual, out=padded[:n])
    padded[n:size] = 0
    return padded[:size].view(-1, CODEC_BLOCK)


def _scales(blocks: Tensor, bits: int, work: Tensor) -> Tensor:
    """Return the scales of [blocks, 256], [blocks, 1] bf16.

    A scale is not finite if and only if a value of the block is not, or the sum. The decoded values of finite scales
    are finite, because bf16 rounds the scales of the largest fp32 numbers down. work: [blocks, 256], overwritten.
    """
    torch.abs(blocks, out=work)
    # linalg.vector_norm(inf) and aminmax take 5 times as long. amax, too, returns NaN if it meets one.
    largest = work.amax(1, keepdim=True)
    if bits == 2:
        total = work
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        scale = total * (1.25 / CODEC_BLOCK)
    else:
        scale = largest / _top(bits)
    return torch.where(largest < TINY, 0.0, scale).bfloat16()


def _top(bits: int) -> int:
    """Return the largest `q`."""
    return _bias(bits) - 1


def _bias(bits: int) -> int:
    """Return what is added to `q`, so that codes have no sign."""
    return 1 << (bits - 1)


def _not_finite(blocks: Tensor, scale: Tensor) -> int:
    """Return the index of the value that NotFiniteError reports."""
    wrong = torch.isfinite(blocks).logical_not_().view(-1)
    if bool(wrong.any()):
        return int(wrong.int().argmax())
    block = int(torch.isfinite(scale).logical_not_().view(-1).int().argmax())
    return block * CODEC_BLOCK + int(blocks[block].abs().argmax())


def _unsigned(blocks: Tensor, scale: Tensor, bits: int, q: Tensor) -> None:
    """Write `q + 2**(bits - 1)` of all values to `q`, [blocks, 256] fp32."""
    # A quotient by infinity is 0, so the blocks whose scale is 0 get q = 0.
    torch.div(blocks, torch.where(scale == 0, torch.inf, scale), out=q)
    if bits == 2:
        q.floor_().clamp_(-2, 1)
    else:
        q.round_()  # bf16 changes a scale by less than 0.4 %, so no quotient is as large as top + 0.5
    q.add_(_bias(bits))


def _decode_unsigned(q: Tensor, scale: Tensor, bits: int) -> None:
    """Replace stored codes [blocks, 256] fp32 by the decoded values."""
    q.sub_(_bias(bits) - 0.5 if bits == 2 else _bias(bits)).mul_(scale)


def _pack(stored: Tensor, bits: int) -> Tensor:
    """Return the codes [n] uint8 with 8 / bits codes per byte. The views are little-endian, as torch's files are."""
    if bits == 8:
        return stored
    if bits == 4:
        pairs = stored.view(torch.int16)
        return (pairs | (pairs >> 4)).bitwise_and_(0xFF).to(torch.uint8)
    fours = stored.view(torch.int32)
    halves = fours | (fours >> 6)
    return (halves | (halves >> 12)).bitwise_and_(0xFF).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes with one code per byte, uint8."""
    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.to(torch.int16)
        return (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.uint8)
    fours = packed.to(torch.int32)
    halves = fours | (fours << 12)
    return (halves | (halves << 6)).bitwise_and_(0x03030303).view(torch.uint8)


def _check_codes(codes: Tensor, scales: Tensor, bits: int, blocks: int) -> None:
    if bits not in CODEC_BITS:
        raise InvariantError("the codec has no such number of bits", expected=CODEC_BITS, got=bits)
    _check(codes, torch.uint8, codes_bytes(blocks * CODEC_BLOCK, bits), "codes")
    _check(scales, torch.bfloat16, blocks, "scales")


def _check(tensor: Tensor, dtype: torch.dtype, numel: int, what: str) -> None:
    found = tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.is_contiguous()
    expected = dtype, (numel,), "cpu", True
    if found != expected:
        raise InvariantError(f"the codec was given {what} in the wrong form", expected=expected, got=found)
