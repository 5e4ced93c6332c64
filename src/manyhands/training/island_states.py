"""The saved states of islands: where they are, and which of them a cluster can continue from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from manyhands.checkpoint.format import list_checkpoints
from manyhands.errors import CheckpointError
from manyhands.islands import Round
from manyhands.rounds.store import RoundStore
from manyhands.storage.files import names_in, read_bytes
from manyhands.storage.location import Address, Location, StoreError, location_of
from manyhands.training.on_first import FirstWorker


class State(NamedTuple):
    """A saved state of an island. number: of the last round whose turn it includes; 0 before the first round."""

    number: int
    path: Location
    is_complete: bool  # False if it is at rest


class IslandStates:
    """The states of a run's islands. All methods are collective: the first worker looks, and all get what it found.

    folder: this cluster's folder for islands. shares_start: True if clusters that begin need the state before the first
    round from another cluster. cluster: the id of this cluster's run.
    """

    def __init__(
        self,
        folder: Path,
        store: RoundStore,
        first: FirstWorker,
        rounds: Sequence[Round],
        cluster: str,
        *,
        shares_start: bool,
    ) -> None:
        self._folder, self._store, self._first, self._cluster = folder, store, first, cluster
        self._by_applied = {each.applied: each.number for each in rounds}
        self._by_end = {each.end: each.number for each in rounds} | {rounds[0].start: 0}
        self.start: Location = (store.location if shares_start else folder) / "start"

    def at_rest(self, island: int) -> Path:
        """Return the folder for the states at rest of an island on this cluster."""
        return self._folder / "at-rest" / f"island-{island}"

    def published(self, island: int) -> Location:
        """Return the folder for the complete states of an island that this cluster publishes."""
        return self._store.state_root(island) / self._cluster

    def of(self, island: int, like: int) -> list[State]:
        """Return the states of an island. like: the island whose complete states serve it."""

        def found() -> list[tuple[int, str, bool]]:
            roots = [self.start, *self._roots(like)]
            at_rest = self._listed(self.at_rest(island), self._by_applied)
            complete = [each for root in roots for each in self._listed(root, self._by_end)]
            return [(number, str(path), False) for number, path in at_rest] + [
                (number, str(path), True) for number, path in complete
            ]

        return self._looked(found, f"states of island {island}")

    def newest_complete(self, count: int) -> State | None:
        """Return the newest complete state of any of `count` islands in the store, or None."""

        def found() -> list[tuple[int, str, bool]]:
            listed = [
                each
                for island in range(count)
                for root in self._roots(island)
                for each in self._listed(root, self._by_end)
            ]
            return [(number, str(path), True) for number, path in listed]

        states = self._looked(found, "states of all islands")
        return max(states, default=None, key=lambda each: each.number)

    def oldest_needed(self, count: int) -> int:
        """Return the number of the oldest round from which all islands have a complete state. On the first worker."""
        newest = [
            max((number for root in self._roots(island) for number, _ in self._listed(root, self._by_end)), default=0)
            for island in range(count)
        ]
        return min(newest)

    def wait_for_start(self) -> State:
        """Wait until another cluster has published the state before the first round."""

        def found() -> list[tuple[int, str, bool]]:
            return [(number, str(path), True) for number, path in self._listed(self.start, self._by_end)]

        while not (states := self._looked(found, "waiting for the warm steps")):
            self._first.call(partial(time.sleep, 1.0), "waiting for the warm steps")
        return states[0]

    def on_disk(self, state: State) -> Location:
        """Return where the state is on a disk, after copying it from an object store if it is there."""
        if not isinstance(state.path, Address):
            return state.path
        folder, source = self._folder / "fetched", state.path

        def fetch() -> str:
            shutil.rmtree(folder, ignore_errors=True)
            root = source.parent
            names = self._store.steady("list a state", root.files)
            for name in names:
                if name.startswith((f"{source.name}/", "frozen-")):
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    content = self._store.steady("give a state", partial(read_bytes, str(root / name)))
                    path.write_bytes(content)
            return str(folder / source.name)

        return location_of(self._first.call(fetch, f"fetching the state after round {state.number}"))

    def _looked(self, found: Callable[[], list[tuple[int, str, bool]]], what: str) -> list[State]:
        listed = self._first.call(lambda: self._store.steady(what, found), what)
        return [State(number, location_of(path), is_complete) for number, path, is_complete in listed]

    def _roots(self, island: int) -> list[Location]:
        root = self._store.state_root(island)
        return [root / cluster for cluster in names_in(root)]

    def _listed(self, root: Location, numbers: dict[int, int]) -> list[tuple[int, Location]]:
        """Return the numbers of rounds and the folders of the checkpoints below `root`. Raises OSError."""
        try:
            listed = list_checkpoints(root)
        except CheckpointError as error:
            raise StoreError(str(error), error.hint or "") from error
        return [(numbers[step], path) for step, path in listed if step in numbers]
