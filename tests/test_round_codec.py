"""The codec of the values that islands exchange: its bits are defined, and depend on neither threads nor chunks."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.rounds import codec
from manyhands.rounds.codec import NotFiniteError, codes_bytes, decode, decode_add, encode, num_blocks

BITS = (8, 4, 2)
SIZES = (1, 255, 256, 257, 1_000_003)

RECORDED = {
    (8, False): "7349a986c53e6b13",
    (8, True): "66fe543c2d760a22",
    (4, False): "6f4b64c3f080fa8f",
    (4, True): "ce25660f93bdabe3",
    (2, False): "6a4eb8ca8827ff69",
    (2, True): "765628c306d78027",
}
"""The digests of what `encode` and `decode` return for `sample`, by bits and whether there is error feedback.

These are a part of the format: files of another version must decode to the same values. Never record them again.
"""


def sample(numel: int, seed: int) -> Tensor:
    """Values that are made by integer arithmetic, so that they have the same bits on every machine. The first blocks of
    a long tensor are special.
    """
    raw = hashlib.shake_256(f"{seed} {numel}".encode()).digest(8 * numel)
    sums = np.frombuffer(raw, "<u2").reshape(-1, 4).sum(1, dtype=np.int64) - 131_070  # nearly normal
    exponents = -8 - (np.arange(numel) // 256 * 7 + seed) % 40
    values = torch.from_numpy(np.ldexp(sums.astype(np.float32), exponents.astype(np.int32)).astype(np.float32))
    if numel > 256 * 8:
        blocks = values[: 256 * 8].view(8, 256)
        signs = blocks.sign()
        blocks[0] = 0
        blocks[1] = signs[1] * 1e-42  # subnormal
        blocks[2] = signs[2] * 2.0**-101  # the sum is above 2**-100, the maximum below
        blocks[3], blocks[3, 9] = signs[3] * 2.0**-120, -(2.0**-100)
        blocks[4, 77] = 3e38
        blocks[5] = signs[5] * 0.0
        blocks[6] = signs[6] * 2.0**-126
        blocks[7] = 1.0  # all equal
    return values


def encoded(values: Tensor, bits: int, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes = torch.full((codes_bytes(values.numel(), bits),), 0xA5, dtype=torch.uint8)
    scales = torch.full((num_blocks(values.numel()),), math.nan, dtype=torch.bfloat16)
    encode(values, bits, codes, scales, residual)
    return codes, scales


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest_of_rounds(numel: int, bits: int, feedback: bool) -> str:
    """The digest of everything that two rounds compute."""
    residual = torch.zeros(numel) if feedback else None
    total = sample(numel, 7)
    found = []
    for number in range(2):
        values = sample(numel, number)
        if feedback:
            values.clamp_(-5e37, 5e37)  # a residual is left, and the sums of the next round must be finite
        before = digest(values)
        codes, scales = encoded(values, bits, residual)
        assert digest(values) == before, "encode changed its argument"
        decode_add(total, codes, scales, bits)
        found += [codes, scales, decode(codes, scales, bits, numel)]
    return digest(*found, total, *([] if residual is None else [residual]))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_that_were_recorded(bits: int, feedback: bool) -> None:
    together = "".join(digest_of_rounds(numel, bits, feedback) for numel in SIZES)
    assert hashlib.sha256(together.encode()).hexdigest()[:16] == RECORDED[bits, feedback]


@pytest.mark.parametrize("bits", BITS)
def test_bits_depend_on_neither_threads_nor_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 300_001
    found = set()
    for threads, at_once in ((1, 1024), (1, 7), (1, 10**6), (2, 512), (2, 1024), (3, 10**6), (4, 333)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(codec, "_BLOCKS_AT_ONCE", at_once)
        found.add(digest_of_rounds(numel, bits, True))
    torch.set_num_threads(1)
    monkeypatch.setattr(codec, "_BLOCKS_AT_ONCE", 1)
    short = digest_of_rounds(10_001, bits, True)
    monkeypatch.setattr(codec, "_BLOCKS_AT_ONCE", 1024)
    assert digest_of_rounds(10_001, bits, True) == short
    assert len(found) == 1


def fp32(value: float) -> float:
    """A number of fp64, rounded to fp32. The sum and quotient of fp32 numbers aren't changed by rounding them twice."""
    return float(np.float32(value))


def bf16(value: float) -> float:
    """A number of fp32, rounded to bf16 by hand: to the nearest, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def reference(c: list[float], bits: int) -> tuple[list[int], float, list[float]]:
    """Codes, scale and decoded values of one block, computed in plain Python."""
    largest = max(map(abs, c))
    if bits == 2:
        sums = [abs(value) for value in c]
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [fp32(sums[i] + sums[i + half]) for i in range(half)]
        scale = fp32(sums[0] * (1.25 / 256))
    else:
        scale = fp32(largest / {8: 127, 4: 7}[bits])
    scale = 0.0 if largest < 2.0**-100 else bf16(scale)
    codes, decoded = [], []
    for value in c:
        quotient = fp32(value / scale) if scale else 0.0
        if bits == 2:
            q = min(max(math.floor(quotient), -2), 1)
            exact = (Fraction(q) + Fraction(1, 2)) * Fraction(scale)
        else:
            q = min(max(round(quotient), 1 - 2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            exact = Fraction(q) * Fraction(scale)
        assert Fraction(fp32(float(exact))) == exact, "a decoded value isn't exact in fp32"
        codes.append(q + 2 ** (bits - 1))
        decoded.append(float(exact))
    return codes, scale, decoded


def assert_is_reference(values: Tensor, residual: Tensor, bits: int) -> None:
    """Compare all that is computed for one tensor with plain Python."""
    c = [fp32(value + error) for value, error in zip(values.tolist(), residual.tolist(), strict=True)]
    after = residual.clone()
    codes, scales = encoded(values, bits, after)
    found = decode(codes, scales, bits, len(c))
    for block in range(scales.numel()):
        part = c[block * 256 : block * 256 + 256]
        expected, scale, decoded = reference(part + [0.0] * (256 - len(part)), bits)
        packed = 0
        for index, code in enumerate(expected):
            packed |= code << (bits * index)
        size = 256 * bits // 8
        assert bytes(codes[block * size : (block + 1) * size].tolist()) == packed.to_bytes(size, "little")
        assert float(scales[block]) == scale
        place = slice(block * 256, block * 256 + len(part))
        assert same_bits(found[place], torch.tensor(decoded[: len(part)]))
        left = [fp32(value - other) for value, other in zip(part, decoded, strict=False)]
        assert same_bits(after[place], torch.tensor(left))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("bits", BITS)
def test_the_codec_agrees_with_plain_python(bits: int) -> None:
    values = sample(256 * 20 + 3, 3)
    assert_is_reference(values, torch.zeros_like(values), bits)
    residual = sample(256 * 20 + 3, 4) * 2.0**-7
    residual[256 * 4 : 256 * 5] = 0
    assert_is_reference(values, residual, bits)


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_ties_are_rounded_to_even(bits: int, top: int) -> None:
    values = torch.tensor([float(top), *(k + 0.5 for k in range(-top, top))])[:256]
    codes, scales = encoded(values, bits)
    assert scales[0] == 1
    assert decode(codes, scales, bits, values.numel()).tolist() == [float(round(value)) for value in values.tolist()]
    assert_is_reference(values, torch.zeros_like(values), bits)


def test_the_sum_of_2_bits_is_by_halves() -> None:
    """53 * 1.25 lies between two numbers of bf16, so the scale shows whether the small values were added to it or lost
    one by one.
    """
    blocks = torch.zeros(100, 256)
    places = torch.randint(1, 256, (100, 4), generator=torch.Generator().manual_seed(1))
    blocks.scatter_(1, places, 0.375 * 2.0**-18)  # less than half a unit in the last place of 53
    blocks[:, 0] = 53
    assert_is_reference(blocks.view(-1), torch.zeros(25_600), 2)
    scales = encoded(blocks.view(-1), 2)[1]
    for other in (blocks.sum(1), blocks.flip(1).cumsum(1)[:, -1], blocks.view(100, 128, 2).sum(2).sum(1)):
        assert not torch.equal((other * (1.25 / 256)).bfloat16(), scales)


def test_scales_are_quotients_not_products_with_the_inverse() -> None:
    every_mantissa = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    for top in (7, 127):
        expected = torch.from_numpy(every_mantissa.numpy() / np.float32(top)).bfloat16()
        blocks = torch.zeros(4096, 256)
        for start in range(0, 1 << 23, 1 << 21):
            part = every_mantissa[start : start + (1 << 21) : 512]
            blocks[:, 5] = part
            found = encoded(blocks.view(-1), 8 if top == 127 else 4)[1]
            assert torch.equal(found, expected[start : start + (1 << 21) : 512])


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(BITS), st.integers(1, 300))
def test_any_values_are_encoded_as_in_plain_python(data: st.DataObject, bits: int, numel: int) -> None:
    few = data.draw(st.lists(FLOATS, min_size=1, max_size=8))
    picks = torch.arange(numel) * data.draw(st.integers(1, 7)) % len(few)
    values = torch.tensor(few)[picks]
    errors = data.draw(st.lists(FLOATS, min_size=1, max_size=3))
    residual = torch.tensor(errors)[torch.arange(numel) % len(errors)]
    assert_is_reference(values, residual, bits)


@pytest.mark.parametrize("bits", BITS)
def test_any_range_is_decoded_as_in_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_BLOCKS_AT_ONCE", 3)
    numel = 256 * 9 + 100
    values = sample(numel, 5)
    codes, scales = encoded(values, bits)
    start = sample(numel, 6)
    whole = start.clone()
    decode_add(whole, codes, scales, bits)
    assert same_bits(whole, start + decode(codes, scales, bits, numel))
    for first, last in ((0, 1), (0, 256), (255, 257), (1, numel), (700, 703), (256, 768), (numel - 1, numel), (5, 5)):
        part = start[first:last].clone()
        decode_add(part, codes, scales, bits, first)
        assert same_bits(part, whole[first:last]), (first, last)
        assert same_bits(
            decode(codes, scales, bits, last - first, first), decode(codes, scales, bits, numel)[first:last]
        )
    with pytest.raises(InvariantError, match="lack some elements"):
        decode(codes, scales, bits, 2, 256 * 10 - 1)


@pytest.mark.parametrize("bits", BITS)
def test_parts_of_a_tensor_are_encoded_as_the_whole(bits: int) -> None:
    numel = 256 * 9 + 100
    values, residual = sample(numel, 8), sample(numel, 9) * 2.0**-100
    codes, scales = torch.empty(codes_bytes(numel, bits), dtype=torch.uint8), torch.empty(10, dtype=torch.bfloat16)
    parts = residual.clone()
    for first, last in ((0, 4), (4, 5), (5, 10)):
        place, block = slice(first * 256, last * 256), codes_bytes(256, bits)
        encode(values[place], bits, codes[first * block : last * block], scales[first:last], parts[place])
    expected = encoded(values, bits, residual)
    assert digest(codes, scales, parts) == digest(*expected, residual)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.001), (4, 0.01), (2, 0.12)])
def test_error_feedback_loses_nothing_over_rounds(bits: int, worst: float) -> None:
    rounds, values = 16, sample(2048, 300)
    total, residual = torch.zeros(2048, dtype=torch.float64), torch.zeros(2048)
    for number in range(rounds):
        c = values + residual
        codes, scales = encoded(values, bits, residual)
        decoded = decode(codes, scales, bits, 2048)
        assert same_bits(residual, c - decoded), number
        total += decoded.double()
    exact = values.double() * rounds
    # What was left out is the last residual, apart from roundings of fp32.
    assert torch.allclose(total + residual.double(), exact, rtol=1e-5, atol=float(values.abs().max()) * 1e-5)
    error = (total - exact).norm() / exact.norm()
    alone = (decode(*encoded(values, bits), bits, 2048).double() - values).norm() / values.double().norm()
    assert error < alone / 3
    assert error < worst


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_values_that_are_not_finite_are_refused_anywhere(
    bits: int, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_BLOCKS_AT_ONCE", 2)
    for at in (0, 1, 255, 256, 511, 512, 1029):
        values, residual = sample(1030, 1), torch.zeros(1030)
        values[at] = wrong
        for error in (None, residual):
            with pytest.raises(NotFiniteError) as caught:
                encoded(values, bits, error)
            assert caught.value.index == at
        values[at], residual[at] = 0, wrong
        with pytest.raises(NotFiniteError) as caught:
            encoded(values, bits, residual)
        assert caught.value.index == at


def test_values_that_overflow_are_refused() -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.zeros(600)
    values[300] = largest
    for bits in BITS:  # bf16 rounds the scale of the largest number down, and the sum is finite
        assert bool(decode(*encoded(values, bits), bits, 600).isfinite().all())
    values[256:512] = largest / 4
    values[299] = -largest / 2
    for bits in (8, 4):
        assert bool(decode(*encoded(values, bits), bits, 600).isfinite().all())
    with pytest.raises(NotFiniteError) as caught:
        encoded(values, 2)
    assert caught.value.index == 299
    residual = torch.full((600,), largest)
    with pytest.raises(NotFiniteError):  # the sum of two finite numbers is not
        encoded(torch.full((600,), largest), 4, residual)


def test_blocks_of_zeros_change_nothing() -> None:
    for bits in BITS:
        for tiny in (0.0, -0.0, 1e-42, -(2.0**-101)):
            values, residual = torch.full((256,), tiny), torch.zeros(256)
            codes, scales = encoded(values, bits, residual)
            assert scales[0] == 0
            assert same_bits(decode(codes, scales, bits, 256), torch.zeros(256))
            assert torch.equal(residual, values)
            assert codes.tolist() == [{8: 0x80, 4: 0x88, 2: 0xAA}[bits]] * codes.numel()


def test_parameters_may_be_encoded_and_added_to() -> None:
    weights = torch.nn.Parameter(sample(300, 1))
    codes, scales = encoded(weights, 4, torch.zeros(300))
    decode_add(weights, codes, scales, 4)
    assert weights.requires_grad
    assert weights.grad_fn is None


def test_tensors_in_the_wrong_form_are_refused() -> None:
    values, codes, scales = torch.zeros(300), torch.empty(256, dtype=torch.uint8), torch.empty(2, dtype=torch.bfloat16)
    encode(values, 4, codes, scales)
    for wrong in (
        (values.double(), 4, codes, scales, None),
        (values, 3, codes, scales, None),
        (values, 8, codes, scales, None),
        (values, 4, codes[1:], scales, None),
        (values, 4, codes, scales.float(), None),
        (values, 4, codes, scales, torch.zeros(299)),
        (torch.zeros(600)[::2], 4, codes, scales, None),
    ):
        with pytest.raises(InvariantError):
            encode(*wrong)
