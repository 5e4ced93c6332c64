"""Buffers used again: never more of a size, or of sizes near it, than were in use at a time."""

from __future__ import annotations

import torch

from manyhands.offload.allocator import BufferPool

CPU = torch.device("cpu")


def test_a_buffer_is_used_again_by_sizes_near_its_own() -> None:
    pool = BufferPool(CPU)
    place = pool.take(100, torch.float32).fill_(1.0)
    address = place.data_ptr()
    pool.give_back(place)
    place = pool.take(51, torch.float32)
    assert (place.data_ptr(), place.shape, pool.num_bytes) == (address, (51,), 400)
    pool.give_back(place)
    place = pool.take(100, torch.float32)
    assert (place.data_ptr(), pool.num_bytes) == (address, 400)
    pool.give_back(place)
    assert pool.take(50, torch.float32).data_ptr() != address
    assert pool.take(100, torch.bfloat16).data_ptr() != address
    assert pool.num_bytes == 400 + 200 + 200


def test_one_that_is_too_small_gives_way() -> None:
    pool = BufferPool(CPU)
    small, tiny = pool.take(12, torch.float32), pool.take(1, torch.float32)
    pool.give_back(small)
    pool.give_back(tiny)
    del small, tiny
    assert pool.take(14, torch.float32).shape == (14,)
    assert pool.num_bytes == 4 * (14 + 1)
    pool.trim()
    assert pool.num_bytes == 4 * 14


def test_one_that_somebody_looks_into_is_theirs() -> None:
    pool = BufferPool(CPU)
    place = pool.take(10, torch.float32).fill_(3.0)
    view = place[2:4]
    pool.give_back(place)
    assert pool.num_bytes == 0
    assert pool.take(10, torch.float32).fill_(4.0).data_ptr() != place.data_ptr()
    assert view.tolist() == [3.0, 3.0]
    pool.put_back(place)  # who knows better
    assert pool.take(10, torch.float32).data_ptr() == place.data_ptr()


def test_one_taken_for_inference_serves_training_later() -> None:
    pool = BufferPool(CPU)
    with torch.inference_mode():
        place = pool.take(4, torch.float32)
        pool.give_back(place)
        del place
    place = pool.take(3, torch.float32).fill_(2.0)
    factor = torch.ones(3, requires_grad=True)
    (place * factor).sum().backward()
    assert factor.grad is not None
    assert factor.grad.tolist() == [2.0, 2.0, 2.0]
