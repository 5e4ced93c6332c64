"""Decides when snapshots are taken, and takes them."""

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
from manyhands.comm.agreement import all_gather_json
from manyhands.formatting import format_bytes
from manyhands.offload.process_memory import free_memory_bytes
from manyhands.training.engine import Engine

SNAPSHOT_EVERY_VARIABLE = "MANYHANDS_SNAPSHOT_EVERY"
"""The environment variable with which the launcher may set the number of steps between snapshots."""

MAX_TIME_SHARE = 0.02
"""The share of the run time that snapshots may cost, unless their interval is set."""

MAX_MEMORY_SHARE = 0.5
"""The share of free memory that the two snapshots may take. Memory that their slots already hold counts as free."""

# Counts the trainings of this process. A restarted script runs the same trainings in the same order, so the number
# identifies a training across restarts.
_trainings = itertools.count()


class Snapshots:
    """The snapshots of a run, if the launcher has memory for them and started all workers.

    All methods but `newest_step` and `are_taken` are collective.

    run_dir: the run directory, if there is one. Together with the number of the training in this process, it identifies
    the training that snapshots belong to. report: called with messages for people. State on a disk is not copied to
    snapshots: it is on the disk because it does not fit in memory.
    """

    def __init__(self, engine: Engine, run_dir: Path | None, report: Callable[[str], None]) -> None:
        self._engine, self._report = engine, report
        address = os.environ.get(SNAPSHOT_MEMORY_VARIABLE, "")
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        self._memory: SnapshotMemory | None = None
        mine = Training(next(_trainings), "" if run_dir is None else str(run_dir.absolute()))
        # The state of islands is saved after their turns instead.
        if address and one_host and not engine.allocator.on_disk and engine.recipe.islands is None:
            # Use worker 0's value: all workers must find the same snapshots, even if their paths to the run directory
            # differ.
            all_ranks: list[Any] = all_gather_json(engine.group, mine, "start / snapshots / control")
            self._memory = SnapshotMemory.at(address, Training(*all_ranks[0]))
        fixed = os.environ.get(SNAPSHOT_EVERY_VARIABLE)
        self._every = None if fixed is None else int(fixed)
        self._taken = 0
        self._next_step: int | None = None  # None: after the next step
        self._last_step, self._last_seconds = engine.step_index, time.monotonic()

    @property
    def are_taken(self) -> bool:
        """Return True if there is memory for snapshots."""
        return self._memory is not None

    def newest_step(self) -> int | None:
        """Return the step of the newest snapshot, or None if there is none."""
        newest = None if self._memory is None else self._memory.newest()
        return None if newest is None else newest.manifest.step

    def load(self) -> Manifest | None:
        """Load the newest snapshot into the engine, if there is one."""
        return None if self._memory is None else self._engine.load_snapshot(self._memory)

    def after_step(self, digest: str | None, *, last: bool) -> None:
        """Take a snapshot if one is due, except after the last step. digest: the digest of the weights, if known."""
        step = self._engine.step_index
        of = None if self._memory is None else self._memory.of
        if self._memory is not None and of is not None and last and not of.directory:
            # Free the snapshots of a completed training: a restarted script may skip this training, and the next one
            # would load them as its own. Wait first until all workers have completed the step.
            all_gather_json(self._engine.group, None, f"step {step} / last snapshot / control")
            if self._engine.group.rank == 0:
                self._memory.free()
        if self._memory is None or last or (self._next_step is not None and step < self._next_step):
            return
        if not self._taken and not self._has_room(self._memory):
            if self._engine.group.rank == 0:
                self._memory.free()
            self._memory = None
            return
        started = time.monotonic()
        take_snapshot(self._engine, self._memory, digest)
        now = time.monotonic()
        cost = now - started
        step_seconds = (started - self._last_seconds) / max(1, step - self._last_step)
        mine = [cost, step_seconds]
        all_ranks: list[Any] = all_gather_json(self._engine.group, mine, f"step {step} / snapshot / control")
        self._taken += 1
        self._next_step = step + self._interval(*zip(*all_ranks, strict=True))
        self._last_step, self._last_seconds = step, now

    def _interval(self, costs: Iterable[float], steps: Iterable[float]) -> int:
        if self._every is not None:
            return self._every
        # The first snapshot in each of the two slots includes page faults, so its cost is not representative.
        return 1 if self._taken < 3 else max(1, math.ceil(max(costs) / (MAX_TIME_SHARE * max(max(steps), 1e-6))))

    def _has_room(self, memory: SnapshotMemory) -> bool:
        # Memory that earlier workers' snapshots hold will be overwritten, so it counts as free.
        mine = [snapshot_bytes(self._engine), free_memory_bytes() + memory.held_bytes()]
        all_ranks: list[Any] = all_gather_json(self._engine.group, mine, "start / snapshot memory / control")
        needed, free = 2 * sum(size for size, _ in all_ranks), min(free for _, free in all_ranks)
        if needed <= MAX_MEMORY_SHARE * free:
            return True
        self._report(
            f"no snapshots in memory: they would take {format_bytes(needed)} of {format_bytes(free)} free memory; "
            "after a failure the run resumes from its last checkpoint"
        )
        return False
