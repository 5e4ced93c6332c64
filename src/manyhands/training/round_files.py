"""This cluster's copies of the files of rounds: those that it has written, and those of other clusters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from manyhands.errors import CheckpointError, NumericsError
from manyhands.islands import Islands, Round
from manyhands.rounds.file_compression import SUFFIX, compress, decompress
from manyhands.rounds.round_file import RoundFile
from manyhands.rounds.store import RoundStore
from manyhands.storage.atomic import remove_temporary_files
from manyhands.training.outer_step import OuterStep


class RoundFiles:
    """The files of rounds in a folder of this cluster. Methods are for the first worker, except for `path`.

    A mark beside a file, which ends with .own, says that this cluster has written it.
    """

    def __init__(
        self, folder: Path, store: RoundStore, outer: OuterStep, rounds: Sequence[Round], islands: Islands
    ) -> None:
        self._folder, self._store, self._outer, self._rounds = folder, store, outer, rounds
        self._count, self._compresses = islands.count, islands.compress

    def prepare(self, number: int, island: int) -> None:
        """Make place for a file that this cluster is to write."""
        path = self.path(number, island)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # another cluster's file, with which this one is compared
        path.with_name(f"{path.name}.own").touch()

    def remove(self, before: int | None = None) -> None:
        """Delete the files of rounds with a number below `before`, or of all rounds."""
        for folder in self._folder.glob("[0-9]*"):
            if before is None or int(folder.name) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def upload_leftovers(self) -> None:
        """Upload the files that an interrupted run has written."""
        oldest = min(self._store.rounds(), default=0)
        for folder in sorted(self._folder.glob("[0-9]*")):
            remove_temporary_files(folder)
            number = int(folder.name)
            present = self._store.present(number)
            for path in sorted(folder.glob("island-*.safetensors")):
                island = int(path.stem.removeprefix("island-"))
                is_own = (folder / f"{path.name}.own").exists()
                if is_own and island not in present and number >= oldest:
                    self.upload(number, island)

    def upload(self, number: int, island: int) -> None:
        """Publish a file. If another cluster was first, compare the two. Raises NumericsError."""
        path = self.path(number, island)
        if island in self._store.present(number):
            self._compare(number, island, path)
            return
        sent = path
        if self._compresses:
            sent = path.with_name(path.name + SUFFIX)
            compress(path, sent)
        self._store.publish(number, island, sent)

    def _compare(self, number: int, island: int, path: Path) -> None:
        layout, identity = self._outer.layout(self._rounds[number - 1]), self._outer.identity(number, island)
        try:
            other = self._fetch(number, island, path.with_name(f"other-{path.name}"))
        except FileNotFoundError:
            return
        mine, theirs = (RoundFile(each, layout, identity, verify=False).sha256 for each in (path, other))
        if mine != theirs:
            raise NumericsError(
                f"island {island} was computed twice, with different results",
                where=f"round {number}",
                expected=f"{theirs} (published first)",
                got=f"{mine} (here)",
                hint="use the same version of torch and the same kind of CPU (and GPU) on all clusters that may take "
                "over each other's islands, and data that don't change",
            )

    def fetch_missing(self, number: int) -> list[int]:
        """Copy the files of other clusters to this one. Return the islands whose files are not in the store yet."""
        missing = [island for island in range(self._count) if not self.path(number, island).exists()]
        present = self._store.present(number) if missing else set()
        for island in missing:
            if island in present:
                path = self.path(number, island)
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another cluster has deleted it meanwhile
                    self._fetch(number, island, path)
        return [island for island in missing if not self.path(number, island).exists()]

    def _fetch(self, number: int, island: int, path: Path) -> Path:
        """Copy a file of the store to `path`, uncompressed, and verify it.

        Raises FileNotFoundError, and CheckpointError, which names the file in the store.
        """
        layout, identity = self._outer.layout(self._rounds[number - 1]), self._outer.identity(number, island)
        folder = path.parent / "fetched"
        folder.mkdir(parents=True, exist_ok=True)
        fetched = plain = self._store.fetch(number, island, folder)
        try:
            if fetched.name.endswith(SUFFIX):
                plain = fetched.with_name(fetched.name.removesuffix(SUFFIX))
                decompress(fetched, plain, layout.file_bytes(identity))
            RoundFile(plain, layout, identity)
        except CheckpointError as error:
            error.where = f"{self._store.location}/rounds/{number:08}/{fetched.name}"
            raise
        plain.rename(path)
        return path

    def path(self, number: int, island: int) -> Path:
        """Return the path of an island's file of a round."""
        return self._folder / f"{number:08}" / f"island-{island}.safetensors"
