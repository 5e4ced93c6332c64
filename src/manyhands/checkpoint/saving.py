"""A folder that all workers write at once, in the background: it appears whole, by one rename, or not at all.

Every worker writes its files into a hidden folder and then, as a file, what the manifest must say of them. When all of
those are there worker 0 writes the manifest and renames the folder. Nothing of this is a collective call, so training
goes on meanwhile.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from manyhands.checkpoint.publish import as_checkpoint_error, publish, remove_partial
from manyhands.comm.group import Group
from manyhands.engine.control import gather_json
from manyhands.errors import CheckpointError, ManyhandsError

LOOKS_EVERY_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Of a folder. write: writes this worker's files into the folder that it is given, and returns what worker 0 must
    know to make the manifest from everyone's; published: called on worker 0, when it's there."""

    write: Callable[[Path], dict[str, Any]]
    manifest_of: Callable[[list[dict[str, Any]]], BaseModel]
    published: Callable[[], None] = lambda: None


class Saving:
    """The folder `final` on its way, in place of what is there. Making one is collective, and so is `wait`."""

    def __init__(self, final: Path, group: Group, contents: Contents, tag: str) -> None:
        self.final = final
        self._group, self._contents, self._tag = group, contents, tag
        self._partial = final.with_name(f".{final.name}.partial")
        self._error: BaseException | None = None
        self._is_written = threading.Event()
        self._is_abandoned = threading.Event()
        if group.rank == 0:
            try:
                with as_checkpoint_error(self._partial):
                    remove_partial(final.parent)
                    self._partial.mkdir(parents=True)
            except CheckpointError as error:
                self._error = error
        group.barrier(f"{tag} begins / control")
        self._thread = threading.Thread(target=self._save, name="manyhands-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this worker has nothing more to do for it."""
        return not self._thread.is_alive()

    def wait_written(self) -> None:
        """Until this worker's files are written, or can't be: what it saves may change again."""
        self._is_written.wait()

    def wait(self) -> Path:
        """Until it's published. Raises the CheckpointError of one worker on all of them; then nothing is published."""
        self._is_written.wait()
        self._raise_any(f"{self._tag} written / control")
        self._thread.join()  # everyone's part is there: it only has to be published
        self._raise_any(f"{self._tag} published / control")
        return self.final

    def abandon(self) -> None:
        """Nobody waits for it any more: it's published if all have written, else a part of it is left hidden."""
        self._is_abandoned.set()

    def _raise_any(self, tag: str) -> None:
        said = [*map(str, _words_of(self._error))]
        everyone: list[Any] = gather_json(self._group, said, tag)
        for rank, words in enumerate(everyone):
            if words:
                self._is_abandoned.set()
                self._thread.join()
                if rank == self._group.rank and self._error is not None:
                    raise self._error
                what, where, hint = words
                raise CheckpointError(what, where=where, hint=hint)

    def _save(self) -> None:
        try:
            if self._error is None:
                with as_checkpoint_error(self._partial):
                    mine = self._contents.write(self._partial)
                    self._put(f"part-{self._group.rank}.json", json.dumps(mine))
            self._is_written.set()
            if self._group.rank == 0 and self._error is None:
                self._publish()
        except BaseException as error:
            self._error = error
            with suppress(OSError):
                (self._partial / f"failed-{self._group.rank}").touch()
        finally:
            self._is_written.set()

    def _publish(self) -> None:
        ranks = range(self._group.size)
        while not all((self._partial / f"part-{rank}.json").exists() for rank in ranks):
            if self._is_abandoned.is_set() or any((self._partial / f"failed-{rank}").exists() for rank in ranks):
                return
            time.sleep(LOOKS_EVERY_SECONDS)
        with as_checkpoint_error(self.final):
            everyone = []
            for rank in ranks:
                part = self._partial / f"part-{rank}.json"
                everyone.append(json.loads(part.read_text()))
                part.unlink()
            publish(self._partial, self.final, self._contents.manifest_of(everyone))
            self._contents.published()

    def _put(self, name: str, text: str) -> None:
        """A file that is there with all of its text, or not at all."""
        hidden = self._partial / f".{name}"
        hidden.write_text(text)
        os.rename(hidden, self._partial / name)


def _words_of(error: BaseException | None) -> tuple[str, ...]:
    """What an error says, to be said by others, too; nothing of none."""
    if error is None:
        return ()
    if isinstance(error, ManyhandsError):
        return error.what, error.where or "", error.hint or ""
    return f"the checkpoint can't be written: {type(error).__name__}: {error}", "", "see the worker's log"
