"""A folder that all workers write at once, in the background: it appears whole or not at all (see `publish`).

Every worker writes its files where they can't be seen yet and then, as a file, what the manifest must say of them. When
all of those are there worker 0 writes the manifest and publishes the folder. Nothing of this is a collective call, so
training goes on meanwhile.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from manyhands.checkpoint.address import Place, names_in, put_text
from manyhands.checkpoint.publish import as_checkpoint_error, prepare, publish, workplace
from manyhands.comm.group import Group
from manyhands.engine.control import gather_json
from manyhands.errors import CheckpointError, ManyhandsError

MOST_SECONDS_BETWEEN_LOOKS = 1.0
"""Before that it looks after a tenth of what it has waited: it is late by that much, and never looks often."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Of a folder. write: writes this worker's files into the folder that it is given, and returns what worker 0 must
    know to make the manifest from everyone's; published: called on worker 0, when it's there."""

    write: Callable[[Place], dict[str, Any]]
    manifest_of: Callable[[list[dict[str, Any]]], BaseModel]
    published: Callable[[], None] = lambda: None


class Saving:
    """The folder `final` on its way, in place of what is there. Making one is collective, and so is `wait`."""

    def __init__(self, final: Place, group: Group, contents: Contents, tag: str) -> None:
        self.final = final
        self._group, self._contents, self._tag = group, contents, tag
        self._error: BaseException | None = None
        self._is_written = threading.Event()
        self._is_abandoned = threading.Event()
        attempt = secrets.token_hex(8)  # worker 0's: no leftover of another attempt is taken for one of this
        self._partial = workplace(final, attempt)
        if group.rank == 0:
            try:
                with as_checkpoint_error(self._partial):
                    prepare(self._partial, final.parent)
            except CheckpointError as error:
                self._error = error
        everyone: list[Any] = gather_json(group, attempt, f"{tag} begins / control")
        self._partial = workplace(final, everyone[0])
        self._thread = threading.Thread(target=self._save, name="manyhands-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this worker has nothing more to do for it."""
        return not self._thread.is_alive()

    def wait_written(self) -> None:
        """Until this worker's files are written, or can't be: what it saves may change again."""
        self._is_written.wait()

    def wait(self) -> Place:
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
                    put_text(self._partial / f"part-{self._group.rank}.json", json.dumps(mine))
            self._is_written.set()
            if self._group.rank == 0 and self._error is None:
                self._publish()
        except BaseException as error:
            self._error = error
            with suppress(OSError):
                put_text(self._partial / f"failed-{self._group.rank}", "")
        finally:
            self._is_written.set()

    def _publish(self) -> None:
        with as_checkpoint_error(self.final):
            if self._have_all_written():
                parts = [self._partial / f"part-{rank}.json" for rank in range(self._group.size)]
                everyone = [json.loads(part.read_text()) for part in parts]
                for part in parts:
                    part.unlink()
                publish(self._partial, self.final, self._contents.manifest_of(everyone))
                self._contents.published()

    def _have_all_written(self) -> bool:
        """Wait until everyone has; False: someone can't, or nobody waits for it any more."""
        wanted = {f"part-{rank}.json" for rank in range(self._group.size)}
        failed = {f"failed-{rank}" for rank in range(self._group.size)}
        began = time.monotonic()
        while wanted - (names := names_in(self._partial)):
            if names & failed or self._is_abandoned.is_set():
                return False
            time.sleep(min(MOST_SECONDS_BETWEEN_LOOKS, 0.005 + (time.monotonic() - began) / 10))
        return True


def _words_of(error: BaseException | None) -> tuple[str, ...]:
    """What an error says, to be said by others, too; nothing of none."""
    if error is None:
        return ()
    if isinstance(error, ManyhandsError):
        return error.what, error.where or "", error.hint or ""
    return f"the checkpoint can't be written: {type(error).__name__}: {error}", "", "see the worker's log"
