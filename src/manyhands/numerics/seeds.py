"""Seeds the global generators, from which dropout draws, by (run seed, purpose, step index, micro-batch).

Random numbers never come from a stream that other code may have advanced. So it doesn't matter which worker computes a
micro-batch, which process loads it, or whether the run was interrupted in between.
"""

from __future__ import annotations

import ctypes
import functools
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhands.numerics.counters import derive as derive  # re-exported


def seed_generators(value: int) -> None:
    """Seed Python's `random`, and the global generators of numpy and torch (CPU and GPUs), with `value`, 0 <= value <
    2**63.

    Called with `derive(run_seed, "compute", step_index, micro_batch)` before a micro-batch is computed, and with
    `derive(run_seed, "data", step_index, micro_batch)` before it is loaded.
    """
    random.seed(value)
    seed_numpy(value)
    seed_torch(value)


def seed_numpy(value: int) -> None:
    """Seed numpy's global generator with `value`, 0 <= value < 2**63."""
    np.random.seed([value & 0xFFFFFFFF, value >> 32])


def seed_torch(value: int) -> None:
    """Seed torch's generators on the CPU and on every GPU.

    This takes a few microseconds. `torch.manual_seed` takes over 100 microseconds, because it also searches for unused
    devices, and records a stack trace for each of their kinds.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _seed_devices()
    else:
        _seed_devices_when_initialized()


def _seed_devices() -> None:
    for generator in torch.cuda.default_generators:
        generator.manual_seed(torch.default_generator.initial_seed())


@functools.cache
def _seed_devices_when_initialized() -> None:
    """When torch initializes CUDA, let it seed the GPUs' generators with the seed that the CPU's generator has then."""
    torch.cuda._lazy_call(_seed_devices)  # type: ignore[no-untyped-call]


class DrawDetector:
    """Detects draws from Python's `random` and from numpy's global generator.

    Reading a generator's complete state takes 10 (Python) to 30 (numpy) microseconds, so their states are read directly
    from memory. CPython doesn't document where a generator has its state, so the address is searched for.
    """

    def __init__(self) -> None:
        self._generator: Any = None
        address = _address_of_python_state()
        self._python = None if address is None else _Words.from_address(address)  # the index, and the first two words

    def marks(self) -> tuple[object, object]:
        """Return a mark of Python's generator and one of numpy's. A draw changes the generator's mark."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self._generator:
            address = generator.ctypes.state_address  # of MT19937's 624 words, and its position
            self._generator = generator
            self._numpy = _Words.from_address(address), ctypes.c_int.from_address(address + 624 * 4)
        words, position = self._numpy
        return self._python_mark(), (words.raw, position.value)

    def _python_mark(self) -> object:
        if self._python is None:
            _, all_words, gauss = random.getstate()
            return all_words[-1], all_words[1], gauss
        return self._python.raw, _PYTHON.gauss_next


_Words = ctypes.c_char * 12
"""Three words of a generator's state. The position counts the draws since all words were last replaced. The first word
has few values, so a mark needs the second one, too.
"""

_PYTHON: Any = getattr(random.seed, "__self__", None)
"""The generator that the functions of Python's `random` use."""


def _address_of_python_state() -> int | None:
    """Return the address of the state of Python's generator, an index followed by words; None if it isn't there."""
    if type(_PYTHON) is not random.Random:
        return None
    *words, index = _PYTHON.getstate()[1]
    raw = ctypes.string_at(id(_PYTHON), random.Random.__basicsize__)
    place = raw.find(struct.pack("=i624I", index, *words))
    return None if place < 0 else id(_PYTHON) + place


@dataclass(frozen=True)
class GeneratorsState:
    """States of Python's `random`, numpy's global generator, and torch's on the CPU and on every device in use."""

    python: Any
    arrays: Any
    tensors: Tensor
    devices: list[Tensor] | None

    def equals(self, other: GeneratorsState) -> bool:
        """Return True if no generator was used between the two states."""
        return (
            self.python == other.python
            and all(map(np.array_equal, self.arrays, other.arrays))
            and torch.equal(self.tensors, other.tensors)
            and all(map(torch.equal, self.devices or [], other.devices or []))
        )


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
