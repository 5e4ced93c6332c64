"""When snapshots and checkpoints are taken."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from manyhands.checkpoint.format import Manifest
from manyhands.checkpoint.snapshot import (
    SNAPSHOT_MEMORY_VARIABLE,
    SnapshotMemory,
    Training,
    snapshot_bytes,
    take_snapshot,
)
from manyhands.engine.agreement import all_gather_json
from manyhands.formatting import format_bytes
from manyhands.offload.process_memory import free_memory_bytes
from manyhands.training.engine import Engine

SNAPSHOT_EVERY_VARIABLE = "MANYHANDS_SNAPSHOT_EVERY"
"""Steps between snapshots, if the parent says."""

MOST_OF_TIME = 0.02
"""What snapshots may cost, unless it's said how often they're taken."""

MOST_OF_MEMORY = 0.5
"""Of what is free, or in the slots already, what both may take."""

_trainings = itertools.count()  # of this process: started again, a script makes the same ones in the same order


class Snapshots:
    """A run's, if the workers' parent has memory for them, and all workers are its own. Collective, but `newest_step`.

    run_dir: of the run, if it has one: with the number of the training in this process it says whose snapshots are.
    tell: what a person should know. Nothing is kept of state that lives on a disk: it's there not to be in memory.
    """

    def __init__(self, engine: Engine, run_dir: Path | None, tell: Callable[[str], None]) -> None:
        self._engine, self._tell = engine, tell
        address = os.environ.get(SNAPSHOT_MEMORY_VARIABLE, "")
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        self._memory: SnapshotMemory | None = None
        mine = Training(next(_trainings), "" if run_dir is None else str(run_dir.absolute()))
        if address and one_host and not engine.allocator.on_disk:
            # Worker 0's word counts: all must find the same ones, also where a directory has another name for each.
            everyone: list[Any] = all_gather_json(engine.group, mine, "start / snapshots / control")
            self._memory = SnapshotMemory.at(address, Training(*everyone[0]))
        fixed = os.environ.get(SNAPSHOT_EVERY_VARIABLE)
        self._every = None if fixed is None else int(fixed)
        self._taken = 0
        self._next_step: int | None = None  # None: after the next one, whichever that is
        self._last_step, self._last_seconds = engine.step_index, time.monotonic()

    def newest_step(self) -> int | None:
        """After how many steps the last one was taken."""
        newest = None if self._memory is None else self._memory.newest()
        return None if newest is None else newest.manifest.step

    def load(self) -> Manifest | None:
        """Go on from the last one, if there is one."""
        return None if self._memory is None else self._engine.load_snapshot(self._memory)

    def after_step(self, digest: str | None, *, last: bool) -> None:
        """Take one, if it's time (after the last step there's nothing to lose). digest: of the weights, if known."""
        step = self._engine.step_index
        of = None if self._memory is None else self._memory.of
        if self._memory is not None and of is not None and last and not of.directory:
            # A script that is started again may leave this training out: the next one would take them for its own.
            all_gather_json(
                self._engine.group, None, f"step {step} / last snapshot / control"
            )  # all have made the step
            if self._engine.group.rank == 0:
                self._memory.free()
        if self._memory is None or last or (self._next_step is not None and step < self._next_step):
            return
        if not self._taken and not self._find_room(self._memory):
            if self._engine.group.rank == 0:
                self._memory.free()
            self._memory = None
            return
        began = time.monotonic()
        take_snapshot(self._engine, self._memory, digest)
        now = time.monotonic()
        costs = now - began
        a_step = (began - self._last_seconds) / max(1, step - self._last_step)
        everyone: list[Any] = all_gather_json(self._engine.group, [costs, a_step], f"step {step} / snapshot / control")
        self._taken += 1
        self._next_step = step + self._interval(*zip(*everyone, strict=True))
        self._last_step, self._last_seconds = step, now

    def _interval(self, costs: Iterable[float], steps: Iterable[float]) -> int:
        if self._every is not None:
            return self._every
        # The first one in a slot has the kernel find memory for it: what it costs says little.
        return 1 if self._taken < 3 else max(1, math.ceil(max(costs) / (MOST_OF_TIME * max(max(steps), 1e-6))))

    def _find_room(self, memory: SnapshotMemory) -> bool:
        # What the slots hold of the workers before these is overwritten: it's no longer free, and needn't be.
        mine = [snapshot_bytes(self._engine), free_memory_bytes() + memory.held_bytes()]
        everyone: list[Any] = all_gather_json(self._engine.group, mine, "start / snapshot memory / control")
        needed, free = 2 * sum(size for size, _ in everyone), min(free for _, free in everyone)
        if needed <= MOST_OF_MEMORY * free:
            return True
        self._tell(
            f"no snapshots in memory: they would take {format_bytes(needed)} of {format_bytes(free)} that are free; "
            "after a failure the run goes on from its last checkpoint"
        )
        return False
