"""The loop: steps from where the run stands to where it shall end, recorded, saved, shown."""

from __future__ import annotations

import io
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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
from manyhands.training.every import Every, every
from manyhands.training.memory import PeakMemory
from manyhands.training.stop import StopSignals

RETRY_SECONDS = 5
"""Before the last checkpoint is tried again."""

MEASURED_STEPS = 3
"""Memory is measured in the first steps (the first makes the optimizer's state), so that it costs nothing later."""


def train(  # noqa: PLR0913  (each argument is a wish of its own about one run)
    recipe: Recipe,
    *,
    steps: int,
    strategy: Strategy | None = None,
    run_dir: str | Path | None = None,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int = 3,
    keep_every: int | None = None,
    digest_every: int = 10,
    accept_new_numerics: bool = False,
    show: bool = True,
    recipe_as_used: dict[str, Any] | None = None,
    stop: StopSignals | None = None,
) -> Summary:
    """Train until `steps` steps have been made altogether. Collective: every worker calls it alike.

    run_dir: where figures and checkpoints go; one that holds checkpoints of this recipe is gone on with. None: nothing
    is written. checkpoint_every: steps (500) or time ("10m") between checkpoints, which are written while training goes
    on (one is written at the end in any case); one that can't be written is told of, and the next one tried.
    keep_checkpoints: how many stay, beside those of every `keep_every`-th step. digest_every: steps between digests
    (the last step has one in any case). show: a progress bar on worker 0. recipe_as_used, stop: for the command line.

    Returns the run's summary: `summary.digest`, `summary.last_loss`, ... Raises ConfigError, DataError, NumericsError,
    CheckpointError, WorkerError, and Interrupted after Ctrl-C.
    """
    if min(steps, digest_every, keep_checkpoints, keep_every or 1) < 1:
        raise ConfigError(
            "steps, digest_every, keep_checkpoints and keep_every count from 1",
            got=f"{steps}, {digest_every}, {keep_checkpoints}, {keep_every}",
        )
    often = Every() if checkpoint_every is None else every(checkpoint_every)
    began = time.monotonic()
    with ExitStack() as stack:
        signals = stop or stack.enter_context(StopSignals())
        engine = stack.enter_context(Engine(recipe, _with_scratch(strategy or Strategy(), run_dir)))
        record = _Record(engine, run_dir, recipe_as_used, stack)
        record.resume(accept_new_numerics)
        record.show(steps, show)
        saver = _Saver(record, often, keep_checkpoints, keep_every)
        memory = PeakMemory()
        first = engine.step_index
        signals.training_begins()
        for batch in engine.batches(steps):
            step = engine.step_index
            digest_wanted = (step + 1) % digest_every == 0 or step + 1 == steps
            with ExitStack() as watched:
                if step - first < MEASURED_STEPS:
                    watched.enter_context(memory)
                engine.stop_wanted, engine.save_wanted = signals.wanted, saver.is_due
                metrics = engine.step(batch, digest=digest_wanted)
            record.add(metrics)
            if engine.stop_wanted:
                raise _interrupted(engine, saver)
            if engine.save_wanted and step + 1 < steps:
                saver.begin()
        saver.finish()
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
        self._bars: list[TrainingProgress] = []
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

    def show(self, steps: int, on_terminal: bool) -> None:
        """From now on worker 0 tells how far the run is: on the terminal if that's wanted, and in its log."""
        if self.engine.group.rank != 0 or self.engine.step_index >= steps:
            return
        consoles = ([None] if on_terminal else []) + ([self.log] if self.log is not None else [])
        start = self.engine.step_index
        self._bars = [self._stack.enter_context(TrainingProgress(steps, start, console)) for console in consoles]
        for note in self.notes:
            self.tell(note)

    def tell(self, text: str) -> None:
        """Something happened."""
        for bar in self._bars:
            bar.note(text)

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
        for bar in self._bars:
            bar.update(metrics)


class _Saver:
    """Writes a run's checkpoints, if it has a directory."""

    def __init__(self, record: _Record, often: Every, keep: int, keep_every: int | None) -> None:
        self._record, self._engine, self._often = record, record.engine, often
        self._keep = {"keep": keep, "keep_every": keep_every}
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether this worker wants one after the next step. Clocks differ: worker 0's is asked."""
        if self._often.seconds is not None:
            return self._engine.group.rank == 0 and time.monotonic() - self._last >= self._often.seconds
        return self._often.steps is not None and (self._engine.step_index + 1) % self._often.steps == 0

    def begin(self) -> None:
        """Begin to write one; that the one before couldn't be written is told. Collective."""
        self._last = time.monotonic()
        if self._record.path is None:
            return
        folder = self._record.path / "checkpoints"
        for save in (self._engine.finish_save, partial(self._engine.begin_save, folder, **self._keep)):
            try:
                save()
            except CheckpointError as error:
                self._record.tell(f"training goes on, but {error}")

    def finish(self) -> Path | None:
        """Write one of the state as it is, and wait for it. Collective; raises CheckpointError."""
        if self._record.path is None:
            return None
        for last_try in (False, True):
            try:
                return self._engine.save(self._record.path / "checkpoints", **self._keep)
            except CheckpointError as error:
                if last_try:
                    raise
                self._record.tell(f"once more in {RETRY_SECONDS} seconds: {error}")
                time.sleep(RETRY_SECONDS)
        return None


def _with_scratch(strategy: Strategy, run_dir: str | Path | None) -> Strategy:
    """Files that state lives in are the run's own, unless the strategy says otherwise."""
    if strategy.home != "disk" or strategy.scratch or run_dir is None:
        return strategy
    return replace(strategy, scratch=str(Path(run_dir) / "scratch"))


def _interrupted(engine: Engine, saver: _Saver) -> Interrupted:
    checkpoint = saver.finish()
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
