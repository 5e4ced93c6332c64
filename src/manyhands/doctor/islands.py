"""Reports how far the islands of a run are, who computes them, and whom a round waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from manyhands.checkpoint.format import list_checkpoints
from manyhands.errors import ConfigError
from manyhands.formatting import format_seconds
from manyhands.rounds.leases import BEAT_SECONDS, Holder, Observer
from manyhands.rounds.store import RoundStore
from manyhands.storage.files import names_in
from manyhands.storage.location import Location

WATCHED_SECONDS = 3 * BEAT_SECONDS
"""The time for which clusters are observed. A cluster at work shows a sign of life every BEAT_SECONDS."""

SILENT_SECONDS = 2.5 * BEAT_SECONDS


@dataclass(frozen=True)
class IslandReport:
    """What is known about an island.

    holder: the cluster that computes it, or None. is_silent: True if that cluster showed no sign of life while it was
    observed. is_here: True if its file of the current round is there. state: the step of its newest published state, or
    None.
    """

    island: int
    holder: Holder | None
    is_silent: bool
    is_here: bool
    state: int | None


@dataclass(frozen=True)
class RoundsReport:
    """How far the islands of a run are.

    round: the number of the newest round of which there is a file; 0 before the first one. last: the number of the last
    round; 0 if the record lacks it. is_complete: True if all files of the newest round are there. facts: the recipe,
    for people.
    """

    round: int
    last: int
    is_complete: bool
    islands: tuple[IslandReport, ...]
    facts: dict[str, str]

    @property
    def is_over(self) -> bool:
        """Return True if all files of the last round are there."""
        return self.is_complete and self.round == self.last

    @property
    def summary(self) -> str:
        """Describe the state of the run in one sentence."""
        if not self.round:
            return "no island has published a round yet"
        if self.is_over:
            return f"the run is complete: every island has published the last round, {self.round}"
        if self.is_complete:
            return f"all {len(self.islands)} islands have published round {self.round} of {self.last}"
        missing = [str(each.island) for each in self.islands if not each.is_here]
        return f"round {self.round} of {self.last} waits for the island{'s' * (len(missing) > 1)} {', '.join(missing)}"

    @property
    def advice(self) -> str:
        """Say what to do."""
        if self.is_over:
            return "nothing to do: the last checkpoint in a cluster's run directory has the result"
        alone = [str(each.island) for each in self.islands if each.holder is None]
        silent = [each for each in self.islands if each.is_silent and each.holder is not None]
        if silent:
            hosts = ", ".join(sorted({each.holder.host for each in silent if each.holder is not None}))
            islands = ", ".join(str(each.island) for each in silent)
            return (
                f"look at {hosts}: no sign of life for the islands {islands}; clusters with --islands auto take them "
                "over, and otherwise start the cluster again with its run directory, or another one with --islands"
            )
        if alone and not self.is_complete:
            return f"start a cluster for the islands {', '.join(alone)}: nobody computes them"
        return "nothing to do"


def islands_report(
    location: Location,
    report: Callable[[str], None],
    *,
    seconds: float = WATCHED_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> RoundsReport:
    """Observe the place where islands meet for some seconds. Raises ConfigError if no islands meet there."""
    store = RoundStore(location, report, patience=60.0)
    record = store.read_record()
    if record is None:
        raise ConfigError(
            "no islands meet here",
            where=str(location),
            expected="the folder or address that --islands-at names, with islands.json",
        )
    observer = Observer(store, record.count, lost_after=SILENT_SECONDS)
    last = int(rounds) if (rounds := record.facts.get("rounds", "")).isdecimal() else 0
    ends = time.monotonic() + seconds
    while True:
        observer.observe()
        newest = max(store.rounds(), default=0)
        present = store.present(newest) if newest else set()
        is_complete = len(present) == record.count
        if time.monotonic() >= ends or (is_complete and newest == last):
            break
        pause(BEAT_SECONDS / 4)
    islands = []
    for island, holder in observer.holders().items():
        root = store.state_root(island)
        steps = [step for cluster in names_in(root) for step, _ in list_checkpoints(root / cluster)]
        is_silent = holder is not None and holder.is_lost
        islands.append(IslandReport(island, holder, is_silent, island in present, max(steps, default=None)))
    return RoundsReport(newest, last, is_complete, tuple(islands), record.facts)


def described(report: IslandReport) -> tuple[str, str, str, str]:
    """Return what a table shows of an island: the island, its file, its state, and who computes it."""
    holder = report.holder
    who = "nobody" if holder is None else f"{holder.host} ({holder.cluster}): {holder.doing}"
    if report.is_silent and holder is not None:
        who += f"; silent for {format_seconds(holder.seconds)}"
    here = "published" if report.is_here else "missing"
    return str(report.island), here, "none" if report.state is None else f"step {report.state}", who
