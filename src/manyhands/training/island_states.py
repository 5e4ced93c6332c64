"""The saved states of islands: where they are, and which of them a cluster can continue from."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from manyhands.checkpoint.format import MANIFEST, list_checkpoints
from manyhands.checkpoint.publish import remove_checkpoint, remove_partial
from manyhands.errors import CheckpointError
from manyhands.islands import Round
from manyhands.rounds.store import RoundStore
from manyhands.storage.files import names_in
from manyhands.storage.location import Address, Location, StoreError, location_of
from manyhands.training.on_first import FirstWorker

_FILE = re.compile(
    r"(step-\d{8,}|frozen-[0-9a-f]{16})/([0-9a-f]{16}/)?(manifest\.json|worker-\d+\.safetensors)", re.ASCII
)
"""The names of a state's files. Other names, which others may have written, could lead out of this cluster's folder."""

NO_ISLAND = (1 << 62) - 1
"""The island of a checkpoint that has the state of none."""


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

    def to_continue(self, island: int, states: Sequence[State], collected: int) -> State:
        """Return that of an island's states from which the fewest turns lead to the one after round `collected`.

        Raises CheckpointError if there is none.
        """
        rested = [each for each in states if not each.is_complete and each.number == collected]
        complete = [each for each in states if each.is_complete and each.number <= collected]
        chosen = rested[0] if rested else max(complete, default=None, key=lambda each: each.number)
        if chosen is None:
            raise CheckpointError(
                f"there is no state of island {island} from which its rounds can be computed",
                where=str(self._folder),
                hint="start the run anew in another folder",
            )
        return chosen

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

        def newest(island: int) -> int:
            roots = self._roots(island)
            found = [number for root in roots for number, _ in self._listed(root, self._by_end)]
            self._store.check_mounted()
            return max(found, default=0)

        return min(self._store.steady("list states", partial(newest, island)) for island in range(count))

    def prune(self, count: int, before: int) -> None:
        """Delete the states, also of clusters that are gone, that need files of rounds with a number below `before`.

        On the first worker. These files were deleted, so that nothing can be computed from such a state.
        """
        for island in range(count):
            for root in self._roots(island):
                for number, path in self._listed(root, self._by_end):
                    if number + 1 < before:
                        with suppress(FileNotFoundError):  # another cluster was first
                            remove_checkpoint(path)

    def remove_leftovers(self, count: int) -> None:
        """Delete copies, and what interrupted saves of this cluster left, of any of `count` islands. On the first
        worker, and while no state is being saved.
        """
        shutil.rmtree(self._folder / "fetched", ignore_errors=True)
        for island in range(count):
            remove_partial(self.at_rest(island))
            self._store.steady("delete partial states", partial(remove_partial, self.published(island)))

    def wait_for_start(self) -> State:
        """Wait until another cluster has published the state before the first round."""

        def found() -> list[tuple[int, str, bool]]:
            return [(number, str(path), True) for number, path in self._listed(self.start, self._by_end)]

        while not (states := self._looked(found, "the warm steps")):
            self._first.call(partial(time.sleep, 1.0), "the warm steps")
        return states[0]

    def on_disk(self, state: State) -> Location | None:
        """Return where the state is on this cluster, after copying it if it is in the store.

        Return None if another cluster has deleted it meanwhile.
        """
        if not state.is_complete or state.path.parent == self._folder / "start":
            return state.path
        folder, root, name = self._folder / "fetched", state.path.parent, state.path.name

        def fetch() -> str | None:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._copy(root, name, folder)
            except FileNotFoundError:
                return None
            return str(folder / name)

        found: str | None = self._first.call(fetch, f"fetching the state after round {state.number}")
        return None if found is None else location_of(found)

    def _copy(self, root: Location, name: str, folder: Path) -> None:
        """Copy a checkpoint in `root`, and the frozen parameters beside it. Raises FileNotFoundError if it is gone."""

        def listed() -> list[str]:
            names = root.files() if isinstance(root, Address) else _files_below(root)
            self._store.check_mounted()
            return [each for each in names if _FILE.fullmatch(each) and each.startswith((f"{name}/", "frozen-"))]

        for each in self._store.steady("list a state", listed):
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            self._store.copy(root / each, folder / each, "give a state")
        if not (folder / name / MANIFEST).exists():
            raise FileNotFoundError(str(root / name))

    def _looked(self, found: Callable[[], list[tuple[int, str, bool]]], what: str) -> list[State]:
        def checked() -> list[tuple[int, str, bool]]:
            states = found()
            self._store.check_mounted()
            return states

        listed = self._first.call(lambda: self._store.steady(what, checked), what)
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


def _files_below(root: Path) -> list[str]:
    """Return the paths of all files in the folder, relative to it."""
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
