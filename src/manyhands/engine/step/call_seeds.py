"""Seeds random generators behind every call of a unit.

So the numbers that a part of the model draws don't depend on how many numbers the parts before it drew. A worker that
computes only some of the units draws the same numbers as one that computes all of them.

The seed is derived from the seed that was in effect when the call began, and from the unit's name. All calls of a
micro-batch thus form a chain, which starts with a seed derived from (run seed, step, micro-batch). torch's generator
knows its own seed, and activation checkpointing restores it before it calls units again. So a recomputed call is
followed by the same seed as the original call, and calls don't have to be counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import DrawDetector, seed_generators, seed_numpy, seed_torch


class CallSeeds:
    """Seeds generators behind the calls of units, as long as a micro-batch is computed.

    torch's generators are seeded behind each call. Python's and numpy's are seeded only behind a call that drew from
    them, since looking after them costs more.
    """

    def __init__(self) -> None:
        self._detector = DrawDetector()
        self._active = False
        self._depth = 0
        self._seed = 0
        self._marks: tuple[object, object] = (None, None)

    @contextmanager
    def micro_batch(self, seed: int) -> Iterator[None]:
        """Seed all generators with `seed`, and seed them behind each call in this block."""
        seed_generators(seed)
        self._active, self._depth = True, 0
        try:
            yield
        finally:
            self._active = False

    def enter(self) -> None:
        """Called before the forward of a unit."""
        if not self._active or torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth == 1:  # a unit that another one calls is a part of it
            self._seed, self._marks = torch.default_generator.initial_seed(), self._detector.marks()

    def leave(self, name: str, _: object) -> None:
        """Called after the forward of the unit of this name."""
        if not self._active or torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0:
            seed = derive(self._seed, "unit call", name)
            seed_torch(seed)
            python, numpy = self._detector.marks()
            if python != self._marks[0]:
                random.seed(seed)
            if numpy != self._marks[1]:
                seed_numpy(seed)
