"""Seeds the generators, from which dropout draws, again after every call of a unit in a micro-batch.

So the numbers that a part of the model draws don't depend on how many numbers earlier parts drew. A worker that
computes only some of the units draws the same numbers as a worker that computes all units.

The seed is derived from the seed that was in effect when the call began, and from the unit's name. All calls of a
micro-batch thus form a chain, which starts with a seed derived from (run seed, step index, micro-batch). torch's
generator knows its own seed, and activation checkpointing restores it before it calls units again. So a recomputed call
is followed by the same seed as the original call, and calls don't have to be counted.

numerics/seeds.py has the functions that seed the generators, also before each micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from manyhands.numerics.counters import deriving
from manyhands.numerics.seeds import DrawDetector, seed_generators, seed_numpy, seed_torch


class CallSeeds:
    """Seeds generators after the calls of units while a micro-batch is computed.

    torch's generators are seeded after each call. Python's and numpy's generators are seeded only after a call that
    drew from them, because seeding them costs more.
    """

    def __init__(self) -> None:
        self._detector = DrawDetector()
        self._active = False
        self._silent: frozenset[str] = frozenset()
        self._in_progress: list[bool] = []  # for each call that has begun, whether generators are seeded after it
        self._seeded: set[tuple[str, int]] = set()  # the calls of this micro-batch: name, and seed at the start
        self._seed = 0
        self._marks: tuple[object, object] = (None, None)
        self._deriving: dict[str, Callable[[int], int]] = {}  # functions that derive the seed after a call, by name

    @contextmanager
    def micro_batch(self, seed: int, silent: frozenset[str] = frozenset()) -> Iterator[None]:
        """Seed all generators with `seed`, and seed them after each call in this block.

        silent: names of units that draw no random numbers in this block. Nothing is seeded after their calls.
        """
        seed_generators(seed)
        self._active, self._silent = True, silent
        try:
            yield
        finally:
            self._active = False
            self._in_progress.clear()
            self._seeded.clear()

    def enter(self, name: str) -> None:
        """Note that the forward of this unit begins."""
        if not self._active or name in self._silent or torch.compiler.is_compiling():
            return
        outermost = not self._in_progress  # a unit that another unit calls is a part of that unit
        if outermost:
            self._seed, self._marks = torch.default_generator.initial_seed(), self._detector.marks()
            call = (name, self._seed)
            if torch._C._current_graph_task_id() == -1:
                self._seeded.add(call)
            else:
                # Backward recomputes a part of the model. That part may lie inside a unit and call another unit. In
                # forward, the generators were not seeded after that call.
                outermost = call in self._seeded
        self._in_progress.append(outermost)

    def leave(self, name: str, _: object) -> None:
        """Note that the forward of this unit has ended, and seed the generators."""
        if not self._active or name in self._silent or torch.compiler.is_compiling():
            return
        # If another hook raised an error before the forward, there was no `enter`.
        if not self._in_progress or not self._in_progress.pop():
            return
        if name not in self._deriving:
            self._deriving[name] = deriving("unit call", name)
        seed = self._deriving[name](self._seed)
        seed_torch(seed)
        python, numpy = self._detector.marks()
        if python != self._marks[0]:
            random.seed(seed)
        if numpy != self._marks[1]:
            seed_numpy(seed)
