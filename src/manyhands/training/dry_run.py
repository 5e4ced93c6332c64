"""Tries a run out: two steps, validations and a checkpoint, of which nothing is kept."""

from __future__ import annotations

import math
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.comm.agreement import all_gather_json
from manyhands.config import Recipe, Strategy
from manyhands.errors import ConfigError
from manyhands.formatting import format_bytes, format_count, format_seconds
from manyhands.intervals import check_length
from manyhands.offload.process_memory import PeakMemory
from manyhands.output import say
from manyhands.training.engine import Engine
from manyhands.training.given_recipe import check_given_recipe

STEPS = 2
"""The number of steps. The first one also allocates and compiles, so the time of the last one is the estimate."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The results of a dry run.

    steps: the number of steps of the complete run. first_step_seconds, step_seconds: the time of the first step, which
    also allocates memory and compiles, and of the second one. loss: the loss of the first step. validation_seconds:
    the estimated time of one validation of each set, from one micro-batch of each worker. checkpoint_bytes,
    checkpoint_seconds: the size of the checkpoint with frozen parameters, and the time to write it.
    peak_memory_bytes_per_worker: the largest memory of each worker. parameters: the number of parameter elements.
    """

    steps: int
    loss: float
    first_step_seconds: float
    step_seconds: float
    validation_seconds: dict[str, float]
    checkpoint_bytes: int
    checkpoint_seconds: float
    peak_memory_bytes_per_worker: list[int]
    parameters: int

    @property
    def total_seconds(self) -> float:
        """Return the estimated time of all steps, without validations and checkpoints."""
        return self.first_step_seconds + (self.steps - 1) * self.step_seconds

    def __str__(self) -> str:
        """Describe the results for people."""
        memory, workers = self.peak_memory_bytes_per_worker, len(self.peak_memory_bytes_per_worker)
        lines = [
            "dry run: nothing is kept",
            f"  parameters  {format_count(self.parameters)}, loss of the first step {self.loss:.4f}",
            f"  time        {format_seconds(self.step_seconds)} per step (the first one "
            f"{format_seconds(self.first_step_seconds)}); about {format_seconds(self.total_seconds)} for "
            f"{self.steps:,} step{'' if self.steps == 1 else 's'}, without validations and checkpoints",
            f"  memory      at most {format_bytes(max(memory))} per worker, {format_bytes(sum(memory))} in "
            f"{workers} worker{'' if workers == 1 else 's'}",
            *(
                f"  validation  {name}: about {format_seconds(seconds)} each time"
                for name, seconds in self.validation_seconds.items()
            ),
            f"  checkpoint  {format_bytes(self.checkpoint_bytes)}, "
            f"written in {format_seconds(self.checkpoint_seconds)}",
        ]
        return "\n".join(lines)


def dry_run(
    recipe: Recipe,
    *,
    steps: int | None = None,
    strategy: Strategy | None = None,
    folder: str | Path | None = None,
    show: bool = True,
) -> DryRun:
    """Make two steps, one micro-batch of each validation and one checkpoint, and return what they cost. Collective.

    Nothing is kept: the checkpoint is written to a temporary folder, which is deleted. All workers must be on one host.
    steps: the number of steps of the complete run, for the estimate of its time; left out if the recipe sets `epochs`.
    folder: the folder in which the temporary one is created (default: the system's folder for temporary files). show:
    print the results on worker 0. Returns the same results on every worker. Raises ConfigError, DataError,
    NumericsError, CheckpointError.
    """
    check_given_recipe(recipe)
    check_length(steps, recipe.epochs)
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        raise ConfigError(
            "a dry run is made on one host",
            got=f"{os.environ.get('LOCAL_WORLD_SIZE')} of {os.environ.get('WORLD_SIZE')} workers are on this host",
            hint="the temporary checkpoint would have to be on a file system that all hosts share",
        )
    memory = PeakMemory()
    with ExitStack() as stack:
        stack.enter_context(memory)
        engine = stack.enter_context(Engine(recipe, strategy))
        last = engine.epochs.steps(recipe.epochs) if recipe.epochs is not None else steps or 0
        made = [engine.step(batch) for batch in engine.batches(min(STEPS, last))]
        validation_seconds = {name: _validation_seconds(engine, name) for name in recipe.validations}
        is_first = engine.group.rank == 0
        place = ""
        if is_first:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="manyhands-dry-run-", dir=folder))
        all_ranks: list[Any] = all_gather_json(engine.group, place, "dry run / folder / control")
        started = time.monotonic()
        engine.save(all_ranks[0])
        checkpoint_seconds = time.monotonic() - started
        size = _bytes_in(Path(all_ranks[0]))
        mine = [memory.peak_bytes, size, checkpoint_seconds, validation_seconds]
        figures: list[Any] = all_gather_json(engine.group, mine, "dry run / figures / control")
        found = DryRun(
            steps=last,
            loss=made[0].loss,
            first_step_seconds=made[0].step_seconds,
            step_seconds=made[-1].step_seconds,
            validation_seconds=figures[0][3],
            checkpoint_bytes=figures[0][1],
            checkpoint_seconds=figures[0][2],
            peak_memory_bytes_per_worker=[each[0] for each in figures],
            parameters=sum(shape.numel() for shape in engine.param_shapes.values()),
        )
        if show and is_first:
            say(str(found))
    return found


def _validation_seconds(engine: Engine, name: str) -> float:
    """Evaluate one micro-batch of a validation, and return the estimated time of all micro-batches. Collective."""
    found = engine.validate(name, micro_batches=1)
    given = engine.recipe.validations[name]
    samples = min(given.samples or found.samples_in_data, found.samples_in_data)
    micro_batches = math.ceil(samples / max(1, found.samples))
    return found.seconds * math.ceil(micro_batches / engine.group.size)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
