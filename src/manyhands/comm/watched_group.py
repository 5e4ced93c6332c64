"""Groups of several workers: calls are numbered, tagged and watched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from manyhands.comm.group import Group
from manyhands.errors import InvariantError, Position
from manyhands.members.membership import Membership, Peer

YIELDS = 200

NAP_SECONDS = 0.0002


class WatchedGroup(Group):
    """A group whose workers watch each other through a Membership. workers: those of its members that are in it, this
    one included, by the launcher's numbers (None: all)."""

    def __init__(
        self, membership: Membership, device: torch.device, channel: int = 0, workers: Sequence[int] | None = None
    ) -> None:
        workers = range(membership.size) if workers is None else workers
        super().__init__(workers.index(membership.rank), len(workers), device)
        self.membership, self.channel, self.workers = membership, channel, workers
        self._peers = [membership.peers[worker] for worker in workers if worker != membership.rank]
        self._calls = 0
        self._closed = False

    def _post(self, tag: str) -> int:
        """Begin collective call `tag`; its number."""
        self.membership.check()
        self._calls += 1
        self.membership.board.post(self._calls, tag, self.channel)
        self.membership.board.say(tag)
        return self._calls

    def _wait(self, ready: Callable[[], bool], is_behind: Callable[[Peer], bool], tag: str) -> float:
        """Wait until `ready()`; the seconds it took. is_behind: which peers it waits for. Raises WorkerError."""
        began = time.monotonic()
        for _ in range(YIELDS):  # most waits are short, and a yield costs a microsecond
            if ready():
                return time.monotonic() - began
            os.sched_yield()
        self.membership.board.wait(True)
        try:
            while not ready():
                left = {peer.rank for peer in self._peers if peer.has_left}
                if (left or self.membership.failure is not None) and ready():
                    break  # who raised or left made this call first: everyone shall see it made
                self.membership.check_wait(began, tag, [peer for peer in self._peers if is_behind(peer)], left)
                time.sleep(NAP_SECONDS)
        finally:
            self.membership.board.wait(False)
        return time.monotonic() - began

    def _check_tags(self, call: int, tag: str) -> None:
        """That everyone's call of this number is the same one. Only once all have posted it."""
        me = self.membership.rank
        for peer in self._peers:
            # With a GPU's streams a wait may end before a peer's call; whoever is last still compares.
            if (
                peer.board is not None
                and peer.posted(self.channel) >= call
                and not peer.board.has_tag(call, tag, self.channel)
            ):
                raise InvariantError(
                    f"workers {me} and {peer.rank} took different ways: their collective call {call} differs",
                    expected=f"{tag} (worker {me})",
                    got=f"another one; worker {peer.rank} is now in {peer.position.words or 'its start'}",
                    where=f"worker {me}, {tag}",
                    hint="make the same calls and as many steps on all workers; neither the model nor the data may "
                    "depend on the worker's number, the time or an unseeded generator",
                )

    def status(self, words: str, step: int | None = None, micro_batch: int | None = None) -> None:
        self.membership.enter(Position(words, step, micro_batch))

    def fail(self, error: BaseException) -> None:
        self.membership.fail(error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self.membership.is_well:
                self.barrier("close / control")
        finally:
            self.membership.close()
            self.take_down()

    def take_down(self) -> None:
        """What else there is to free."""
