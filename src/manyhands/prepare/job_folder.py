"""A job's folder: what its tasks leave for each other and for the next run.

.manyhands/
  lock                 one run at a time, or the ranks of one
  plan-IDENTITY        what the workers load
  IDENTITY/            a stage, by what it computes: part-N.runs or output files, part-N.done, part-N.bad
"""

from __future__ import annotations

import errno
import fcntl
import time
from typing import IO

from manyhands.addresses import is_local
from manyhands.errors import ConfigError
from manyhands.prepare.fingerprint import pickled
from manyhands.prepare.plan import Plan, Stage
from manyhands.prepare.storage import TEMPORARY, exists, join, make_folder, names_in, remove, replace_bytes

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some network file systems
_CLEARING_SECONDS = 20.0  # that the first rank may take to clear the folder


class JobFolder:
    """A job's folder, locked while it is open. Raises ConfigError if another run has it.

    together: several ranks have it open at once. The first to come clears it; what is in it later may be another's.
    """

    def __init__(self, path: str, *, together: bool = False) -> None:
        self.path, self.together = path, together
        self._alone = not together
        make_folder(path)
        self._lock: IO[bytes] | None = None
        if is_local(path):
            self._lock = open(join(path, "lock"), "a+b")  # noqa: SIM115
            self._alone = self._take(self._lock, fcntl.LOCK_EX)
            if not self._alone and not (together and self._take_with_others(self._lock)):
                self._lock.close()
                raise ConfigError(
                    "another run is at work here", where=path, hint="wait for it to end, or write to another folder"
                )

    @staticmethod
    def _take(lock: IO[bytes], how: int) -> bool:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _NO_LOCKS
        return True

    def _take_with_others(self, lock: IO[bytes]) -> bool:
        deadline = time.monotonic() + _CLEARING_SECONDS
        while not self._take(lock, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def prepare(self, plan: Plan) -> str:
        """Remove what killed runs and other plans have left, and save the plan; its path.

        Raises ConfigError if other ranks are at work on another plan.
        """
        if self._alone:
            self._clear(plan)
        else:
            self._refuse_other_plans(plan)
        for stage in plan.stages:
            make_folder(self.stage(stage))
        replace_bytes(self.plan_path(plan), pickled(plan))
        if self.together and self._lock is not None:
            self._take_with_others(self._lock)
            self._alone = False
        return self.plan_path(plan)

    def _clear(self, plan: Plan) -> None:
        wanted = {self.stage(stage).rpartition("/")[2] for stage in plan.stages}
        for name in names_in(self.path):
            if name not in wanted and name != "lock":
                remove(join(self.path, name))
        self.sweep(plan)

    def _refuse_other_plans(self, plan: Plan) -> None:
        mine = self.plan_path(plan).rpartition("/")[2]
        others = [name for name in names_in(self.path) if name.startswith("plan-") and not name.endswith(TEMPORARY)]
        if set(others) - {mine}:
            raise ConfigError(
                "the ranks don't run the same job",
                where=self.path,
                expected=mine,
                got=", ".join(others),
                hint="all must run the same script with the same Python and Manyhands, and see the same input files; "
                "if a job that was changed was killed, start it with one rank first, or remove the folder",
            )

    def plan_path(self, plan: Plan) -> str:
        """Where the plan is saved: of another plan, in another file, because workers keep what they have loaded."""
        return join(self.path, f"plan-{plan.identity[:20]}")

    def sweep(self, plan: Plan) -> None:
        """Remove the temporary files of tasks that were killed."""
        for stage in plan.stages if not self.together or self._alone else ():
            folder = self.stage(stage)
            for name in names_in(folder):
                if name.endswith(TEMPORARY):
                    remove(join(folder, name))

    def stage(self, stage: Stage) -> str:
        """The folder of a stage's files."""
        return join(self.path, stage.identity[:20])

    def close(self, *, delete: bool) -> None:
        """Unlock; remove the folder with all that is in it, if nobody needs it any more."""
        if delete and exists(self.path):
            remove(self.path)
        if self._lock is not None:
            self._lock.close()
