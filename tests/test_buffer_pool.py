"""A pool reuses buffers of similar sizes, and never holds more of them than were in use at a time."""

from __future__ import annotations

import torch

from manyhands.offload.allocator import BufferPool

CPU = torch.device("cpu")


def test_a_buffer_is_reused_for_similar_sizes() -> None:
    pool = BufferPool(CPU)
    buffer = pool.take(100, torch.float32).fill_(1.0)
    address = buffer.data_ptr()
    pool.give_back(buffer)
    buffer = pool.take(51, torch.float32)
    assert (buffer.data_ptr(), buffer.shape, pool.num_bytes) == (address, (51,), 400)
    pool.give_back(buffer)
    buffer = pool.take(100, torch.float32)
    assert (buffer.data_ptr(), pool.num_bytes) == (address, 400)
    pool.give_back(buffer)
    assert pool.take(50, torch.float32).data_ptr() != address
    assert pool.take(100, torch.bfloat16).data_ptr() != address
    assert pool.num_bytes == 400 + 200 + 200


def test_a_buffer_that_is_too_small_is_replaced() -> None:
    pool = BufferPool(CPU)
    small, tiny = pool.take(12, torch.float32), pool.take(1, torch.float32)
    pool.give_back(small)
    pool.give_back(tiny)
    del small, tiny
    assert pool.take(14, torch.float32).shape == (14,)
    assert pool.num_bytes == 4 * (14 + 1)
    pool.trim()
    assert pool.num_bytes == 4 * 14


def test_a_buffer_with_other_references_leaves_the_pool() -> None:
    pool = BufferPool(CPU)
    buffer = pool.take(10, torch.float32).fill_(3.0)
    view = buffer[2:4]
    pool.give_back(buffer)
    assert pool.num_bytes == 0
    assert pool.take(10, torch.float32).fill_(4.0).data_ptr() != buffer.data_ptr()
    assert view.tolist() == [3.0, 3.0]
    pool.put_back(buffer)  # returns the buffer although a view of it exists
    assert pool.take(10, torch.float32).data_ptr() == buffer.data_ptr()


def test_a_buffer_taken_in_inference_mode_serves_training_later() -> None:
    pool = BufferPool(CPU)
    with torch.inference_mode():
        buffer = pool.take(4, torch.float32)
        pool.give_back(buffer)
        del buffer
    buffer = pool.take(3, torch.float32).fill_(2.0)
    factor = torch.ones(3, requires_grad=True)
    (buffer * factor).sum().backward()
    assert factor.grad is not None
    assert factor.grad.tolist() == [2.0, 2.0, 2.0]
