"""Resumes a run, and tells its listeners what happens."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from manyhands.checkpoint.format import checkpoints_of, list_checkpoints, recorded_checkpoints
from manyhands.checkpoint.owner import (
    NO_DIRECTORY,
    Owner,
    check_owner,
    claim,
    refuse_active,
    refuse_other_owner,
    run_in,
)
from manyhands.checkpoint.publish import as_checkpoint_error, check_writable
from manyhands.checkpoint.save import check_schedules
from manyhands.comm.agreement import all_gather_json
from manyhands.engine.step.amendments import Amendments
from manyhands.engine.step.figures import Evaluation
from manyhands.engine.step.metrics import StepMetrics
from manyhands.errors import CheckpointError, ConfigError
from manyhands.listeners.dispatch import Listeners
from manyhands.listeners.gaps import Gaps
from manyhands.listeners.listener import Listener
from manyhands.listeners.recipe_description import describe
from manyhands.listeners.recording import Recording
from manyhands.listeners.run_directory import RunDirectory, events_in, versions, write_json
from manyhands.listeners.summary import StepFigures, Summary, unfinished
from manyhands.listeners.tensorboard import TensorBoardListener
from manyhands.listeners.terminal import TrainingProgress
from manyhands.members.processes import oom_kills
from manyhands.offload.scratch import scratch_line
from manyhands.output import SafeStream, say
from manyhands.storage.json_lines import numbers
from manyhands.storage.location import Location, is_local, location_of
from manyhands.storage.run_lock import run_lock
from manyhands.surroundings import is_restart, launch_id, progress_descriptor
from manyhands.training.engine import Engine
from manyhands.training.provenance import code_of, data_digests, package_versions, with_earlier_code, write_diff
from manyhands.training.snapshotting import Snapshots


def will_resume(run_dir: str | Path | None, checkpoint_dir: str | Location | None) -> bool:
    """Return True if this worker sees a checkpoint to resume from.

    `RunRecord.resume` compares all workers' checkpoints.
    """
    location = _checkpoint_location(run_dir, checkpoint_dir)
    try:
        return location is not None and bool(list_checkpoints(location))
    except CheckpointError:  # resume() reports this on all workers
        return False


def _checkpoint_location(run_dir: str | Path | None, checkpoint_dir: str | Location | None) -> Location | None:
    if run_dir is None:
        return None if checkpoint_dir is None else location_of(checkpoint_dir)
    return checkpoints_of(Path(run_dir), checkpoint_dir)


def _described_weights(engine: Engine) -> str:
    path = None if engine.recipe.initial_weights is None else engine.recipe.initial_weights.path
    source = engine.weights_source or {}
    of_step = f" (step {source['step']}, digest {source['digest']})" if "step" in source else ""
    return f"starting with the weights of {path}{of_step}"


class RunRecord:
    """The record of a run: resumes it, and calls its listeners, which are on worker 0. All workers save checkpoints.

    path: the run directory, or None if nothing is recorded. checkpoints: the folder or address to which checkpoints are
    written, or None. adopt: continue from another run's checkpoints. anew: move the existing record aside, as
    `start_over` does. stack: it is closed after the engine. The listeners then receive `summary`, or a summary of the
    failure.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: str | Path | None,
        checkpoint_dir: str | Location | None,
        recipe_as_used: dict[str, Any] | None,
        stack: ExitStack,
        *,
        adopt: bool = False,
        anew: bool = False,
    ) -> None:
        self.engine, self.path = engine, None if run_dir is None else Path(run_dir)
        self._run = NO_DIRECTORY  # replaced on worker 0, the only worker whose value is used
        self.checkpoints = _checkpoint_location(run_dir, checkpoint_dir)
        self._checkpoints_before = None if self.path is None else recorded_checkpoints(self.path)
        self.figures, self._started = StepFigures(), time.monotonic()
        self.notes: list[str] = []
        # Worker 0's log file; the launcher writes the output of the other workers to their log files.
        self.log: Console | None = None
        self._directory: RunDirectory | None = None
        self._gaps = Gaps(self.report, lambda kind, lost: self.event("not recorded", kind=kind, lost=lost))
        self._recipe_as_used = recipe_as_used
        self._source: str | None = None
        self._description: dict[str, Any] = {}
        self._bars: list[TrainingProgress] = []
        self._is_on_terminal = False
        self.summary: Summary | None = None
        self.snapshots = Snapshots(engine, self.path, self.report)
        self._stack = stack
        if self.path is not None and engine.group.rank == 0:
            self._directory = RunDirectory(self.path)
            if recipe_as_used is None:  # otherwise the command line already holds the lock
                stack.enter_context(run_lock(self.path))
            if anew and self.checkpoints is not None:
                start_over(self.path, self.checkpoints, launch_id())
            log = stack.enter_context(self._directory.open_log(0))
            self.log = Console(file=cast(TextIO, SafeStream(lambda: log)), width=120)
            self._run = run_in(self.path) or Owner(secrets.token_hex(8), str(self.path.absolute()))
        record = [Recording(self._directory, self._gaps, lambda: engine.last_hashes)] if self._directory else []
        self.listeners = Listeners(record, self._warn, self.event)
        if self.checkpoints is not None and engine.group.rank == 0:
            check_writable(self.checkpoints)
            if self.path is None and isinstance(self.checkpoints, Path):
                stack.enter_context(run_lock(self.checkpoints))
            # The user named the place, or no manifest does.
            is_named = checkpoint_dir is not None or self._checkpoints_before is None
            (refuse_active if adopt and is_named else check_owner)(self.checkpoints, self._run)
            check_schedules(engine)
        if engine.allocator.scratch is not None:
            self.notes.append(scratch_line(engine.allocator.scratch))
        # The run directory may exist on worker 0's host only. If its manifest names a store for checkpoints, all hosts
        # use that store.
        all_ranks: list[Any] = all_gather_json(
            engine.group, str(self.checkpoints or ""), "start / run directory / control"
        )
        if not is_local(all_ranks[0]):
            self.checkpoints = location_of(all_ranks[0])

    def amend(self, given: Amendments) -> None:
        """Give the engine the run's amendments so far and the `given` ones. Collective. Call this before `resume`.

        Raises ConfigError.
        """
        mine = given if self._directory is None else self._directory.read_amendments().joined(given)
        all_ranks: list[Any] = all_gather_json(self.engine.group, mine.as_json(), "start / amendments / control")
        self.engine.amend(Amendments.from_json(all_ranks[0]))

    def resume(self, accept_new_numerics: bool) -> None:
        """Load the newest state: a snapshot, or the run's last checkpoint. Then start recording. Collective."""
        listed = [] if self.checkpoints is None else list_checkpoints(self.checkpoints)
        found, step = [str(path) for _, path in listed], max((step for step, _ in listed), default=0)
        newest = self.snapshots.newest_step()
        all_ranks: list[Any] = all_gather_json(self.engine.group, found, "start / resume / control")
        last = [paths[-1] if paths else None for paths in all_ranks]
        if len(set(last)) > 1:
            raise CheckpointError(
                "the workers don't see the same checkpoints",
                got=last,
                hint="put checkpoints where all hosts see them: on a shared file system, or in a store",
            )
        source = None
        if newest is not None and newest >= step:
            source = "snapshot"
            self.snapshots.load()
            self.notes.append(f"resuming after step {self.engine.step_index} (a snapshot in memory)")
        elif last[0] is not None:
            source = "checkpoint"
            self._load(found, accept_new_numerics)
            self.notes.append(f"resuming after step {self.engine.step_index} ({last[0]})")
        elif self._has_saved_elsewhere():
            raise ConfigError(
                "the run's checkpoints are in another location",
                where=str(self.checkpoints),
                expected=self._checkpoints_before or "the folder in the run directory",
                hint="use the recorded location, or copy the checkpoints here first",
            )
        elif self.engine.recipe.initial_weights is not None:
            self.notes.append(_described_weights(self.engine))
        self.notes += self.engine.amendments.described()
        self._check_saved(source)
        self._record_start(source)
        if self.checkpoints is not None and self.engine.group.rank == 0:
            with as_checkpoint_error(self.checkpoints):
                claim(self.checkpoints, self._run)

    def _has_saved_elsewhere(self) -> bool:
        """Return True if the run has checkpoints in a place other than `self.checkpoints`. Addresses aren't opened."""
        if self.path is None or self.checkpoints is None:
            return False
        before = self._checkpoints_before or str((self.path / "checkpoints").absolute())
        if before == str(self.checkpoints.absolute()):
            return False
        if is_local(before):
            return bool(list_checkpoints(Path(before)))
        return any(event["event"] == "saved" for event in self.read_events())

    def _check_saved(self, source: str | None) -> None:
        """On worker 0, compare the state from which the run starts with the last checkpoint that the run recorded.

        Raises ConfigError if the run has saved a checkpoint, but starts from the beginning.
        """
        saved = [
            event["step"]
            for event in self.read_events()
            if event["event"] == "saved" and type(event.get("step")) is int
        ]
        # A checkpoint may lack its event, because the run was killed after the save or the disk was full.
        if not saved or source == "snapshot" or saved[-1] <= self.engine.step_index:
            return
        if source is None:
            raise ConfigError(
                "the run's checkpoints are gone",
                where=str(self.checkpoints),
                expected=f"the checkpoint of step {saved[-1]}, which the run has saved",
                got="no checkpoint",
                hint="move them back, or give their new place as checkpoint_dir; to begin the run anew, use "
                "--start-over (start_over=True), which moves its metrics and events to a subfolder",
            )
        self.notes.append(
            f"the checkpoint of step {saved[-1]}, which the run has saved, is missing: steps are repeated"
        )

    def _record_start(self, source: str | None) -> None:
        """On worker 0, note that the run starts or continues here. source: "snapshot", "checkpoint" or None.

        Raises ConfigError if a new run or new amendments can't be recorded. Otherwise, a run that is resumed continues
        without the record.
        """
        self._source = source
        if self._directory is None:
            return
        engine, directory = self.engine, self._directory
        # Amendments decide results, so they are not a part of the record that may be missing.
        if engine.amendments != directory.read_amendments():
            directory.write_amendments(engine.amendments)
        repeats = sum(metrics.step > engine.step_index for metrics in directory.read_metrics())
        if engine.recipe.islands is None:  # islands don't repeat all steps, see `last_steps`
            directory.truncate_metrics(engine.step_index)
        directory.truncate_validations(
            engine.step_index, validated=engine.progress.get("validated") == engine.step_index
        )
        self.figures = StepFigures(directory.read_metrics())
        self.event(
            "started",
            step=engine.step_index,
            source=source,
            repeats=repeats,
            host=socket.gethostname(),
            oom_kills=oom_kills(),
            workers=engine.group.size,
            sharding=engine.strategy.sharding,
        )
        if source is None:
            self._write_settings(directory, resumed=False)
        else:
            self._gaps.attempt("settings", partial(self._write_settings, directory, resumed=True))

    def _write_settings(self, directory: RunDirectory, *, resumed: bool) -> None:
        engine = self.engine
        # A run that is resumed doesn't read its initial weights again.
        is_recorded = resumed and (directory.path / "manifest.json").exists()
        recorded = directory.read_manifest() if is_recorded else {}
        weights = recorded.get("initial_weights") if is_recorded else engine.weights_source
        code = code_of(engine.recipe)
        directory.write_manifest(
            engine.identity,
            engine.strategy,
            workers=engine.group.size,
            transport=engine.group.kind,
            id=self._run.id,
            versions=versions() | package_versions(),
            prepared_data=data_digests(engine.recipe),
            **with_earlier_code(None if code is None else code.facts, recorded, engine.step_index),
            **({} if weights is None else {"initial_weights": weights}),
            **self._external_checkpoints(),
        )
        write_diff(directory.path, code)
        directory.write_recipe(self._recipe_as_used or engine.recipe)
        buffers = engine.buffers.named()
        numel = {name: buffers[name].numel() for name in engine.buffers.persistent}
        write_json(directory.digests / "tensors.json", {"tensors": engine.digest_names, "buffers": numel})

    def refuse_other_owner(self) -> None:
        """Raise CheckpointError on all workers if another run has adopted the folder of checkpoints. Collective."""
        found: CheckpointError | None = None
        if self.checkpoints is not None and self.engine.group.rank == 0:
            try:
                refuse_other_owner(self.checkpoints, self._run)
            except CheckpointError as error:
                found = error
        mine = None if found is None else [found.what, found.where, found.expected, found.got, found.hint]
        all_ranks: list[Any] = all_gather_json(self.engine.group, mine, "checkpoint / owner / control")
        if all_ranks[0] is not None:
            what, where, expected, got, hint = all_ranks[0]
            raise CheckpointError(what, where=where, expected=expected, got=got, hint=hint)

    def _external_checkpoints(self) -> dict[str, str]:
        """Return the manifest's entry for checkpoints outside of the run directory.

        Checkpoints inside the run directory have no entry, so that the directory can be moved.
        """
        location = self.checkpoints
        is_own = self.path is not None and location == self.path / "checkpoints"
        return {} if location is None or is_own else {"checkpoints": str(location.absolute())}

    def _load(self, found: list[str], accept_new_numerics: bool) -> None:
        """Load the last checkpoint. If it is damaged, the error says how to resume from the previous one."""
        try:
            self.engine.load(found[-1], accept_new_numerics=accept_new_numerics)
        except CheckpointError as error:
            if len(found) > 1:
                remedy = f"to resume from the previous checkpoint, {found[-2]}, remove {found[-1]}"
                error.hint = f"{error.hint}; {remedy}" if error.hint else remedy
            raise

    def begin(self, steps: int, on_terminal: bool, listeners: Sequence[Listener]) -> None:
        """Start the listeners on worker 0. Progress is shown on the terminal if `on_terminal`, and in the log.

        If the run has several hosts, the first worker of each other host shows progress on its terminal, too.
        """
        if self.engine.group.rank != 0:
            if on_terminal and self.engine.step_index < steps:
                self._show_on_host(steps)
            return
        if self.engine.step_index >= steps and on_terminal:
            done = f"the run already has {self.engine.step_index} steps, so there is nothing to train up to step"
            say(f"{done} {steps}")
        consoles = ([None] if on_terminal else []) + ([self.log] if self.log is not None else [])
        bars = [TrainingProgress(console) for console in consoles if self.engine.step_index < steps]
        curves = [TensorBoardListener(self._directory.tensorboard)] if self._directory is not None else []
        self._description, recipe = self.description(), self._recipe_as_used or describe(self.engine.recipe)
        facts = self._description | {
            "run_dir": None if self.path is None else str(self.path.absolute()),
            "step": self.engine.step_index,
            "steps": steps,
            "source": self._source,
            "host": socket.gethostname(),
            "recipe": json.loads(json.dumps(numbers(recipe), default=str)),
        }
        self._stack.push(self._end)
        self.listeners.begin([*curves, *bars], listeners, facts)
        self._bars, self._is_on_terminal = bars, on_terminal and bool(bars)
        notes, self.notes = self.notes, []
        for note in notes:
            self.report(note)

    def _show_on_host(self, steps: int) -> None:
        """Show progress on this host's terminal, if this is the first worker of a host without worker 0."""
        descriptor = progress_descriptor()
        if descriptor is not None:
            stream = self._stack.enter_context(os.fdopen(descriptor, "w", closefd=False, encoding="utf-8"))
            bar = TrainingProgress(Console(file=cast(TextIO, SafeStream(lambda: stream)), highlight=False))
            bar.note(f"this host takes part in the run from step {self.engine.step_index + 1} on")
            bar.began({"step": self.engine.step_index, "steps": steps})
            self._stack.callback(bar.close)
            self._bars = [bar]

    def description(self) -> dict[str, Any]:
        """Describe the run with fields of `Summary`."""
        engine = self.engine
        return {
            "name": engine.recipe.name,
            "workers": engine.group.size,
            "sharding": engine.strategy.sharding,
            "transport": engine.group.kind,
            "device": engine.recipe.device,
            "precision": engine.recipe.precision,
            "parameters": sum(param.numel() for param in engine.model.parameters()),
            "run_dir": "" if self.path is None else str(self.path),
        }

    def _end(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the listeners that the run has ended."""
        summary = self.summary
        if summary is None or error is not None:
            summary = unfinished(self._description, self.figures, time.monotonic() - self._started, error)
        self.listeners.end(summary)

    def report(self, text: str) -> None:
        """Print a message for people next to the progress, or keep the message until progress is shown."""
        if not self._bars:
            self.notes.append(text)
        for bar in self._bars:
            bar.note(text)

    def _warn(self, text: str) -> None:
        """Print a message that people must see, even if no progress is shown on the terminal."""
        self.report(text)
        if not self._is_on_terminal:
            say(text)

    def event(self, event: str, **facts: Any) -> None:
        """Record an event. Threads may call this."""
        self.listeners.event(event, facts)

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events of the run so far on worker 0, and an empty list on other workers."""
        return [] if self._directory is None else self._directory.read_events()

    @property
    def run_id(self) -> str:
        """Return the run's id on worker 0."""
        return self._run.id

    def last_steps(self) -> dict[int, int]:
        """Return the last recorded step of each island on worker 0, and an empty dict on other workers."""
        recorded = [] if self._directory is None else self._directory.read_metrics()
        last: dict[int, int] = {}
        for metrics in recorded:
            last[metrics.island or 0] = max(metrics.step, last.get(metrics.island or 0, 0))
        return last

    def last_validations(self) -> dict[str, dict[str, Any]]:
        """Return the last recorded validation of each set on worker 0, and an empty dict on other workers."""
        recorded = [] if self._directory is None else self._directory.read_validations()
        return {each["set"]: each for each in recorded}

    def add(self, metrics: StepMetrics) -> None:
        """Record a completed step."""
        if self.engine.group.rank != 0:
            for bar in self._bars:
                bar.step(metrics, [])
            return
        self.figures.add(metrics)
        for change in self.engine.amendments.at(metrics.step):
            self.event("amended", step=metrics.step, key=change.key, value=change.value)
            self.report(str(change))
        if metrics.skipped:
            self.event("skipped", step=metrics.step)
            self.report(f"step {metrics.step} was skipped")
        self.listeners.step(metrics, self.engine.clock.workers)

    def add_digest(self, step: int, digest: str) -> None:
        """Record the digest of the weights that all islands share after a round, which `Engine.digest` has returned."""
        self.event("digest", step=step, digest=digest)
        if self._directory is not None:
            write = partial(self._directory.write_digests, step, self.engine.last_hashes)
            self._gaps.attempt("digests", write)

    def add_validation(self, evaluation: Evaluation) -> None:
        """Record a validation."""
        if self.engine.group.rank == 0:
            self.listeners.evaluated(evaluation)
            self.report(str(evaluation))


def has_started_over(run_dir: str | Path | None) -> bool:
    """Return True if this program has been restarted, and the run in `run_dir` started over before the restart.

    A program may have several runs, so the run's own events decide.
    """
    if run_dir is None or not is_restart():
        return False
    launches = [event.get("launch") for event in events_in(Path(run_dir)) if event["event"] == "started over"]
    return bool(launches) and launches[-1] == launch_id()


def start_over(run_dir: Path, checkpoints: Location, launch: str | None = None) -> None:
    """Move the record of the run in `run_dir`, with its checkpoints, to a subfolder. The caller holds the run's lock.

    launch: the id of the launch, by which `has_started_over` recognizes the event.

    Raises ConfigError if there are checkpoints outside of the run directory: they can't be moved there.
    """
    directory = RunDirectory(run_dir)
    is_own = isinstance(checkpoints, Path) and checkpoints.resolve() == run_dir.resolve() / "checkpoints"
    if not is_own and (found := list_checkpoints(checkpoints)):
        raise ConfigError(
            "the run can't start over: there are checkpoints outside of its directory",
            where=str(checkpoints),
            got=", ".join(folder.name for _, folder in found),
            hint="move or remove them, or choose another checkpoint_dir",
        )
    earlier = directory.move_aside()
    if earlier is not None or launch is not None:
        facts = {"earlier": earlier and earlier.name, "launch": launch}
        directory.append_event("started over", **{key: value for key, value in facts.items() if value is not None})
