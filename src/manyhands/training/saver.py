"""Writes a run's checkpoints when they are due."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from manyhands.checkpoint.save import check_schedules
from manyhands.comm.agreement import all_gather_json
from manyhands.errors import CheckpointError
from manyhands.intervals import Every
from manyhands.storage.location import Location
from manyhands.training.run_record import RunRecord

RETRY_SECONDS = 5
"""The wait before the second attempt to write a run's last checkpoint."""


class Saver:
    """Writes a run's checkpoints when they are due, if it has a location for them.

    Raises CheckpointError if snapshots are taken but can't hold the state of a schedule.
    """

    def __init__(self, record: RunRecord, interval: Every, keep: int, keep_every: int | None) -> None:
        self._record, self._engine, self._interval = record, record.engine, interval
        self._keep, self._keep_every = keep, keep_every
        self._last = time.monotonic()
        if record.snapshots.are_taken:
            check_schedules(record.engine)

    @property
    def is_due(self) -> bool:
        """Return True if this worker requests a checkpoint after the next step.

        Clocks differ, so worker 0's clock decides.
        """
        if self._interval.seconds is not None:
            return self._engine.group.rank == 0 and time.monotonic() - self._last >= self._interval.seconds
        return self._interval.steps is not None and self._engine.next_step % self._interval.steps == 0

    def after_step(self, digest: str | None, *, last: bool, is_best: bool = False) -> None:
        """Take a snapshot if it is due, and start a checkpoint if a worker requested one before the step, or if the
        step is the best so far. Collective.

        Reports a previous checkpoint that could not be written. After the last step, `finish` writes the checkpoint.
        digest: the digest of the weights, if known.
        """
        self._record.snapshots.after_step(digest, last=last)
        if not (self._engine.save_requested or is_best) or last:
            return
        if self._engine.save_requested:
            self._last = time.monotonic()
        self._begin_save()

    def after_round(self, steps: range, *, last: bool, is_best: bool) -> None:
        """Start a checkpoint if one was due after one of the steps of a round of islands, or if the round's result is
        the best so far. Collective. After the last round, `finish` writes the checkpoint.
        """
        due = self._interval.steps is not None and any(step % self._interval.steps == 0 for step in steps)
        if self._interval.seconds is not None:
            mine = time.monotonic() - self._last >= self._interval.seconds
            all_ranks: list[Any] = all_gather_json(self._engine.group, mine, f"step {steps[-1]} / save / control")
            due = all_ranks[0]  # worker 0's clock decides
        if (due or is_best) and not last:
            self._last = time.monotonic()
            self._begin_save()

    def save_best(self) -> None:
        """Start a checkpoint of the state before the next step, unless it has been written already. Collective."""
        self._begin_save()

    def _begin_save(self) -> None:
        if self._record.checkpoints is None:
            return
        for save in (self._engine.finish_save, partial(self._write, self._engine.begin_save)):
            try:
                save()
            except CheckpointError as error:
                self._record.event("not saved", why=error.what, where=error.where)
                self._record.report(f"training continues, but {error}")

    def _write(self, save: Callable[..., Location | None]) -> Location | None:
        step = self._engine.step_index
        self._record.refuse_other_owner()
        return save(
            self._record.checkpoints,
            keep=self._keep,
            keep_every=self._keep_every,
            best=[best["step"] for best in self._engine.progress.get("best", {}).values()],
            published=lambda _: self._record.event("saved", step=step),
        )

    def finish(self) -> Location | None:
        """Write a checkpoint of the current state, and wait for it. Collective. Raises CheckpointError."""
        if self._record.checkpoints is None:
            return None
        for last_try in (False, True):
            try:
                return self._write(self._engine.save)
            except CheckpointError as error:
                self._record.event("not saved", why=error.what, where=error.where)
                if last_try:
                    raise
                self._record.report(f"trying again in {RETRY_SECONDS} seconds: {error}")
                time.sleep(RETRY_SECONDS)
        return None
