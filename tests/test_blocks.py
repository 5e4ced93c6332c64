"""A block's norm and hash depend only on that block's bits; the hash detects every change."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyhands.numerics.digest import block_hashes, block_norms, digest_of_tensors, total_norm
from manyhands.shard_layout import BLOCK


def values(blocks: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(blocks * BLOCK, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 300), st.integers(0, 299), st.integers(1, 300), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_a_blocks_value_does_not_depend_on_other_blocks(blocks: int, first: int, count: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = values(blocks)
        first %= blocks
        part = whole[first * BLOCK : (first + count) * BLOCK]
        assert torch.equal(block_norms(whole)[first : first + count], block_norms(part))
        assert torch.equal(block_hashes(whole)[first : first + count], block_hashes(part))
    finally:
        torch.set_num_threads(before)


@given(st.integers(0, BLOCK - 1), st.integers(0, 31))
@settings(max_examples=200, deadline=None)
def test_the_hash_depends_on_every_single_bit(element: int, bit: int) -> None:
    one = values(1)
    other = one.clone()
    bits = other.view(torch.int32)
    bits[element] = bits[element] ^ torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert not torch.equal(block_hashes(one), block_hashes(other))


@given(st.sets(st.integers(0, BLOCK - 1), min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_sign_flips_and_swaps_do_not_cancel_out(elements: set[int]) -> None:
    one = values(1)
    flipped = one.clone()
    flipped[list(elements)] *= -1
    assert not torch.equal(block_hashes(one), block_hashes(flipped))
    first, second, *_ = elements
    swapped = one.clone()
    swapped[[first, second]] = one[[second, first]]
    assert not torch.equal(block_hashes(one), block_hashes(swapped))


def test_zero_and_minus_zero_differ() -> None:
    zeros = torch.zeros(BLOCK)
    assert not torch.equal(block_hashes(zeros), block_hashes(-zeros))


def test_random_blocks_do_not_collide() -> None:
    hashes = block_hashes(values(20_000))
    assert len(set(hashes.tolist())) == 20_000


def test_the_norm_is_that_of_torch() -> None:
    tensor = values(7)
    assert abs(total_norm(block_norms(tensor)) / float(tensor.double().norm()) - 1) < 1e-6
    tensor[5] = float("nan")
    assert not total_norm(block_norms(tensor)) < float("inf")


def test_the_digest_covers_names_order_and_every_element() -> None:
    one = [("a", torch.ones(3, 5)), ("b", torch.zeros(2000))]
    digest = digest_of_tensors(one)
    assert digest == digest_of_tensors(one)
    assert digest != digest_of_tensors(one[::-1])
    assert digest != digest_of_tensors([("c", one[0][1]), one[1]])
    changed = one[1][1].clone()
    changed[1999] = 1e-45
    assert digest != digest_of_tensors([one[0], ("b", changed)])


class Buffered(nn.Module):
    """Parameters and buffers in turn: of several types, one that is not persistent, and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.norms[1].weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("wide", torch.arange(1500, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_the_digest_covers_buffers() -> None:
    model = Buffered()
    digest = digest_of_tensors(model.state_dict().items())
    assert digest == digest_of_tensors(model.state_dict(keep_vars=True).items())
    assert digest != digest_of_tensors(model.named_parameters())
    found = {digest}
    for buffer in model.buffers():
        before = buffer.clone()
        buffer.view(-1)[-1] = not buffer.view(-1)[-1] if buffer.dtype == torch.bool else buffer.view(-1)[-1] + 1
        found.add(digest_of_tensors(model.state_dict().items()))
        buffer.copy_(before)
    assert len(found) == len(list(model.buffers()))  # all but the one that is not persistent
    assert digest_of_tensors(model.state_dict().items()) == digest


def test_a_digest_without_buffers_is_that_of_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50))
    digest = digest_of_tensors(model.named_parameters())
    assert digest_of_tensors(model.state_dict().items()) == digest
    model[1].weight.requires_grad = False
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    assert digest_of_tensors(model.state_dict(keep_vars=True).items()) == digest_of_tensors(trained) != digest


def test_the_digest_never_changes() -> None:
    """Recorded digests must stay comparable: a change of the hash is a change of the format."""
    ramp = torch.arange(3000, dtype=torch.float32) / 7
    assert digest_of_tensors([("ramp", ramp)]) == PINNED
    counters = torch.arange(3000, dtype=torch.int64)
    assert digest_of_tensors([("ramp", ramp), ("counters", counters)]) == PINNED_WITH_BUFFER


PINNED = "4738ac562b17507d1cea925dbd50c06f51b19b5ec797c5ab435a0ea3337c9816"

PINNED_WITH_BUFFER = "a3843820b3a33055f054aba64dc26ecc13a0cab4869e50bf1f5f0e7baecb3f9b"
