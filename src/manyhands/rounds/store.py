"""The place where islands meet: one file for each round and island, in a shared folder or an object store.

    islands.json                            whose rounds these are: the recipe and the number of islands
    rounds/00000012/island-3.safetensors    the result of an island in a round; .safetensors.zst if it is compressed
    states/island-3/                        checkpoints of islands
    clusters/, leases/                      who is at work, see `rounds.leases`

A round's file is a pure function of recipe, round and island. So it does not matter who writes it: in a folder the
first writer wins, and in an object store two writers write the same content. Both show a file only when it is complete.
Names in the store are from others: a name that Manyhands does not give is reported, and neither followed nor deleted.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from manyhands.errors import ConfigError, InvariantError
from manyhands.formatting import printable
from manyhands.rounds.outages import Outages, http_status
from manyhands.storage.atomic import is_temporary, open_atomic, write_atomic
from manyhands.storage.files import make_folder
from manyhands.storage.location import AHEAD_BYTES, Address, Location, StoreError
from manyhands.storage.sealed import seal, unseal
from manyhands.storage.untrusted import open_inside, read_inside

_T = TypeVar("_T")

ISLANDS_FORMAT = 1

ISLANDS = "islands.json"

_ROUND = re.compile(r"\d{8,}")
_ISLAND = re.compile(r"island-(0|[1-9]\d{0,5})\.safetensors(\.zst)?")

_MOST_SMALL_BYTES = 1 << 20
"""The maximum size of a small JSON file that is read."""

_MOST_IN_MEMORY_BYTES = 64 << 20
"""The maximum size of a file that is sent as one request. A larger file is sent in parts."""

_MOST_FOREIGN_REPORTS = 5

_PRUNED = "check whether other programs delete or change files there"


@dataclass(frozen=True)
class IslandsRecord:
    """The content of islands.json. facts: the recipe, name -> value, for people. count: the number of islands."""

    format: int
    fingerprint: str
    facts: dict[str, str]
    count: int


class RoundStore:
    """The rounds at a location. One thread and one background thread that uploads may use it at a time.

    report: takes a line for people, from any of these threads. patience, stopped: see `Outages`. bytes_up: the bytes of
    rounds' files that were sent. bytes_down: those of rounds' files and states that were received. A shared folder
    counts like a store.

    Every method repeats its operation while the store is out of reach, and raises ConfigError if the store can't be
    used, DataError if `patience` ends, and Interrupted if `stopped` becomes True.
    """

    def __init__(
        self,
        location: Location,
        report: Callable[[str], None],
        *,
        patience: float = math.inf,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.location, self.report = location, report
        self._outages = Outages(location, report, patience=patience, stopped=stopped)
        self._lock = threading.Lock()
        self._foreign: set[str] = set()
        self.bytes_up = self.bytes_down = 0

    def open(self, fingerprint: str, facts: Mapping[str, str], count: int, *, is_known: bool = False) -> None:
        """Create the record of these islands, or compare it with the one that is there.

        is_known: True if this cluster has opened the place before. A folder without a record is then not mounted, and
        is waited for.

        Raises ConfigError if the location belongs to another recipe or to something else, or if its record is damaged.
        """
        mine = IslandsRecord(ISLANDS_FORMAT, fingerprint, dict(sorted(facts.items())), count)
        if is_known:
            self._outages.steady("give islands.json", self.check_mounted)
        found = self.read_record()
        if found is None:
            self._refuse_other_files()
            self._outages.steady("create islands.json", lambda: self._create_record(mine))
            found = self.read_record()
        if found != mine:
            raise _difference(mine, found, self.location / ISLANDS)
        if isinstance(self.location, Path):
            _remove_temporary(self.location, ISLANDS)

    def read_record(self) -> IslandsRecord | None:
        """Return the record of the islands here, or None if there is none. Raises ConfigError if it is damaged."""
        path = self.location / ISLANDS
        content = self.read_small(ISLANDS)
        if content is None:
            return None
        try:
            fields = json.loads(content)
            found = fields.get("format")
            if isinstance(found, int) and found != ISLANDS_FORMAT:
                raise ConfigError(
                    "the islands' record has another format",
                    where=str(path),
                    expected=ISLANDS_FORMAT,
                    got=found,
                    hint="use one version of Manyhands on all clusters",
                )
            record = IslandsRecord(**unseal(fields))
            facts_are_text = all(isinstance(text, str) for pair in record.facts.items() for text in pair)
            if not (isinstance(record.fingerprint, str) and isinstance(record.count, int) and facts_are_text):
                raise ValueError("its fields have wrong types")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                "the islands' record is damaged",
                where=str(path),
                got=error,
                hint="if no other run uses this place, delete its files, and start again",
            ) from error
        return record

    def rounds(self) -> list[int]:
        """Return the numbers of all rounds of which there is a file, sorted."""
        return sorted({number for number, _ in self._files("rounds", "list the rounds")})

    def present(self, round: int) -> set[int]:
        """Return the islands whose file of the round is there."""
        return set(self._names(round))

    def publish(self, round: int, island: int, path: Path) -> None:
        """Make a file of this machine, which ends with .safetensors or .safetensors.zst, the island's file of a round.

        The file appears complete or not at all. If there is one already, it stays.
        """
        name = _file_name(island, path)
        size = path.stat().st_size
        place = self.location / "rounds" / _round_name(round)
        what = f"take the file of island {island} in round {round}"
        if isinstance(place, Address):
            sent = self._outages.steady(what, lambda: _upload(path, place / name), size)
        else:
            sent = self._outages.steady(what, lambda: self._link(path, place, name), size)
        if sent:
            with self._lock:
                self.bytes_up += size

    def fetch(self, round: int, island: int, to: Path) -> Path:
        """Copy a file of a round into the folder `to`, under its own name, and return its path.

        An outage continues where it interrupted the copy. Raises FileNotFoundError if there is no such file.
        """
        name = self._name(round, island)
        source, target = self.location / "rounds" / _round_name(round) / name, to / name
        self.copy(source, target, f"give the file of island {island} in round {round}")
        return target

    def copy(self, source: Location, target: Path, what: str) -> None:
        """Copy a file of the store to `target`, as `fetch` does. what: the operation, for people."""
        size = self.steady(what, lambda: _size(source))
        with open_atomic(target) as file:
            for start in range(0, size, AHEAD_BYTES):
                end = min(start + AHEAD_BYTES, size)
                part = self.steady(what, lambda start=start, end=end: _range(source, start, end), end - start)  # type: ignore[misc]
                file.write(part)
                with self._lock:
                    self.bytes_down += len(part)
        if not size:  # open_atomic creates no empty file
            write_atomic(target, b"")

    def state_root(self, island: int) -> Location:
        """Return the folder of the checkpoints of an island's state."""
        return self.location / "states" / f"island-{island}"

    def prune(self, before: int) -> None:
        """Delete the files of all rounds with a number below `before`, and what killed writers left in later rounds."""
        root = self.location / "rounds"
        if isinstance(root, Address):
            for number, name in self._files("rounds", "list the rounds"):
                if number < before:
                    path = root / _round_name(number) / name
                    self._outages.steady(f"delete round {number}", path.unlink)
        else:
            self._outages.steady("delete old rounds", lambda: self._prune_folder(root, before))

    def steady(self, what: str, call: Callable[[], _T], size: int = 0) -> _T:
        """Return the result of an operation on the location, as `Outages.steady` does.

        A missing file counts only if the location itself is there. A missing folder may look like an empty one, so a
        `call` that lists files ends with `check_mounted`.
        """

        def checked() -> _T:
            try:
                return call()
            except FileNotFoundError:
                self.check_mounted()
                raise

        return self._outages.steady(what, checked, size)

    def read_small(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        with suppress(FileNotFoundError):
            content: bytes = self._outages.steady(f"give {name}", lambda: read_small(self.location, name))
            return content
        return None

    def note_foreign(self, name: str) -> None:
        """Report once that the file `name`, a path below the location, is ignored."""
        with self._lock:
            is_new = name not in self._foreign and len(self._foreign) < _MOST_FOREIGN_REPORTS
            if is_new:
                self._foreign.add(name)
        if is_new:
            self.report(f"a file in the islands' store is not one of its files, and is ignored: {printable(name)}")

    def _create_record(self, record: IslandsRecord) -> None:
        text = seal(asdict(record))
        if isinstance(self.location, Address):
            _in_bucket(lambda: write_atomic(self.location / ISLANDS, text))
            return
        make_folder(self.location)
        with suppress(FileNotFoundError):  # another cluster was first, and has deleted our temporary file
            write_atomic(self.location / ISLANDS, text, first_wins=True)

    def _refuse_other_files(self) -> None:
        """Raise ConfigError if the location has visible files, but no islands.json."""
        names = self._outages.steady("list its files", lambda: _names_below(self.location))
        others = [name for name in names if not name.startswith(".")]
        if others and self.read_small(ISLANDS) is None:  # otherwise another cluster has just created it
            raise ConfigError(
                "the place for islands holds something else",
                where=str(self.location),
                expected="an empty place, or one with islands.json",
                got=", ".join(printable(name) for name in others[:3]) + (", ..." if len(others) > 3 else ""),
                hint="choose an empty folder, or a new name below this one: every cluster must name the same place",
            )

    def _name(self, round: int, island: int) -> str:
        name = self._names(round).get(island)
        if name is None:
            raise FileNotFoundError(f"round {round} has no file of island {island}")
        return name

    def _names(self, round: int) -> dict[int, str]:
        """Return the islands' files of a round: island -> name."""
        found = self._files(f"rounds/{_round_name(round)}", f"list round {round}")
        return {int(match[1]): name for _, name in reversed(found) if (match := _ISLAND.fullmatch(name))}

    def _files(self, below: str, what: str) -> list[tuple[int, str]]:
        """Return (round, name) of all files of rounds below a folder, sorted. Reports other files."""
        names = self._outages.steady(what, lambda: self._list(below))
        found = []
        for name in names:
            folder, _, file = name.removeprefix("rounds/").partition("/")
            if _ROUND.fullmatch(folder) and _round_name(int(folder)) == folder and _ISLAND.fullmatch(file):
                found.append((int(folder), file))
            elif not is_temporary(file):
                self.note_foreign(name)
        return sorted(found)

    def _list(self, below: str) -> list[str]:
        """Return the paths of all files in `rounds`, or in one of its folders, without following links."""
        if isinstance(self.location, Address):
            return [f"{below}/{name}" for name in (self.location / below).files()]
        self.check_mounted()
        if below != "rounds":
            return [f"{below}/{name}" for name in _regular_files(self.location / below)]
        names = []
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.location / below):
                inside = _regular_files(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else None
                names += [f"{below}/{entry.name}"] if inside is None else [f"{below}/{entry.name}/{n}" for n in inside]
        return names

    def check_mounted(self) -> None:
        """Raise StoreError if the shared folder is gone, and ConfigError if a folder in it is a link.

        If a shared folder is not mounted, its mount point is an empty folder. It must not be taken for a store without
        files, and nothing must be written to it.
        """
        if isinstance(self.location, Address):
            return
        if not (self.location / ISLANDS).exists():
            raise StoreError(f"{self.location}: it has no {ISLANDS} any more", "mount the shared folder again")
        for name in ("rounds", "clusters", "leases"):
            _refuse_link(self.location / name)

    def _link(self, path: Path, folder: Path, name: str) -> bool:
        """Copy a file into the folder of a round, unless it is there. Return whether it was copied."""
        self.check_mounted()
        is_there = os.path.lexists(folder / name)
        if not is_there:
            _refuse_link(folder)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with open_atomic(folder / name, first_wins=True) as file, path.open("rb") as source:
                    shutil.copyfileobj(source, file, AHEAD_BYTES)
            except FileNotFoundError:  # another cluster has published the file, or pruned the round
                if not os.path.lexists(folder / name):
                    raise StoreError(f"{folder / name}: its folder was deleted meanwhile", _PRUNED) from None
        _remove_temporary(folder, name)
        return not is_there

    def _prune_folder(self, root: Path, before: int) -> None:
        self.check_mounted()
        with suppress(FileNotFoundError):
            for entry in list(os.scandir(root)):
                if _ROUND.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # another cluster deletes it, too
                        _prune_round(Path(entry.path), is_old=int(entry.name) < before)


def read_small(location: Location, name: str) -> bytes:
    """Return the content of a small file. Raises OSError."""
    path = location / name
    if isinstance(path, Path):
        return read_inside(path, _MOST_SMALL_BYTES)
    try:
        return path.read_range(0, _MOST_SMALL_BYTES)
    except StoreError as error:
        if http_status(error) == 416:  # an empty object has no range
            return b""
        raise


def _refuse_link(folder: Location) -> None:
    """Raise ConfigError if a folder of the store is a link, which may lead anywhere."""
    if os.path.islink(str(folder)):
        raise ConfigError(
            "a folder in the islands' store is a link", where=str(folder), hint="delete the link, and start again"
        )


def _round_name(number: int) -> str:
    return f"{number:08d}"


def _file_name(island: int, path: Path) -> str:
    for suffix in (".safetensors", ".safetensors.zst"):
        if path.name.endswith(suffix):
            return f"island-{island}{suffix}"
    raise InvariantError("a round's file must be a safetensors file", where=str(path))


def _upload(path: Path, to: Address) -> bool:
    """Create an object from a file, unless it is there. Return whether it was created."""
    if to.is_file():
        return False
    _in_bucket(lambda: _send(path, to))
    return True


def _send(path: Path, to: Address) -> None:
    size = path.stat().st_size
    if size <= _MOST_IN_MEMORY_BYTES:
        to.upload(str(path))
        return
    with path.open("rb") as source, to.written(size) as file:  # `upload` would keep 500 MiB in memory
        shutil.copyfileobj(source, file, AHEAD_BYTES)


def _in_bucket(write: Callable[[], None]) -> None:
    """Call `write`. Raises StoreError if there is no bucket, for which some packages raise FileNotFoundError."""
    try:
        write()
    except FileNotFoundError as error:
        raise StoreError(
            f"{error}: there is no such bucket", "create the bucket first, or correct the address"
        ) from error


def _size(source: Location) -> int:
    if isinstance(source, Address):
        return source.size()
    with open_inside(source.parent, source.name) as file:
        return os.fstat(file.fileno()).st_size


def _range(source: Location, start: int, end: int) -> bytes:
    """Return bytes [start, end) of a file. Raises StoreError if there are fewer, because it was replaced meanwhile."""
    if isinstance(source, Address):
        part = source.read_range(start, end)
    else:
        with open_inside(source.parent, source.name) as file:
            file.seek(start)
            part = file.read(end - start)
    if len(part) != end - start:
        raise StoreError(f"{source}: it ended at byte {start + len(part)}", _PRUNED)
    return part


def _names_below(location: Location) -> list[str]:
    """Return names in a folder, sorted; none if it is missing. Raises NotADirectoryError for a file."""
    if isinstance(location, Address):
        return location.files()
    try:
        return sorted(os.listdir(location))
    except FileNotFoundError:
        return []


def _regular_files(folder: Path) -> list[str]:
    """Return the names in a folder. Names of anything but regular files end with a slash."""
    if folder.is_symlink():
        return ["/"]
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    return [entry.name if entry.is_file(follow_symlinks=False) else f"{entry.name}/" for entry in entries]


def _prune_round(folder: Path, *, is_old: bool) -> None:
    """Delete the files of a round if it is old, and otherwise the temporary files of files that are there."""
    names = os.listdir(folder)
    for name in names:
        is_leftover = is_temporary(name) and (is_old or _is_published(name, names))
        if is_leftover or (is_old and _ISLAND.fullmatch(name)):
            (folder / name).unlink(missing_ok=True)
    if is_old:
        with suppress(OSError):  # it holds something else
            folder.rmdir()


def _is_published(temporary: str, names: list[str]) -> bool:
    return any(temporary.startswith(f".{name}.") for name in names if _ISLAND.fullmatch(name))


def _remove_temporary(folder: Path, name: str) -> None:
    """Delete temporary files of a file that is there. Their writers, if they live, need them no longer."""
    with suppress(OSError):
        for found in os.listdir(folder):
            if is_temporary(found) and found.startswith(f".{name}."):
                (folder / found).unlink(missing_ok=True)


def _difference(mine: IslandsRecord, found: IslandsRecord | None, path: Location) -> ConfigError:
    if found is None:
        return ConfigError("the islands' record was deleted", where=str(path), hint="start all clusters again")
    rows = [
        (name, mine.facts.get(name, "nothing"), found.facts.get(name, "nothing"))
        for name in sorted({*mine.facts, *found.facts})
    ]
    rows = [*rows, ("count", str(mine.count), str(found.count)), ("fingerprint", mine.fingerprint, found.fingerprint)]
    different = [(name, expected, got) for name, expected, got in rows if expected != got]
    name, expected, got = different[0]
    return ConfigError(
        "the place for islands belongs to another recipe",
        where=str(path),
        expected=f"{name}: {expected}",
        got=f"{name}: {printable(got)}",
        hint="give all clusters the same recipe, or name another place"
        + (f"; also different: {', '.join(printable(name) for name, *_ in different[1:4])}" if different[1:] else ""),
    )
