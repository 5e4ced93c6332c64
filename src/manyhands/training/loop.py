"""train(): the loop from the run's current step to its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from manyhands.comm.agreement import agree, all_gather_json
from manyhands.comm.group import Group
from manyhands.config import Recipe, Strategy, strategy_or_default
from manyhands.engine.step.amendments import amendments_of
from manyhands.errors import ConfigError, Interrupted
from manyhands.intervals import Every, check_length, every
from manyhands.listeners.dispatch import check_listeners
from manyhands.listeners.listener import Listener
from manyhands.listeners.summary import IslandFigures, Summary, failures_among
from manyhands.offload.process_memory import MEASURED_STEPS, PeakMemory
from manyhands.options import whole_number
from manyhands.storage.location import Location
from manyhands.surroundings import StopSignals
from manyhands.training.engine import Engine
from manyhands.training.given_recipe import check_given_recipe
from manyhands.training.island_rounds import Meeting, make_rounds, meeting_of, refuse_start_over
from manyhands.training.run_record import RunRecord, has_started_over, will_resume
from manyhands.training.sampling import sample_text
from manyhands.training.saver import Saver
from manyhands.training.validating import Validations
from manyhands.training.warm_up import warm_steps_in, warm_up


def train(  # noqa: PLR0913  (one argument for each option of a run)
    recipe: Recipe,
    *,
    steps: int | None = None,
    strategy: Strategy | None = None,
    run_dir: str | Path | None = None,
    checkpoint_dir: str | Location | None = None,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int = 3,
    keep_every: int | None = None,
    keep_best: str | Sequence[str] = (),
    digest_every: int = 10,
    accept_new_numerics: bool = False,
    adopt: bool = False,
    start_over: bool = False,
    islands_at: str | Location | None = None,
    islands: Sequence[int] | str | None = None,
    skip_steps: Sequence[int] = (),
    amendments: Mapping[int, Mapping[str, Any]] | None = None,
    show: bool = True,
    listeners: Sequence[Listener] = (),
    recipe_as_used: dict[str, Any] | None = None,
    stop: StopSignals | None = None,
) -> Summary:
    """Train until `steps` steps are complete. Collective: every worker calls it with the same arguments.

    steps: the number of steps, counted from the start of the run. It is left out if the recipe sets `epochs`.
    run_dir: the output directory. If it has checkpoints of this recipe, the run is resumed. If it is None, nothing is
    written.
    checkpoint_dir: where to write checkpoints instead of in run_dir: a folder, or an address (s3://bucket/folder). The
        run directory records it.
    checkpoint_every: steps (500) or time ("10m") between checkpoints. Training continues while they are written. If a
        checkpoint can't be written, the failure is reported and training continues. The last step always has a
        checkpoint.
    keep_checkpoints, keep_every: keep this many recent checkpoints, and those of every `keep_every`-th step.
    keep_best: figures of validations, such as "validation.loss:min" or ["validation.accuracy:max"]. The step with the
        best value so far gets a checkpoint, which is kept as long as no later value is better. A tie keeps the earlier
        one.
    digest_every: steps between digests. The last step always has one.
    accept_new_numerics: resume under another numerics identity (torch version, CPU kind, threads).
    adopt: continue from checkpoints that belong to another run. Then only this run may write to their folder.
    start_over: begin the run in run_dir anew. Its metrics, events, digests and checkpoints are moved to a subfolder.
        After a restart of the program, a run that had already started over continues instead.
    islands_at: where the islands of a recipe meet: a folder that all clusters see, or an address (s3://bucket/folder).
        Without it, this program computes all islands itself.
    islands: the numbers of the islands, from 0, that this program computes; or "auto", the default: programs on several
        clusters share the islands, and take over those of a cluster that is lost.
    skip_steps: steps to skip, counted from 1: their data are passed over, and schedules advance.
    amendments: settings that change from a step on, such as {500: {"optimizer.lr": 1e-4, "clip_norm": 0.5}}. The run
        directory records both, and they apply again whenever the run is resumed.
    show: show a progress bar on worker 0.
    listeners: objects that receive the figures of the run on worker 0; see `Listener`.
    recipe_as_used, stop: for the command line.

    Returns the run's summary: `summary.digest`, `summary.last_loss`, ... Raises ConfigError, DataError, NumericsError,
    CheckpointError, WorkerError, and Interrupted after Ctrl-C.
    """
    check_given_recipe(recipe)
    check_length(steps, recipe.epochs)
    checked_steps, digest_every, keep_checkpoints, keep_every = _checked_numbers(
        1 if steps is None else steps, digest_every, keep_checkpoints, keep_every
    )
    check_listeners(listeners)
    given_amendments = amendments_of(skip_steps, amendments or {})
    meeting = meeting_of(recipe, islands_at, islands, accepts_other_numerics=accept_new_numerics)
    interval = Every() if checkpoint_every is None else every(checkpoint_every)
    started = time.monotonic()
    with ExitStack() as around, ExitStack() as stack:
        signals = stop or around.enter_context(StopSignals())
        strategy = _with_scratch(strategy_or_default(strategy), run_dir)
        anew = start_over and not has_started_over(run_dir)
        resumes = not anew and will_resume(run_dir, checkpoint_dir)
        alike = partial(train, checkpoint_every=checkpoint_every, accept_new_numerics=accept_new_numerics, show=show)
        alike = partial(alike, strategy=strategy, skip_steps=skip_steps, amendments=amendments, stop=signals)
        meeting = _warmed(meeting, recipe, run_dir, alike, anew=anew, resumes=resumes)
        engine = stack.enter_context(Engine(recipe, strategy, resumes=resumes))
        _agree_on_arguments(  # except for `adopt`: only worker 0 uses it, and a host that joins later has no --adopt
            engine.group,
            run_dir=run_dir,
            checkpoint_dir=checkpoint_dir,
            steps=steps,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            keep_every=keep_every,
            keep_best=keep_best,
            digest_every=digest_every,
            accept_new_numerics=accept_new_numerics,
            start_over=start_over,
            islands_at=islands_at,
            islands=islands,
            amendments=given_amendments.described(),
        )
        last = engine.epochs.steps(recipe.epochs) if recipe.epochs is not None else checked_steps
        record = RunRecord(engine, run_dir, checkpoint_dir, recipe_as_used, around, adopt=adopt, anew=anew)
        _refuse_without_place(record, checkpoint_every=checkpoint_every, keep_every=keep_every, keep_best=keep_best)
        record.amend(given_amendments)
        record.resume(accept_new_numerics)
        validations = Validations(engine, last, keep_best, record.add_validation, record.report, record.event)
        record.notes += engine.epochs.described(last) + validations.described()
        record.begin(last, show, listeners)
        saver = Saver(record, interval, keep_checkpoints, keep_every)
        if validations.begin():
            saver.save_best()
        signals.training_started()
        peak_bytes, of_islands = (
            (_make_steps(engine, record, validations, saver, signals, last, digest_every), None)
            if meeting is None
            else make_rounds(engine, record, validations, saver, signals, last, digest_every, meeting)
        )
        summary = _summary(engine, record, validations, peak_bytes, time.monotonic() - started, of_islands)
        record.summary = summary
    return summary


def _make_steps(
    engine: Engine,
    record: RunRecord,
    validations: Validations,
    saver: Saver,
    signals: StopSignals,
    steps: int,
    digest_every: int,
) -> int:
    """Make the steps of a run, with their validations and checkpoints. Return the peak memory in bytes. Collective."""
    memory, first = PeakMemory(), engine.step_index
    record.listeners.deliver()
    for batch in engine.batches(steps):
        if validations.stop_reason:
            break
        with ExitStack() as watched:
            if engine.step_index - first < MEASURED_STEPS:
                watched.enter_context(memory)
            engine.stop_requested = signals.requested or record.listeners.stop_reason is not None
            engine.save_requested = saver.is_due
            metrics = engine.step(batch, digest=batch.step % digest_every == 0 or batch.step == steps)
        if engine.step_index == first + 1 and (changed := engine.buffers.report()) is not None:
            record.report(changed)
        record.add(metrics)
        if engine.stop_requested:
            raise _interrupted(engine, record, saver)
        is_best = validations.after_step()
        last = batch.step == steps or validations.stop_reason is not None
        saver.after_step(metrics.digest, last=last, is_best=is_best)
        record.listeners.deliver()
    if validations.stop_reason:
        if engine.step_index > first:  # otherwise the run has already recorded this event
            record.event("stopped early", step=engine.step_index, why=validations.stop_reason)
        record.report(validations.stop_reason)
    saver.finish()
    return memory.peak_bytes


def _checked_numbers(
    steps: object, digest_every: object, keep_checkpoints: object, keep_every: object
) -> tuple[int, int, int, int | None]:
    """Return the numbers as Python's own integers. Raises ConfigError."""
    given = {"steps": steps, "digest_every": digest_every, "keep_checkpoints": keep_checkpoints}
    given |= {} if keep_every is None else {"keep_every": keep_every}
    found = {name: whole_number(number) or 0 for name, number in given.items()}
    if min(found.values()) < 1:
        raise ConfigError(
            "steps, digest_every, keep_checkpoints and keep_every must be at least 1",
            expected="integers",
            got=", ".join(f"{name} = {number!r}" for name, number in given.items()),
        )
    return found["steps"], found["digest_every"], found["keep_checkpoints"], found.get("keep_every")


def _warmed(
    meeting: Meeting | None,
    recipe: Recipe,
    run_dir: str | Path | None,
    train: Callable[..., object],
    *,
    anew: bool,
    resumes: bool,
) -> Meeting | None:
    """Make the warm steps of a recipe with islands, if this cluster is to make them, unless they are made. Collective.

    train: `manyhands.train` with the options that the warm steps share with the run. Raises ConfigError for a run that
    can't start over.
    """
    refuse_start_over(meeting, recipe, anew=anew)
    if meeting is None or not meeting.makes_warm_steps(recipe):
        return meeting
    made = warm_steps_in(recipe, run_dir)
    if made is None and not resumes:
        made = warm_up(recipe, run_dir, train)
    return replace(meeting, warm=made)


def _agree_on_arguments(group: Group, **arguments: Any) -> None:
    """Check that all workers passed the same arguments to `train`. Collective. Raises ConfigError."""
    agree(
        group,
        "arguments of train()",
        {name: "None" if value is None else repr(str(value)) for name, value in arguments.items()},
        hint="pass the same arguments on all workers. A run_dir with the time in its name, for example, would differ"
        " between workers: choose the name once, before the workers start",
    )


def _refuse_without_place(record: RunRecord, **options: Any) -> None:
    """Raise ConfigError for an option that would have no effect, because there is no place for checkpoints."""
    for name, value in options.items():
        if value and record.checkpoints is None:
            raise ConfigError(
                f"{name} has no effect, because the run has no place for checkpoints",
                expected="run_dir=... or checkpoint_dir=...",
                got=f"{name}={value!r}",
            )


def _with_scratch(strategy: Strategy, run_dir: str | Path | None) -> Strategy:
    """Put the scratch folder into the run directory if offload is "disk" and the strategy names no folder."""
    if strategy.offload != "disk" or strategy.scratch or run_dir is None:
        return strategy
    return replace(strategy, scratch=str(Path(run_dir) / "scratch"))


def _interrupted(engine: Engine, record: RunRecord, saver: Saver) -> Interrupted:
    checkpoint = saver.finish()
    # Only worker 0 has listeners. All workers raise the same error.
    all_ranks: list[Any] = all_gather_json(engine.group, record.listeners.stop_reason, "stop / reason / control")
    reason = all_ranks[0]
    record.event("stopped", step=engine.step_index, **({} if reason is None else {"why": reason}))
    return Interrupted(
        f"stopped after step {engine.step_index}, as requested"
        if reason is None
        else f"a listener stopped the run after step {engine.step_index}: {reason}",
        where=f"checkpoint {checkpoint}" if checkpoint else "no checkpoint was written: the run has no directory",
        hint="to continue, start the run again with the same run directory; the number of workers may change"
        if checkpoint
        else None,
    )


def _summary(
    engine: Engine,
    record: RunRecord,
    validations: Validations,
    peak_bytes: int,
    wall_seconds: float,
    islands: IslandFigures | None,
) -> Summary:
    group = engine.group
    group.status("end / summary")
    digest = engine.digest()
    sample = sample_text(engine)
    # Only worker 0 has the metrics and the sample. All workers return the same summary.
    mine = {**record.figures.figures()._asdict(), **failures_among(record.read_events())._asdict(), "sample": sample}
    mine["validations"] = record.last_validations() | {name: x.as_json() for name, x in validations.last.items()}
    all_ranks: list[Any] = all_gather_json(group, (mine, peak_bytes), "end / figures / control")
    record.event("ended", step=engine.step_index, digest=digest)
    (of_worker_0, _), peaks = all_ranks[0], [peak for _, peak in all_ranks]
    return Summary(
        **of_worker_0,
        **record.description(),
        peak_memory_bytes_per_worker=peaks,
        digest=digest,
        wall_seconds=wall_seconds,
        best=validations.best,
        islands=islands,
    )
