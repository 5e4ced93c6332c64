"""Resumes a run and records it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manyhands.checkpoint.format import checkpoints_of, list_checkpoints
from manyhands.checkpoint.publish import check_writable
from manyhands.config import Every
from manyhands.engine.agreement import all_gather_json
from manyhands.engine.step.metrics import StepMetrics
from manyhands.errors import CheckpointError, ConfigError
from manyhands.listeners.run_directory import RunDirectory, write_json
from manyhands.listeners.tensorboard import TensorBoardLog
from manyhands.listeners.terminal import TrainingProgress
from manyhands.offload.scratch import scratch_line
from manyhands.storage.location import Location, is_local, location_of
from manyhands.storage.run_lock import run_lock
from manyhands.training.engine import Engine
from manyhands.training.saving import Snapshots

RETRY_SECONDS = 5
"""Before the last checkpoint is tried again."""


def will_resume(run_dir: str | Path | None, checkpoint_dir: str | Location | None) -> bool:
    """Whether there is a checkpoint to go on from, as far as this worker sees: the record asks all."""
    place = _place_for(run_dir, checkpoint_dir)
    try:
        return place is not None and bool(list_checkpoints(place))
    except CheckpointError:  # the record will say so, to all
        return False


def _place_for(run_dir: str | Path | None, checkpoint_dir: str | Location | None) -> Location | None:
    if run_dir is None:
        return None if checkpoint_dir is None else location_of(checkpoint_dir)
    return checkpoints_of(Path(run_dir), checkpoint_dir)


class Record:
    """What a run leaves behind, if it has a directory: worker 0 writes, all save. checkpoints: where, if anywhere."""

    def __init__(
        self,
        engine: Engine,
        run_dir: str | Path | None,
        checkpoint_dir: str | Location | None,
        recipe_as_used: dict[str, Any] | None,
        stack: ExitStack,
    ) -> None:
        self.engine, self.path = engine, None if run_dir is None else Path(run_dir)
        self.checkpoints = _place_for(run_dir, checkpoint_dir)
        self._kept_before = None if self.path is None else checkpoints_of(self.path)
        self.metrics: list[StepMetrics] = []
        self.notes: list[str] = []
        self.log: Console | None = None  # worker 0's; the others' output goes to theirs
        self._directory: RunDirectory | None = None
        self._recipe_as_used = recipe_as_used
        self._tensorboard: TensorBoardLog | None = None
        self._bars: list[TrainingProgress] = []
        self.snapshots = Snapshots(engine, self.path, self.tell)
        self._stack = stack
        if self.path is not None and engine.group.rank == 0:
            self._directory = RunDirectory(self.path)
            if recipe_as_used is None:  # else it's the command line's, which has the directory already
                stack.enter_context(run_lock(self.path))
            self.log = Console(file=stack.enter_context(self._directory.log(0).open("a")), width=120)
        if self.checkpoints is not None and engine.group.rank == 0:
            check_writable(self.checkpoints)
        if engine.allocator.scratch is not None:
            self.notes.append(scratch_line(engine.allocator.scratch))
        # The directory may be on worker 0's host alone; where it says that checkpoints are, all hosts can see.
        everyone: list[Any] = all_gather_json(
            engine.group, str(self.checkpoints or ""), "start / run directory / control"
        )
        if not is_local(everyone[0]):
            self.checkpoints = location_of(everyone[0])

    def resume(self, accept_new_numerics: bool) -> None:
        """Go on from the last state that there is: a snapshot, or the directory's last checkpoint. Then begin to write.
        Collective."""
        listed = [] if self.checkpoints is None else list_checkpoints(self.checkpoints)
        found, step = [str(path) for _, path in listed], max((step for step, _ in listed), default=0)
        newest = self.snapshots.newest_step()
        everyone: list[Any] = all_gather_json(self.engine.group, found, "start / resume / control")
        last = [paths[-1] if paths else None for paths in everyone]
        if len(set(last)) > 1:
            raise CheckpointError(
                "the workers don't see the same checkpoints",
                got=last,
                hint="put checkpoints where all hosts see them: on a file system that they share, or in a store",
            )
        source = None
        if newest is not None and newest >= step:
            source = "snapshot"
            self.snapshots.load()
            self.notes.append(f"going on from step {self.engine.step_index} (a snapshot in memory)")
        elif last[0] is not None:
            source = "checkpoint"
            self._load(found, accept_new_numerics)
            self.notes.append(f"going on from step {self.engine.step_index} ({last[0]})")
        elif self._kept_before not in (None, self.checkpoints) and list_checkpoints(self._kept_before):
            raise ConfigError(
                "the run has its checkpoints elsewhere, and none here",
                where=str(self.checkpoints),
                expected=str(self._kept_before),
                hint="name that place, or none, as the run directory remembers it; or copy them here first",
            )
        elif self.engine.recipe.initial_weights is not None:
            self.notes.append(f"beginning with the weights of {self.engine.recipe.initial_weights.path}")
        if self._directory is None:
            return
        engine, directory = self.engine, self._directory
        repeats = sum(metrics.step >= engine.step_index for metrics in directory.read_metrics())
        directory.truncate_metrics(engine.step_index)
        self.metrics = directory.read_metrics()
        self.event(
            "began",
            step=engine.step_index,
            source=source,
            repeats=repeats,
            workers=engine.group.size,
            sharding=engine.strategy.sharding,
        )
        directory.write_manifest(
            engine.identity,
            engine.strategy,
            workers=engine.group.size,
            transport=engine.group.kind,
            **self._elsewhere(),
        )
        directory.write_recipe(self._recipe_as_used or engine.recipe)
        write_json(directory.digests / "parameters.json", {"parameters": engine.digest_names})
        self._tensorboard = self._stack.enter_context(TensorBoardLog(directory.tensorboard, engine.step_index))

    def _elsewhere(self) -> dict[str, str]:
        """Where checkpoints are, if that isn't in the directory itself, which may be moved."""
        place = self.checkpoints
        is_own = self.path is not None and place == self.path / "checkpoints"
        return {} if place is None or is_own else {"checkpoints": str(place.absolute())}

    def _load(self, found: list[str], accept_new_numerics: bool) -> None:
        """The last one; of a damaged one it's told how to go on from the one before."""
        try:
            self.engine.load(found[-1], accept_new_numerics=accept_new_numerics)
        except CheckpointError as error:
            if len(found) > 1:
                way = f"to go on from the one before, {found[-2]}, remove {found[-1]}"
                error.hint = f"{error.hint}; {way}" if error.hint else way
            raise

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
        """Something happened, for people."""
        for bar in self._bars:
            bar.note(text)

    def event(self, event: str, **facts: Any) -> None:
        """Something happened, for the run's directory."""
        if self._directory is not None:
            self._directory.append_event(event, **facts)

    def read_events(self) -> list[dict[str, Any]]:
        """All that has happened to the run so far (on worker 0)."""
        return [] if self._directory is None else self._directory.read_events()

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


class Saver:
    """Writes a run's checkpoints, if it has a place for them."""

    def __init__(self, record: Record, often: Every, keep: int, keep_every: int | None) -> None:
        self._record, self._engine, self._often = record, record.engine, often
        self._keep, self._keep_every = keep, keep_every
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether this worker wants one after the next step. Clocks differ: worker 0's is asked."""
        if self._often.seconds is not None:
            return self._engine.group.rank == 0 and time.monotonic() - self._last >= self._often.seconds
        return self._often.steps is not None and (self._engine.step_index + 1) % self._often.steps == 0

    def after_step(self, digest: str | None, *, last: bool) -> None:
        """A snapshot is taken, if it's time; a checkpoint is begun if someone wanted it before the step (after the last
        one `finish` comes); that the one before couldn't be written is told. digest: of the weights, if known.
        Collective."""
        self._record.snapshots.after_step(digest, last=last)
        if not self._engine.save_requested or last:
            return
        self._last = time.monotonic()
        if self._record.checkpoints is None:
            return
        for save in (self._engine.finish_save, partial(self._write, self._engine.begin_save)):
            try:
                save()
            except CheckpointError as error:
                self._record.event("not saved", why=error.what, where=error.where)
                self._record.tell(f"training goes on, but {error}")

    def _write(self, save: Callable[..., Location | None]) -> Location | None:
        step = self._engine.step_index
        return save(
            self._record.checkpoints,
            keep=self._keep,
            keep_every=self._keep_every,
            published=lambda _: self._record.event("saved", step=step),
        )

    def finish(self) -> Location | None:
        """Write one of the state as it is, and wait for it. Collective; raises CheckpointError."""
        if self._record.checkpoints is None:
            return None
        for last_try in (False, True):
            try:
                return self._write(self._engine.save)
            except CheckpointError as error:
                self._record.event("not saved", why=error.what, where=error.where)
                if last_try:
                    raise
                self._record.tell(f"once more in {RETRY_SECONDS} seconds: {error}")
                time.sleep(RETRY_SECONDS)
        return None
