"""Groups of several workers, whose calls are numbered, tagged and watched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from manyhands.comm.group import Group
from manyhands.errors import ConfigError, Position
from manyhands.members.membership import Membership, Peer

YIELDS = 200
"""The number of polls with a sched_yield before a wait starts to sleep.

Most waits are short, and a yield costs about 1 us.
"""

NAP_SECONDS = 0.0002
"""The time to sleep between two polls of a longer wait."""


class WatchedGroup(Group):
    """A group whose workers watch each other through a Membership.

    workers: the launcher's numbers of this group's workers, including this one, or None for all members.
    channel: the number of the group's sequence of calls on the board.
    """

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
        """Announce the start of collective call `tag` on this worker's board. Return the call's number."""
        self.membership.check()
        self._calls += 1
        self.membership.board.post(self._calls, tag, self.channel)
        self.membership.board.record_activity(tag)
        return self._calls

    def _wait(self, ready: Callable[[], bool], is_behind: Callable[[Peer], bool], tag: str) -> float:
        """Wait until `ready()` is true. Return the seconds that the wait took.

        is_behind: a function that returns True for the peers that this call waits for. Raises WorkerError if one of
        them fails or stalls.
        """
        started = time.monotonic()
        for _ in range(YIELDS):
            if ready():
                return time.monotonic() - started
            os.sched_yield()  # a system call: it also orders the reads of shared memory (see shared_memory.py)
        self.membership.board.record_waiting(True)
        try:
            while not ready():
                # Check which peers have left, then call ready() again: a peer may have completed this call and left (or
                # failed) between the first ready() and this check. In that case, the call is complete on all
                # workers.
                left = {peer.rank for peer in self._peers if peer.has_left}
                if (left or self.membership.failure is not None) and ready():
                    break
                behind = [peer for peer in self._peers if is_behind(peer)]
                self.membership.check_wait(started, tag, behind, left)
                time.sleep(NAP_SECONDS)
        finally:
            self.membership.board.record_waiting(False)
        return time.monotonic() - started

    def _check_tags(self, call: int, tag: str) -> None:
        """Raise ConfigError if a peer's call with this number has another tag. Call this after the wait."""
        me = self.membership.rank
        for peer in self._peers:
            # With GPU streams a wait may end before a peer has posted the call. In that case, the last worker to post
            # the call compares the tags. Read the tag only after the count, because the peer writes the count last.
            if (
                peer.board is not None
                and peer.posted(self.channel) >= call
                and not peer.board.has_tag(call, tag, self.channel)
            ):
                raise ConfigError(
                    f"workers {me} and {peer.rank} made different collective calls (call {call})",
                    expected=f"{tag} (worker {me})",
                    got=f"another call; worker {peer.rank} is now in {peer.position.activity or 'start-up'}",
                    where=f"worker {me}, {tag}",
                    hint="make the same calls and the same number of steps on all workers: methods of the engine, such "
                    "as step, save and digest, must not be inside `if rank == 0:`; neither the model nor the "
                    "data may depend on the rank, the time or an unseeded generator",
                )

    def status(self, activity: str, step: int | None = None, micro_batch: int | None = None) -> None:
        self.membership.record_position(Position(activity, step, micro_batch))

    def fail(self, error: BaseException) -> None:
        self.membership.fail(error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self.membership.is_healthy:
                self.barrier("close / control")
        finally:
            self.membership.close()
            self.take_down()

    def take_down(self) -> None:
        """Free the resources of the transport. The default implementation frees nothing."""
