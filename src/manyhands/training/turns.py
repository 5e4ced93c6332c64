"""The turns of islands on one cluster, and the outer steps between them.

A cluster computes some of the islands, one after the other, each with all of its workers. A *turn* is a round of an
island: take in the result of the round before, make the steps, publish a file, and with a delay make some more steps.
When the files of all islands are there, every cluster makes the same outer step from them. So the weights that all
islands share are the same on all clusters, whoever has computed which island, and how often.

The engine holds the state of one island. The states of the others are on the disk: *at rest*, after their last turn.
A state that is published is *complete*: it also has what all islands share after a round. From there, any cluster can
repeat the turns of later rounds, whose files are kept for as long as they may be needed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from manyhands.checkpoint.save import Saving, start_checkpoint
from manyhands.engine.update.companions import OUTER, VELOCITY
from manyhands.errors import CheckpointError, ConfigError, InvariantError
from manyhands.islands import Islands, Round
from manyhands.listeners.summary import IslandFigures
from manyhands.rounds.round_file import RoundFile
from manyhands.rounds.store import RoundStore
from manyhands.storage.location import Location
from manyhands.training.engine import Engine
from manyhands.training.island_states import NO_ISLAND, IslandStates, State
from manyhands.training.on_first import FirstWorker
from manyhands.training.outer_step import OuterStep
from manyhands.training.round_files import RoundFiles
from manyhands.training.run_record import RunRecord
from manyhands.training.saver import RETRY_SECONDS
from manyhands.training.warm_up import facts_of_warm_steps

POLL_SECONDS, MAX_POLL_SECONDS = 0.1, 3.0
"""The shortest and the longest pause between two looks at the store for the files of other clusters."""

POLL_GROWTH = 1.15
"""Each pause is so many times as long as the one before. So a file is found late by about 15 % of the wait at most."""

REPORT_SECONDS = 10.0
"""The time for which a cluster waits for others before it reports this."""

FETCH_SECONDS = 1.0
"""The shortest time between two looks for other clusters' files while this cluster makes steps."""


class Cluster(NamedTuple):
    """What one cluster does in a run with islands.

    folder: for states at rest, and for the files of rounds. id: of the cluster's run. state_every: the number of rounds
    between two complete states that it publishes. accepts_other_numerics: whether it may continue states of clusters
    that compute with another kind of CPU, for example.
    """

    folder: Path
    id: str
    state_every: int
    accepts_other_numerics: bool


class Turns:
    """The turns of islands on this cluster, and the outer steps. All methods are collective.

    rounds: the rounds of the run. fingerprint: the recipe's, for files. outer: the outer steps. collected: the number
    of the last round whose result the engine has in the weights that all islands share.
    """

    def __init__(
        self, engine: Engine, record: RunRecord, store: RoundStore, first: FirstWorker, cluster: Cluster, steps: int
    ) -> None:
        self._engine, self._record, self._store, self._first = engine, record, store, first
        self._cluster = cluster
        given = engine.recipe.islands
        if given is None:
            raise InvariantError("the recipe has no islands")
        self._given: Islands = given
        self.rounds = given.rounds(steps, pretrained=engine.recipe.weights is not None)
        if not self.rounds:
            raise ConfigError(
                "the run has no step that islands make",
                expected=f"more steps than the {given.warm_steps} warm steps",
                got=f"{steps} steps",
            )
        self.fingerprint = fingerprint_of(engine, steps)
        self.outer = OuterStep(engine, given, self.fingerprint)
        self._files = RoundFiles(cluster.folder / "rounds", store, self.outer, self.rounds, given)
        self.collected = 0
        self._states = IslandStates(
            cluster.folder, store, first, self.rounds, cluster.id, shares_start=given.warm_steps > 0
        )
        self._done = dict.fromkeys(range(given.count), 0)  # the last turn of each island that this cluster knows of
        self._held = 0  # the number of the last turn of the engine's island
        self._is_saved = True  # False if the engine's island has made a turn that is not on the disk
        self._uploads: dict[int, list[Future[Any] | None]] = {}  # uploads that were started, by round
        self._has_begun = False
        self._reported = 0  # the last round that was recorded
        self._ahead: Future[Any] | None = None  # copying files in the background
        self._ahead_since = 0.0
        self._publishing: Saving | None = None  # a complete state that is being published
        self._agreement: float | None = None
        self._seconds_waited = 0.0

    @property
    def island(self) -> int:
        """Return the island that the engine holds."""
        return self._engine.island

    # Begin and end

    def begin(self, warm: Location | None) -> None:
        """Continue from the checkpoint that the engine has loaded, or begin. warm: the checkpoint of the warm steps."""
        engine = self._engine
        self._first.call(self._files.upload_leftovers, "uploading rounds")
        self._first.call(partial(self._states.remove_leftovers, self._given.count), "deleting leftovers")
        if engine.step_index:
            self._loaded_complete()
            self._reported = self.collected
        if not self._load_newest(self.collected + 1) and not engine.step_index:  # other clusters may be ahead
            self._start_anew(warm)
        self._has_begun = True

    def _start_anew(self, warm: Location | None) -> None:
        """Begin with the weights of the recipe, or after the warm steps."""
        if warm is None and self._given.warm_steps:
            self._record.report(
                f"waiting for the {self._given.warm_steps} warm steps: the cluster that is started with island 0 in "
                "--islands makes them"
            )
            self._load(self._states.wait_for_start())
            return
        if warm is not None:
            self._engine.load(warm, other_facts=facts_of_warm_steps(self._engine.recipe))
        self.outer.begin()
        self._save_start()

    def _save_start(self) -> None:
        """Save the state before the first round, unless it is there already. Try again until the store answers."""
        while True:
            self._first.call(self._wait_for_store, "waiting for the store")
            try:
                self._engine.save(self._states.start)
                return
            except CheckpointError as error:
                self._record.report(f"trying again in {RETRY_SECONDS} seconds: {error}")
                self._first.call(partial(time.sleep, RETRY_SECONDS), "waiting for the store")

    def _wait_for_store(self) -> None:
        """Wait until a shared folder is mounted. A checkpoint would else be written to its mount point."""
        self._store.steady("take a state", self._store.check_mounted)

    def end(self) -> None:
        """Give the engine the weights that all islands share after the last round."""
        self._wait_for_uploads(len(self.rounds))
        self._finish_publishing()
        self._first.call(partial(self._states.remove_leftovers, self._given.count), "deleting leftovers")
        if self._engine.group.rank == 0:
            self._files.remove()
        self.outer.exchange(self.rounds[-1].end)

    def figures(self) -> IslandFigures:
        """Return the figures of this program, on the first worker."""
        store = self._store
        return IslandFigures(len(self.rounds), store.bytes_up, store.bytes_down, self._agreement, self._seconds_waited)

    def _load(self, state: State) -> bool:
        """Load a state. Return False if another cluster has deleted it meanwhile, after publishing later ones."""
        engine, progress = self._engine, self._engine.progress
        engine.finish_save()
        found = self._states.on_disk(state)
        if found is None:
            return False
        engine.load(found, accept_new_numerics=self._cluster.accepts_other_numerics)
        if self._has_begun:  # the state may be older than the validations that this cluster has made
            engine.progress = progress
        if state.is_complete:
            self._loaded_complete()
        else:
            self._held = state.number
        self._is_saved = True
        return True

    def _load_newest(self, least: int) -> bool:
        """Load the newest complete state of any island. Return False if there is none of round `least` or later."""
        while True:
            newest = self._states.newest_complete(self._given.count)
            if newest is None or newest.number < least:
                return False
            if self._load(newest):
                return True

    def _loaded_complete(self) -> None:
        """Note the round of a complete state that the engine has loaded, and restore the island's own weights."""
        engine, start = self._engine, self.rounds[0].start
        found = next((each for each in self.rounds if each.end == engine.step_index), None)
        if found is None and engine.step_index != start:
            raise CheckpointError(
                "the checkpoint isn't at the end of a round",
                where=f"step {engine.step_index}",
                hint="resume with the recipe and the number of steps with which the run began",
            )
        self.collected = self._held = 0 if found is None else found.number
        self.outer.buffers = {name: buffer.clone() for name, buffer in engine.buffers.named().items()}
        self.outer.exchange(start if found is None else found.applied)
        if engine.island in self._done:
            self._done[engine.island] = max(self._done[engine.island], self._held)

    @contextmanager
    def result(self, of: Round) -> Iterator[None]:
        """Context in which the engine has the weights and buffers that all islands share after a round.

        If the engine's island has not made the turn of this round, a checkpoint that is saved here has no island.
        """
        island = self._engine.island
        with self.outer.shared(of.end):
            if self._held != of.number:
                self._engine.island = NO_ISLAND
            yield
            self._engine.island = island

    # Turns

    def bring(self, island: int, number: int, step: Callable[[int], None]) -> None:
        """Make the turns of an island up to this round, unless they are made, or all clusters are ahead of this one.

        step: makes the engine's next step. It takes the number of steps after the last one of the turn.
        """
        if self._done[island] >= number:
            return
        if self._engine.island != island or self._held != self.collected:
            states = self._states_of(island)
            rested = max((each.number for each in states if not each.is_complete), default=0)
            if rested >= number:  # this cluster was interrupted after the turn
                self._done[island] = rested
                return
            self._switch(island, states)
        while self._held < number:
            self.collect_until(self._held)
            if self._engine.island != island:  # it was late, and has loaded a later state of another island
                return
            self._turn(self.rounds[self._held], step)

    def _switch(self, island: int, states: list[State]) -> None:
        """Load the newest state of an island from which its next turns can be made."""
        self.rest()
        while not self._load(self._states.to_continue(island, states, self.collected)):
            states = self._states_of(island)
        self._engine.island = island  # the state before the first round is the same for all islands

    def _states_of(self, island: int) -> list[State]:
        return self._states.of(island, like=0 if self._is_forgetful else island)

    def rest(self) -> None:
        """Save the engine's island, so that the engine can load another one."""
        if not self._is_saved:
            root = self._states.at_rest(self._engine.island)
            self._engine.begin_save(root, keep=1, without=(OUTER, VELOCITY))
            self._engine.finish_save()
            self._is_saved = True

    def _turn(self, of: Round, step: Callable[[int], None]) -> None:
        engine = self._engine
        if of.number > 1:
            if (of.number - 1) % self._cluster.state_every == 0:
                self.publish_state()
            self.outer.take_in()
        while engine.step_index < of.end:
            step(of.applied)
        self._publish(of)
        while engine.step_index < of.applied:
            self._fetch_ahead(of.number)
            step(of.applied)
        self._held = self._done[engine.island] = of.number
        self._is_saved = False

    def publish_state_of(self, island: int) -> None:
        """Publish a complete state of an island after the last round, if this cluster has made its turn."""
        if self._engine.island != island or self._held != self.collected:
            states = self._states_of(island)
            if not any(not each.is_complete and each.number == self.collected for each in states):
                return
            self._switch(island, states)
        self.publish_state()

    def publish_state(self) -> None:
        """Publish a complete state of the engine's island, after the last round. The run goes on if that fails."""
        of, island = self.rounds[self.collected - 1], self._engine.island
        if self._is_forgetful and island != 0:
            return  # nothing in the state belongs to this island alone
        self._wait_for_uploads(of.number)  # whoever continues from the state does not make this turn again
        self._finish_publishing()
        self._first.call(self._wait_for_store, "waiting for the store")
        with self.outer.shared(of.end):
            try:
                self._publishing = start_checkpoint(self._engine, self._states.published(island), keep=2)
            except CheckpointError as error:
                self._record.report(f"the state after round {of.number} was not published: {error}")

    def _finish_publishing(self) -> None:
        """Wait until the last complete state is published. Then delete the rounds that came before it."""
        publishing, self._publishing = self._publishing, None
        if publishing is None:
            return
        try:
            publishing.wait()
        except CheckpointError as error:
            self._record.report(f"a state was not published: {error}")
        else:
            self._first.call(self._prune, "deleting old rounds")

    @property
    def _is_forgetful(self) -> bool:
        """Return True if an island keeps nothing of its own after a round, so that one state serves all islands."""
        given, fronts = self._given, self._engine.optimizer.fronts
        # Optimizers of other packages may have state in param groups or attributes, which a reset leaves.
        resets_all = given.inner_state == "reset" and all(type(each).__module__.startswith("torch.") for each in fronts)
        return resets_all and not given.has_error_feedback and not given.delay

    def _prune(self) -> None:
        """Delete the rounds and states that no cluster needs any more. A cluster that is late may need later ones."""
        count = 1 if self._is_forgetful else self._given.count
        oldest = self._states.oldest_needed(count) - self._cluster.state_every
        self._store.prune(oldest)
        self._store.steady("delete old states", partial(self._states.prune, count, oldest))

    def _publish(self, of: Round) -> None:
        island, path = self._engine.island, self._files.path(of.number, self._engine.island)
        if self._engine.group.rank == 0:
            self._files.prepare(of.number, island)
        self.outer.publish(of, path)
        upload = self._first.start(partial(self._files.upload, of.number, island), uploads=True)
        self._uploads.setdefault(of.number, []).append(upload)

    def abandon(self) -> None:
        """Stop waiting for a state that is being published, because the run ends."""
        if self._publishing is not None:
            self._publishing.abandon()

    def _wait_for_uploads(self, until: int) -> None:
        """Wait until the files of this cluster are in the store, up to this round."""
        for number in [number for number in self._uploads if number <= until]:
            for upload in self._uploads.pop(number):
                self._first.result(upload, f"uploading round {number}")

    # Outer steps

    def collect_until(self, number: int) -> None:
        """Make the outer steps up to this round, whose files are there or will be."""
        while self.collected < number:
            self.collect(self.rounds[self.collected], lambda: None)

    def collect(self, of: Round, while_waiting: Callable[[], None]) -> None:
        """Wait for the files of a round, and make the outer step.

        while_waiting: called from time to time, to make turns of other islands. If the round's files were deleted,
        because all other clusters are far ahead, load a later state instead. If this has happened before, do nothing.
        """
        started = time.monotonic()
        if self.collected != of.number - 1 or not self._wait_for_files(of, while_waiting):
            return
        layout, verify = self.outer.layout(of), self._engine.group.rank == 0
        files = [
            RoundFile(
                self._files.path(of.number, island), layout, self.outer.identity(of.number, island), verify=verify
            )
            for island in range(self._given.count)
        ]
        waited = time.monotonic() - started
        self._agreement = self.outer.collect(of, files)
        self.collected = of.number
        self._seconds_waited += waited
        if of.number > self._reported:
            self._reported = of.number
            self._record.event(
                "round",
                step=of.end,
                round=of.number,
                agreement=self._agreement,
                seconds_waited=round(waited, 3),
                bytes_up=self._store.bytes_up,
                bytes_down=self._store.bytes_down,
            )
        self._wait_for_uploads(of.number - 1)
        if self._engine.group.rank == 0:
            # An island that is taken over may need the files of the rounds since its last state.
            oldest = of.number - 2 * self._cluster.state_every
            self._files.remove(before=oldest)

    def _wait_for_files(self, of: Round, while_waiting: Callable[[], None]) -> bool:
        """Wait until all files of a round are on this cluster. Return False if a later state was loaded instead."""
        pause, since, reported = POLL_SECONDS, time.monotonic(), REPORT_SECONDS
        while True:
            missing: list[int] = self._first.call(partial(self._look_for_files, of.number), f"round {of.number}")
            if not missing:
                return True
            if pause >= MAX_POLL_SECONDS:
                self.rest()
                if self._load_newest(of.number):  # another cluster has collected the round, so its files were deleted
                    self._record.report(f"round {of.number} is over: this cluster continues after {self.collected}")
                    return False
            if time.monotonic() - since > reported:
                reported *= 2
                names = ", ".join(map(str, missing))
                self._record.report(f"round {of.number} waits for the island{'s' * (len(missing) > 1)} {names}")
            while_waiting()
            if self.collected != of.number - 1:  # the turns of other islands have loaded a later state
                return False
            self._first.call(partial(time.sleep, pause), f"round {of.number}")
            pause = min(MAX_POLL_SECONDS, POLL_GROWTH * pause)

    def _look_for_files(self, number: int) -> list[int]:
        """Do as `RoundFiles.fetch_missing`. Raises the error of a failed upload, because others wait for that file."""
        for upload in (upload for uploads in self._uploads.values() for upload in uploads):
            if upload is not None and upload.done():
                upload.result()
        return self._files.fetch_missing(number)

    def _fetch_ahead(self, number: int) -> None:
        """Start to copy the files of other clusters, beside the steps that a delay allows."""
        if self._ahead is None or (self._ahead.done() and time.monotonic() - self._ahead_since > FETCH_SECONDS):
            self._ahead_since = time.monotonic()
            self._ahead = self._first.start(partial(self._files.fetch_missing, number))


def fingerprint_of(engine: Engine, steps: int) -> str:
    """Return a hash of all that decides the rounds of a recipe, as far as facts can tell it."""
    facts: dict[str, object] = {**engine.facts(), **engine.facts_of_data(), "steps": steps}
    facts["amendments"] = engine.amendments.as_json()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
