"""The rounds of a run with islands, on one cluster: which islands it computes, and what follows from a round."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

from manyhands.comm.agreement import all_gather_json
from manyhands.config import Recipe
from manyhands.engine.agreement import recipe_facts
from manyhands.errors import ConfigError, Interrupted, InvariantError
from manyhands.islands import Round
from manyhands.listeners.run_directory import ISLANDS
from manyhands.listeners.summary import IslandFigures
from manyhands.offload.process_memory import MEASURED_STEPS, PeakMemory
from manyhands.options import whole_number
from manyhands.rounds.leases import Leases
from manyhands.rounds.store import RoundStore
from manyhands.storage.atomic import write_atomic
from manyhands.storage.location import Location, location_of
from manyhands.surroundings import StopSignals
from manyhands.training.engine import Engine
from manyhands.training.on_first import FirstWorker
from manyhands.training.run_record import RunRecord
from manyhands.training.saver import Saver
from manyhands.training.turns import Cluster, Turns
from manyhands.training.validating import Validations

AUTO = "auto"


@dataclass(frozen=True)
class Meeting:
    """Where islands meet, and which of them this cluster computes.

    at: the folder or the address; None: a folder of the run, for a run whose islands all are on this cluster. islands:
    the islands of this cluster; None: its share of them. accepts_other_numerics: whether this cluster may compute with
    another kind of CPU, for example, than the others. warm: the checkpoint of the warm steps, if this cluster has
    made them.
    """

    at: Location | None
    islands: tuple[int, ...] | None
    accepts_other_numerics: bool = False
    warm: Location | None = None

    def makes_warm_steps(self, recipe: Recipe) -> bool:
        """Return True if this cluster makes the warm steps of the recipe: the one that is to compute island 0 does."""
        return recipe.islands is not None and recipe.islands.warm_steps > 0 and 0 in (self.islands or ())


def meeting_of(
    recipe: Recipe,
    islands_at: str | Location | None,
    islands: Sequence[int] | str | None,
    *,
    accepts_other_numerics: bool = False,
) -> Meeting | None:
    """Return the meeting that the arguments of `train` describe, or None for a recipe without islands.

    Raises ConfigError.
    """
    if recipe.islands is None:
        for name, value in (("islands_at", islands_at), ("islands", islands)):
            if value is not None:
                raise ConfigError(
                    f"{name} has no effect, because the recipe has no islands",
                    expected="a recipe with islands=manyhands.Islands(...)",
                    got=f"{name} = {value!r}",
                )
        return None
    count, at = recipe.islands.count, None if islands_at is None else location_of(islands_at)
    if islands is None or islands == AUTO:
        return Meeting(at, tuple(range(count)) if at is None else None, accepts_other_numerics)
    given = [] if isinstance(islands, str) else list(islands)
    numbers = sorted({number for island in given if (number := whole_number(island)) is not None})
    if len(numbers) != len(given) or not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise ConfigError(
            "islands is not a list of islands", expected=f"auto, or numbers from 0 to {count - 1}", got=islands
        )
    if at is None and len(numbers) < count:
        raise ConfigError(
            "the other islands can't be reached",
            expected="islands_at, the place where all clusters meet",
            got=f"islands {', '.join(map(str, numbers))} of {count}",
        )
    return Meeting(at, tuple(numbers), accepts_other_numerics)


def refuse_start_over(meeting: Meeting | None, recipe: Recipe, *, anew: bool) -> None:
    """Raise ConfigError if a run that has met other clusters is to start over. anew: whether it is to start over."""
    if anew and recipe.islands is not None and recipe.islands.warm_steps:
        raise ConfigError(
            "a run with warm steps can't start over",
            expected="another run directory",
            hint="the warm steps are a run of their own in the run directory",
        )
    if anew and meeting is not None and meeting.at is not None:
        raise ConfigError(
            "a run can't start over where its islands meet other clusters",
            where=str(meeting.at),
            expected="another place to meet, and another run directory",
            hint="the rounds and states there belong to all clusters of the run: name a new place with islands_at",
        )


def make_rounds(
    engine: Engine,
    record: RunRecord,
    validations: Validations,
    saver: Saver,
    signals: StopSignals,
    steps: int,
    digest_every: int,
    meeting: Meeting,
) -> tuple[int, IslandFigures]:
    """Make the rounds of a run, with validations and checkpoints of the weights that all islands share. Collective.

    Return the peak memory in bytes, and the figures of the first worker.
    """
    given = engine.recipe.islands
    if given is None:
        raise InvariantError("the recipe has no islands")
    with ExitStack() as stack:
        folder = record.path / ISLANDS if record.path else Path(stack.enter_context(_shared_folder(engine)))
        _refuse_hidden_folder(engine, folder)
        first = FirstWorker(engine.group, lambda: signals.requested)
        stack.callback(first.close)
        store = RoundStore(meeting.at or folder / "store", record.report, stopped=lambda: first.is_stopping)
        all_ranks: list[Any] = all_gather_json(engine.group, record.run_id or token_hex(8), "start / cluster / control")
        every, accepts = engine.strategy.islands_state_every, meeting.accepts_other_numerics
        cluster = Cluster(folder, all_ranks[0], every, accepts)
        turns = Turns(engine, record, store, first, cluster, steps)
        stack.callback(turns.abandon)
        first.call(partial(_open, store, turns, engine, meeting, steps, folder), "opening the islands' store")
        record.report(given.described(turns.rounds))
        turns.begin(meeting.warm)
        leases = None
        if meeting.at is not None and engine.group.rank == 0:
            lost_after = engine.strategy.islands_lost_after
            leases = stack.enter_context(
                Leases(
                    store,
                    cluster.id,
                    given.count,
                    fixed=meeting.islands,
                    beat=min(5.0, lost_after / 6),
                    lost_after=lost_after,
                )
            )
        share = _Share(turns, first, meeting, leases, _Steps(engine, record, signals, leases))
        record.listeners.deliver()
        while turns.collected < len(turns.rounds):
            of = turns.rounds[turns.collected]
            share.compute(of)
            turns.collect(of, lambda of=of: share.compute_more(of))  # type: ignore[misc]
            if turns.collected == of.number:
                _after_round(engine, turns, of, record, validations, saver, digest_every)
            share.hand_over()
        turns.end()
        if saver.finish() is not None and engine.group.rank == 0:
            _remove_states(folder, meeting)
        figures: list[Any] = all_gather_json(engine.group, turns.figures(), "end / islands / control")
    return share.steps.memory.peak_bytes, IslandFigures(*figures[0])


def _remove_states(folder: Path, meeting: Meeting) -> None:
    """Delete what only an unfinished run needs. The last checkpoint has all that is left of the islands."""
    for name in ("at-rest", "start", *(["store"] if meeting.at is None else [])):
        shutil.rmtree(folder / name, ignore_errors=True)


def _open(store: RoundStore, turns: Turns, engine: Engine, meeting: Meeting, steps: int, folder: Path) -> None:
    """Create or compare the record of the run in the store. On the first worker. Raises ConfigError.

    folder: of this cluster, which remembers the place.
    """
    facts = {"steps": str(steps), "rounds": str(len(turns.rounds)), **recipe_facts(engine.recipe)}
    numerics = {f"numerics: {name}": value for name, value in engine.identity.items()}
    record = store.read_record() if meeting.accepts_other_numerics else None
    if record is not None:
        numerics = {name: value for name, value in record.facts.items() if name.startswith("numerics: ")}
    known, place = folder / "place", str(meeting.at)
    is_known = meeting.at is not None and known.exists() and known.read_text() == place
    store.open(turns.fingerprint, facts | numerics, engine.recipe.num_islands, is_known=is_known)
    write_atomic(known, place)


class _Share:
    """The islands that this cluster computes. All methods are collective.

    leases: on the first worker, if there may be other clusters.
    """

    def __init__(
        self, turns: Turns, first: FirstWorker, meeting: Meeting, leases: Leases | None, steps: _Steps
    ) -> None:
        self._turns, self._first, self._meeting, self._leases = turns, first, meeting, leases
        self.steps, self._is_shared = steps, meeting.at is not None and meeting.islands is None

    def compute(self, of: Round) -> None:
        """Make the turns of this cluster's islands in a round."""
        # The island that the engine holds comes first, because loading another one takes time.
        for island in sorted(self._mine(), key=lambda island: (island != self._turns.island, island)):
            self._turns.bring(island, of.number, self.steps.make)

    def compute_more(self, of: Round) -> None:
        """Make the turns of islands that this cluster has taken over since the round began."""
        if self._is_shared:
            self.compute(of)

    def hand_over(self) -> None:
        """Leave islands to clusters that have joined. Publish their states first, which saves the others work."""
        if not self._is_shared:
            return
        for island in self._first.call(self._surplus, "sharing the islands"):
            self._turns.publish_state_of(island)
            self._first.call(lambda island=island: self._release(island), f"releasing island {island}")  # type: ignore[misc]

    def _mine(self) -> list[int]:
        if self._meeting.islands is not None:
            return list(self._meeting.islands)
        found: list[int] = self._first.call(self._take, "sharing the islands")
        return found

    def _take(self) -> list[int]:
        if self._leases is None:
            raise InvariantError("the first worker has no leases")
        self._leases.wait_observed(1.0)
        for island in sorted(self._leases.wanted() - self._leases.held()):
            self._leases.take(island)
        return sorted(self._leases.held())

    def _surplus(self) -> list[int]:
        return [] if self._leases is None else sorted(self._leases.held() - self._leases.wanted())

    def _release(self, island: int) -> None:
        if self._leases is not None:
            self._leases.release(island)


class _Steps:
    """Makes steps, and records those that were not recorded before.

    memory: measures the first steps.
    """

    def __init__(self, engine: Engine, record: RunRecord, signals: StopSignals, leases: Leases | None) -> None:
        self._engine, self._record, self._signals, self._leases = engine, record, signals, leases
        self.memory, self._made = PeakMemory(), 0
        self._recorded = record.last_steps()

    def make(self, until: int) -> None:
        """Make the engine's next step. until: the number of steps for which loader processes read ahead."""
        engine, record = self._engine, self._record
        if self._leases is not None:
            self._leases.describe(f"island {engine.island}, step {engine.next_step}")
        batch = next(engine.batches(until))
        with ExitStack() as watched:
            if self._made < MEASURED_STEPS:
                watched.enter_context(self.memory)
            engine.stop_requested = self._signals.requested or record.listeners.stop_reason is not None
            metrics = engine.step(batch)
        self._made += 1
        if self._made == 1 and (changed := engine.buffers.report()) is not None:
            record.report(changed)
        if metrics.step > self._recorded.get(engine.island, 0):
            self._recorded[engine.island] = metrics.step
            record.add(metrics)
        record.listeners.deliver()
        if engine.stop_requested:
            # Only the first worker has listeners. All workers raise the same error.
            all_ranks: list[Any] = all_gather_json(
                engine.group, record.listeners.stop_reason, "stop / reason / control"
            )
            reason, where = all_ranks[0], f"step {metrics.step} of island {engine.island}"
            record.event("stopped", step=metrics.step, island=engine.island, **({"why": reason} if reason else {}))
            raise Interrupted(
                f"a listener stopped the run after {where}: {reason}" if reason else f"stopped after {where}",
                where="the states of this cluster's islands are in its run directory",
                hint="to continue, start the run again with the same run directory; it repeats the steps since the "
                "island's last state",
            )


def _after_round(
    engine: Engine,
    turns: Turns,
    of: Round,
    record: RunRecord,
    validations: Validations,
    saver: Saver,
    digest_every: int,
) -> None:
    """Validate and save the weights that all islands share after a round, if that is due. Collective."""
    with turns.result(of):
        made = range(of.start + 1, of.end + 1)
        if of.is_last or any(step % digest_every == 0 for step in made):
            record.add_digest(of.end, engine.digest())
        is_best = validations.after_steps(made)
        saver.after_round(made, last=of.is_last, is_best=is_best)
    record.listeners.deliver()


def _refuse_hidden_folder(engine: Engine, folder: Path) -> None:
    """Create the folder. Raise ConfigError on all workers if one of them doesn't see it. Collective."""
    if engine.group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    engine.group.barrier("start / folder of islands / control")
    all_ranks: list[Any] = all_gather_json(engine.group, folder.is_dir(), "start / folder of islands / control")
    if not all(all_ranks):
        raise ConfigError(
            "the workers of this cluster don't all see its run directory",
            where=str(folder),
            expected="a run directory on a file system that all hosts of the cluster share: the states of its islands "
            "are there",
            got=f"workers {', '.join(str(rank) for rank, sees in enumerate(all_ranks) if not sees)} don't see it",
        )


@contextmanager
def _shared_folder(engine: Engine) -> Iterator[str]:
    """Yield a temporary folder that all workers of this host use, and delete it at the end."""
    with TemporaryDirectory(prefix="manyhands-islands-") if engine.group.rank == 0 else nullcontext("") as mine:
        all_ranks: list[Any] = all_gather_json(engine.group, mine, "start / folder of islands / control")
        yield all_ranks[0]
        engine.group.barrier("end / folder of islands / control")
