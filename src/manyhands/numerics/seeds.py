"""Seeds from (run seed, purpose, step, micro-batch), and the states of generators.

Random numbers never come from a stream that other code may have advanced. So it doesn't matter which worker computes a
micro-batch, which process loads it, or whether the run was interrupted in between.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhands.numerics.counters import derive as derive  # re-exported


def seed_generators(value: int) -> None:
    """Seed Python's `random`, numpy's global generator and torch's (all devices) with `value`, 0 <= value < 2**63.

    Called with `derive(run_seed, "compute", step, micro_batch)` before a micro-batch is computed, and with
    `derive(run_seed, "data", step, micro_batch)` before it is loaded.
    """
    random.seed(value)
    np.random.seed([value & 0xFFFFFFFF, value >> 32])
    torch.manual_seed(value)


@dataclass(frozen=True)
class GeneratorsState:
    """States of Python's `random`, numpy's global generator, and torch's on the CPU and on every device in use."""

    python: Any
    arrays: Any
    tensors: Tensor
    devices: list[Tensor] | None


def generators_state() -> GeneratorsState:
    """Return the generators' current states."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return GeneratorsState(random.getstate(), np.random.get_state(), torch.get_rng_state(), devices)


def restore_generators(state: GeneratorsState) -> None:
    """Set the generators' states."""
    random.setstate(state.python)
    np.random.set_state(state.arrays)
    torch.set_rng_state(state.tensors)
    if state.devices is not None:
        torch.cuda.set_rng_state_all(state.devices)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the states of all global generators at the end of the block."""
    state = generators_state()
    try:
        yield
    finally:
        restore_generators(state)
