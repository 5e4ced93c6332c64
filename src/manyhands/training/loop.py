"""The loop: steps from where the run stands to where it shall end, recorded, saved, shown."""

from __future__ import annotations

import io
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manyhands.checkpoint.format import list_checkpoints
from manyhands.config import Recipe, Strategy
from manyhands.engine.control import gather_json
from manyhands.engine.metrics import StepMetrics
from manyhands.errors import CheckpointError, ConfigError, Interrupted
from manyhands.numerics.identity import numerics_identity
from manyhands.numerics.seeds import derive, preserved_generators, seed_generators
from manyhands.offload.scratch import scratch_line
from manyhands.report.progress import TrainingProgress
from manyhands.report.run_directory import RunDirectory, write_json
from manyhands.report.summary import Summary, figures
from manyhands.report.tensorboard import TensorBoardLog
from manyhands.training.engine import Engine
from manyhands.training.memory import PeakMemory
from manyhands.training.stop import StopSignals

MEASURED_STEPS = 3
"""Memory is measured in the first steps (the first makes the optimizer's state), so that it costs nothing later."""


def train(  # noqa: PLR0913  (each argument is a wish of its own about one run)
    recipe: Recipe,
    *,
    steps: int,
    strategy: Strategy | None = None,
    run_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 3,
    digest_every: int = 10,
    accept_new_numerics: bool = False,
    show: bool = True,
    recipe_as_used: dict[str, Any] | None = None,
    stop: StopSignals | None = None,
) -> Summary:
    """Train until `steps` steps have been made altogether. Collective: every worker calls it alike.

    run_dir: where figures and checkpoints go; one that holds checkpoints of this recipe is gone on with. None: nothing
    is written. checkpoint_every: steps between checkpoints (one is written at the end in any case);
    keep_checkpoints: how many stay. digest_every: steps between digests (the last step has one in any case).
    show: a progress bar on worker 0. recipe_as_used, stop: for the command line.

    Returns the run's summary: `summary.digest`, `summary.last_loss`, ... Raises ConfigError, DataError, NumericsError,
    CheckpointError, WorkerError, and Interrupted after Ctrl-C.
    """
    if steps < 1 or digest_every < 1 or keep_checkpoints < 1 or (checkpoint_every is not None and checkpoint_every < 1):
        raise ConfigError(
            "steps, digest_every, checkpoint_every and keep_checkpoints count from 1",
            got=f"{steps}, {digest_every}, {checkpoint_every}, {keep_checkpoints}",
        )
    began = time.monotonic()
    with ExitStack() as stack:
        signals = stop or stack.enter_context(StopSignals())
        engine = stack.enter_context(Engine(recipe, _with_scratch(strategy or Strategy(), run_dir)))
        record = _Record(engine, run_dir, recipe_as_used, stack)
        record.resume(accept_new_numerics)
        bars = record.bars(steps, show)
        memory = PeakMemory()
        first = engine.step_index
        signals.training_begins()
        for batch in engine.batches(steps):
            step = engine.step_index
            digest_wanted = (step + 1) % digest_every == 0 or step + 1 == steps
            with ExitStack() as watched:
                if step - first < MEASURED_STEPS:
                    watched.enter_context(memory)
                engine.stop_wanted = signals.wanted
                metrics = engine.step(batch, digest=digest_wanted)
            record.add(metrics)
            for bar in bars:
                bar.update(metrics)
            if engine.stop_wanted:
                raise _interrupted(engine, record, keep_checkpoints)
            if checkpoint_every is not None and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                record.save(keep_checkpoints)
        record.save(keep_checkpoints)
        return _summary(engine, record, memory.peak_bytes, time.monotonic() - began)


class _Record:
    """What a run leaves behind, if it has a directory: worker 0 writes, all save."""

    def __init__(
        self, engine: Engine, run_dir: str | Path | None, recipe_as_used: dict[str, Any] | None, stack: ExitStack
    ) -> None:
        self.engine, self.path = engine, None if run_dir is None else Path(run_dir)
        self.metrics: list[StepMetrics] = []
        self.notes: list[str] = []
        self.log: Console | None = None  # worker 0's; the others' output goes to theirs
        self._directory: RunDirectory | None = None
        self._recipe_as_used = recipe_as_used
        self._tensorboard: TensorBoardLog | None = None
        self._stack = stack
        if self.path is not None and engine.group.rank == 0:
            self._directory = RunDirectory(self.path)
            self.log = Console(file=stack.enter_context(self._directory.log(0).open("a")), width=120)
        if engine.home.scratch is not None:
            self.notes.append(scratch_line(engine.home.scratch))
        engine.group.barrier("start / run directory / control")

    def resume(self, accept_new_numerics: bool) -> None:
        """Go on from the directory's last checkpoint, if there is one; then begin to write. Collective."""
        if self.path is None:
            return
        found = [str(path) for _, path in list_checkpoints(self.path / "checkpoints")]
        everyone: list[Any] = gather_json(self.engine.group, found, "start / resume / control")
        last = [paths[-1] if paths else None for paths in everyone]
        if len(set(last)) > 1:
            raise CheckpointError(
                "the workers don't see the same checkpoints",
                got=last,
                hint="put run_dir on a file system that all hosts share",
            )
        if last[0] is not None:
            self.engine.load(last[0], accept_new_numerics=accept_new_numerics)
            self.notes.append(f"going on from step {self.engine.step_index} ({last[0]})")
        if self._directory is None:
            return
        engine, directory = self.engine, self._directory
        directory.truncate_metrics(engine.step_index)
        self.metrics = directory.read_metrics()
        directory.write_manifest(
            numerics_identity(engine.group.device, engine.recipe.threads_per_worker),
            engine.strategy,
            workers=engine.group.size,
            group=engine.group.kind,
        )
        directory.write_recipe(self._recipe_as_used or engine.recipe)
        write_json(directory.digests / "parameters.json", {"parameters": engine.digest_names})
        self._tensorboard = self._stack.enter_context(TensorBoardLog(directory.tensorboard, engine.step_index))

    def bars(self, steps: int, show: bool) -> list[TrainingProgress]:
        """Where worker 0 tells how far the run is: on the terminal if `show`, and in its log."""
        if self.engine.group.rank != 0 or self.engine.step_index >= steps:
            return []
        consoles = ([None] if show else []) + ([self.log] if self.log is not None else [])
        start = self.engine.step_index
        bars = [self._stack.enter_context(TrainingProgress(steps, start, console)) for console in consoles]
        for bar, note in product(bars, self.notes):
            bar.note(note)
        return bars

    def add(self, metrics: StepMetrics) -> None:
        """A step was made."""
        if self.engine.group.rank != 0:
            return
        self.metrics.append(metrics)
        if self._directory is not None:
            self._directory.append_metrics(metrics)
            if metrics.digest is not None and self.engine.last_hashes is not None:
                table = io.BytesIO()
                np.save(table, self.engine.last_hashes)
                (self._directory.digests / f"step-{metrics.step + 1:08d}.npy").write_bytes(table.getvalue())
        if self._tensorboard is not None:
            self._tensorboard.write(metrics)

    def save(self, keep: int) -> Path | None:
        """Write a checkpoint, if there is a directory. Collective."""
        return None if self.path is None else self.engine.save(self.path / "checkpoints", keep=keep)


def _with_scratch(strategy: Strategy, run_dir: str | Path | None) -> Strategy:
    """Files that state lives in are the run's own, unless the strategy says otherwise."""
    if strategy.home != "disk" or strategy.scratch or run_dir is None:
        return strategy
    return replace(strategy, scratch=str(Path(run_dir) / "scratch"))


def _interrupted(engine: Engine, record: _Record, keep: int) -> Interrupted:
    checkpoint = record.save(keep)
    return Interrupted(
        f"stopped after step {engine.step_index}, as asked",
        where=f"checkpoint {checkpoint}" if checkpoint else "no checkpoint was written: the run has no directory",
        hint="start it again with the same run directory to go on, with any number of workers" if checkpoint else None,
    )


def _summary(engine: Engine, record: _Record, peak_bytes: int, wall_seconds: float) -> Summary:
    group, recipe = engine.group, engine.recipe
    group.status("end / summary")
    peaks: list[Any] = gather_json(group, peak_bytes, "end / memory / control")
    digest = engine.digest()
    sample = None
    if recipe.sample is not None:
        with engine.evaluating() as model, preserved_generators():
            if group.rank == 0:
                seed_generators(derive(recipe.seed, "sample"))
                sample = recipe.sample(model)
        group.barrier("end / sample / control")
    return Summary(
        **figures(record.metrics)._asdict(),
        name=recipe.name,
        peak_memory_bytes_per_worker=peaks,
        workers=group.size,
        stage=engine.strategy.stage,
        group=group.kind,
        precision=recipe.precision,
        parameters=sum(param.numel() for param in engine.model.parameters()),
        sample=sample,
        digest=digest,
        run_dir="" if record.path is None else str(record.path),
        wall_seconds=wall_seconds,
    )
