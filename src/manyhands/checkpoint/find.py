"""Finds the checkpoint of a run that a user asks for: the last one, that of a step, or the best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyhands.checkpoint.format import MANIFEST, checkpoints_of, list_checkpoints, read_manifest
from manyhands.checkpoint.owner import refusal, run_in
from manyhands.errors import ConfigError
from manyhands.optim.plain_values import decode_state
from manyhands.options import nearest
from manyhands.storage.location import Location
from manyhands.validation import AVERAGED, TRAINED

BEST = "best"
"""The weights of the checkpoint that `keep_best` kept."""


def find_checkpoint(run: Location, step: int | None = None, weights: str = TRAINED) -> Location:
    """Return the run's checkpoint of that step or, if `step` is None, its last checkpoint.

    weights: "trained" or "ema", for a checkpoint of any step; or "best", for the checkpoint that `keep_best` kept. If
    the run has kept the best checkpoints for several figures, "best:validation.loss:min" names one. Raises ConfigError
    and CheckpointError.
    """
    is_best = weights.partition(":")[0] == BEST
    if not is_best and weights not in (TRAINED, AVERAGED):
        known = f"{TRAINED}, {AVERAGED}, {BEST} or {BEST}:FIGURE"
        raise ConfigError("there are no such weights", expected=known, got=repr(weights))
    found = _checkpoints_at(run)
    if is_best:
        if step is not None:
            raise ConfigError(
                "both a step and the best checkpoint are requested",
                expected="one of them",
                got=f"step = {step}, weights = {weights}",
            )
        step = _best_step(found[-1][1], weights.partition(":")[2])
    if step is None:
        return found[-1][1]
    for number, folder in found:
        if number == step:
            return folder
    steps = ", ".join(str(number) for number, _ in found)
    raise ConfigError(
        f"the run has no checkpoint of step {step}",
        where=str(run.absolute()),
        expected=f"one of {steps}" if len(found) > 1 else steps,
        got=step,
    )


def _checkpoints_at(run: Location) -> list[tuple[int, Location]]:
    """Return (step, folder) of the checkpoints in a run directory or a folder, oldest first, or of one checkpoint."""
    is_run = isinstance(run, Path) and (run / "checkpoints").is_dir()
    place = checkpoints_of(run) if isinstance(run, Path) and is_run else run
    error = refusal(place, run_in(run)) if isinstance(run, Path) and is_run else None
    if error is not None:
        raise error
    found = list_checkpoints(place)
    if not found and not is_run and (run / MANIFEST).is_file():
        found = [(read_manifest(run).step, run)]
    if not found:
        raise ConfigError(
            "there is no checkpoint here",
            where=str(run.absolute()),
            expected="a run directory, a folder of checkpoints, or a checkpoint",
            got="no complete checkpoint" if run.exists() else "nothing",
            hint="check the path; a run writes a checkpoint when it ends or is stopped, "
            "and every N steps with --checkpoint-every N",
        )
    return found


def _best_step(newest: Location, figure: str) -> int:
    """Return the step of the best checkpoint, as the newest checkpoint records it.

    figure: "validation.loss:min", or "" if the run has kept the best checkpoint for one figure only.
    """
    best: Any = decode_state(read_manifest(newest).progress.get("best"))
    steps: dict[str, int] = {
        str(name): value["step"]
        for name, value in (best.items() if isinstance(best, dict) else ())
        if isinstance(value, dict) and type(value.get("step")) is int
    }
    if not steps:
        raise ConfigError(
            "the run has kept no best checkpoint",
            where=str(newest.absolute()),
            hint="train with keep_best='validation.loss:min' (--keep-best)",
        )
    if figure in steps:
        return steps[figure]
    if figure:
        raise ConfigError(
            f"the run has kept no best checkpoint for {figure}",
            where=str(newest.absolute()),
            got=figure,
            hint=nearest(figure, steps),
        )
    if len(set(steps.values())) > 1:
        raise ConfigError(
            "the run has kept the best checkpoints for several figures",
            where=str(newest.absolute()),
            expected=" or ".join(f"weights = {BEST}:{name}" for name in steps),
            got=f"weights = {BEST}",
        )
    return next(iter(steps.values()))
