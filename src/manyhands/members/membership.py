"""The workers of a group, their heartbeats and their failures.

Every worker announces itself in the store (host, pid, board), opens the boards of the workers on its host and starts a
watching thread. Failures are detected in four ways:

- A worker that raises an error writes it to the store.
- The end of a worker on this host is detected through its pidfd.
- A worker on another host that ends or is cut off sends no more heartbeats to the store.
- A worker that keeps its peers waiting for too long is declared stalled. The waiting peers report it, with its Python
  stack.

The first report in the store is *the* failure: all workers raise the same WorkerError. A worker that does not raise
this error, for example because it hangs in a kernel, is killed after GRACE_SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from manyhands.errors import NO_POSITION, ConfigError, InvariantError, Position, WorkerError
from manyhands.members.board import BOARD_BYTES, CHANNELS, Arena, Board, Store
from manyhands.members.processes import ask_for_stack, call_with_limit, process_state, stack_address
from manyhands.members.reports import StatusFile, record_failure, traceback_of

PEER_POLL_SECONDS = 0.1
"""The interval at which the watching thread inspects peers and store."""

BEAT_SECONDS = 1.0
"""The interval of heartbeats, which are sent only if there are several hosts."""

LOST_SECONDS = 10.0
"""The time without a heartbeat, or without an answer from the store, after which a host is considered lost."""

SHORT_LOST_SECONDS = 3.0
"""The limit that replaces LOST_SECONDS once a connection has broken, because a lost host is then likely."""

GRACE_SECONDS = 1.5
"""The time that a worker has to raise a peer's failure before it is killed. It is longer than a few polls of a wait."""

JOIN_SECONDS = 300.0
"""The time that all workers have to join. Starting Python, importing torch and building a data set may take minutes."""

CLOSED = b"closed"
"""The last heartbeat of a worker that left on purpose."""


@dataclass
class Peer:
    """Another worker, as this worker sees it.

    stack: the peer's `stack_address`. board: the peer's board, or None if the peer is on another host. beat: the last
    heartbeat of a peer on another host: the posted calls of each channel (followed by ",w" while the peer waits), the
    heartbeat's number and the position. beat_seen: the monotonic time when that heartbeat was read.
    """

    rank: int
    host: str
    pid: int
    thread: int
    stack: str
    board: Board | None
    pidfd: int | None = None
    beat: bytes = b""
    beat_seen: float = 0.0

    @property
    def position(self) -> Position:
        """Return the peer's last known position."""
        if self.board is not None:
            return self.board.position
        return NO_POSITION if self.beat in (b"", CLOSED) else Position(*json.loads(self.beat.split(b" ", 2)[2]))

    def posted(self, channel: int) -> int:
        """Return the number of collective calls that the peer is known to have started on this channel."""
        if self.board is not None:
            return self.board.posted(channel)
        return 0 if self.beat in (b"", CLOSED) else int(self.beat.split(b" ")[0].split(b",")[channel])

    @property
    def is_waiting(self) -> bool:
        """Return True if the peer is known to wait for its own peers."""
        if self.board is not None:
            return self.board.waiting
        return self.beat not in (b"", CLOSED) and self.beat.split(b" ")[0].endswith(b"w")

    @property
    def drained(self) -> int:
        """Return the number of all-to-alls whose pieces the peer has read. It is known only on the peer's own host."""
        return 0 if self.board is None else self.board.drained

    @property
    def has_left(self) -> bool:
        """Return True if the peer has left on purpose."""
        return self.beat == CLOSED if self.board is None else self.board.closed

    @property
    def where(self) -> str:
        """Return worker, process, host and activity as text, for an error's `where`."""
        return f"worker {self.rank} (pid {self.pid} on {self.host}), {self.position.activity or 'starting'}"


class Membership:
    """This worker's membership in a group of `size` workers that share `store`. The constructor is collective.

    The constructor returns once all workers have joined. Raises ConfigError, WorkerError.

    stall_seconds: how long a worker may keep its peers waiting. abandon: called in the watching thread with the failure
    if this worker does not raise it in time. It ends the process. requested: transport and device, which must be equal
    on all workers.

    Attributes: `board` (this worker's), `peers` (the others, by rank), `failure` (set once a worker has failed),
    `hosts` (the host of each worker), `one_host` (True if all workers are on this host), `at_close` (functions that
    `close` calls).
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        arena: Arena,
        *,
        stall_seconds: float,
        abandon: Callable[[WorkerError], None],
        requested: str = "",
    ) -> None:
        self.rank, self.size, self.stall_seconds = rank, size, stall_seconds
        self.failure: WorkerError | None = None
        self._raised = False  # True if the main thread has raised the failure or its own error and is about to exit
        self._store, self._abandon = store, abandon
        self._text_rounds = self._beats = 0
        self.one_host = False  # known only once all workers have announced their hosts
        self._stop = threading.Event()
        self._lost_seconds = LOST_SECONDS
        self._store_answered = math.inf  # when the store last answered the watching thread (monotonic)
        # If the launcher does not have the store, worker 0 has it.
        self._launcher_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        memory, address = arena.create(BOARD_BYTES)
        self.board = Board(memory)
        me = {
            "host": _host(),
            "pid": os.getpid(),
            "thread": threading.get_ident(),
            "board": address,
            "stack": stack_address(),
            "requested": requested,
        }
        others = [json.loads(text) for text in self.all_gather_text(json.dumps(me))]
        _check_requested([other["requested"] for other in others])
        self.hosts = [str(other["host"]) for other in others]
        self.one_host = all(host == me["host"] for host in self.hosts)
        self.at_close: list[Callable[[], None]] = []
        self.peers: dict[int, Peer] = {}
        for other_rank, other in enumerate(others):
            if other_rank == rank:
                continue
            here = other["host"] == me["host"]
            self.peers[other_rank] = Peer(
                rank=other_rank,
                host=other["host"],
                pid=other["pid"],
                thread=other["thread"],
                stack=other["stack"],
                board=Board(arena.open(other["board"])) if here else None,
                pidfd=os.pidfd_open(other["pid"]) if here and other["pid"] != os.getpid() else None,
                beat_seen=time.monotonic(),
            )
        self._status_file = None if self.peers else StatusFile.for_parent(stall_seconds)
        self.all_gather_text("opened")
        arena.seal()  # now all peers have opened this board
        # The watching thread has its own client, because a client is locked while another thread waits for an answer.
        self._watch_store = store.clone() if hasattr(store, "clone") else store
        self._watcher = threading.Thread(target=self._watch, name="manyhands-watch", daemon=True)
        self._watcher.start()

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all workers, by rank. Collective. Blocks.

        The call is slow, because it uses the store, so use it for set-up only. Raises WorkerError.
        """
        self._text_rounds += 1
        prefix = f"text/{self._text_rounds}"
        self._store.set(f"{prefix}/{self.rank}", text)
        texts = []
        deadline = time.monotonic() + JOIN_SECONDS
        for rank in range(self.size):
            while not self._store.check([f"{prefix}/{rank}"]):
                self.check()
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"worker {rank} did not join the group within {JOIN_SECONDS:.0f} s",
                        rank=rank,
                        hint="check that all workers run the same program and can reach MASTER_ADDR:MASTER_PORT",
                    )
                time.sleep(0.002)
            texts.append(self._store.get(f"{prefix}/{rank}").decode())
        return texts

    def shorten_lost_limit(self) -> None:
        """From now on, declare hosts lost after SHORT_LOST_SECONDS. Called when a connection has broken."""
        self._lost_seconds = SHORT_LOST_SECONDS

    @property
    def _is_cut_off(self) -> bool:
        """Return True if the watching thread has waited for the store's answer for LOST_SECONDS."""
        # A launcher on this host that does not answer has been stopped (Ctrl-Z). This is not a failure, because the
        # workers can continue with their boards alone. If the launcher has ended, its connection breaks, and `_watch`
        # reports that.
        if self._launcher_has_store and self.one_host:
            return False
        return time.monotonic() - self._store_answered > LOST_SECONDS

    def record_position(self, position: Position) -> None:
        """Record this worker's new position for its peers and its launcher."""
        self.board.record_position(position)
        if self._status_file is not None:
            self._status_file.record_position(position)

    def check(self) -> None:
        """Raise the failure, if a worker has failed."""
        if self.failure is None and self._is_cut_off:
            self.failure = WorkerError(
                f"worker 0's host, {self.hosts[0]}, has not answered for {LOST_SECONDS:g} s",
                rank=0,
                where=self._where,
                hint="check whether that host is down or this one is cut off from the network",
            )
        if self.failure is not None:
            self._raised = True
            raise self.failure

    def check_wait(self, started: float, tag: str, behind: list[Peer], left: set[int]) -> None:
        """Raise the failure, or declare a peer stalled, while this worker waits in `tag` for the peers `behind`.

        started: the monotonic time when the wait started.
        left: the ranks of the peers that have left. The caller must first find these peers, and then find that the wait
        is still incomplete. Otherwise a peer may be reported that completed the call before it left.
        """
        self.check()
        self._report_left([peer for peer in behind if peer.rank in left], tag)
        seconds = time.monotonic() - started
        if seconds < self.stall_seconds:
            return
        if not behind:
            # All workers have started the call. Find a worker that was stopped before it sent its bytes, or that does
            # something else instead of sending them.
            behind = [peer for peer in self.peers.values() if _is_stopped(peer) or not peer.is_waiting]
        if not behind:
            raise InvariantError("a wait timed out, although every worker has made the call", where=tag)
        # A peer that is itself waiting will report the worker that it waits for. If all these peers wait (a deadlock),
        # report one of them after twice the time.
        stalled = [peer for peer in behind if _is_stopped(peer)] or [peer for peer in behind if not peer.is_waiting]
        if stalled or seconds > 2 * self.stall_seconds:
            self._report_stalled((stalled or behind)[0], tag)
            raise self._await_failure()

    def fail(self, error: BaseException) -> None:
        """Report `error`, which this worker raised, to the peers and the launcher.

        Call this before leaving the group, because otherwise the peers report that this worker has left. Only the first
        failure of the group is stored, and a WorkerError about a peer is never reported as a failure of this worker.
        """
        where, position = self._where, self.board.position
        record_failure(error, where=where, position=position)
        self._raised = True
        if isinstance(error, WorkerError) and error.rank != self.rank:
            return
        first = str(error).partition("\n")[0]
        mine = WorkerError(
            f"worker {self.rank} raised {type(error).__name__}: {first}",
            rank=self.rank,
            where=where,
            position=position,
            detail=traceback_of(error),
            hint=getattr(error, "hint", None),
        )
        self._report(mine)
        self.failure = self.failure or mine

    @property
    def _where(self) -> str:
        return f"worker {self.rank} (pid {os.getpid()} on {_host()}), {self.board.position.activity or 'starting'}"

    @property
    def is_healthy(self) -> bool:
        """Return True if no worker is known to have failed."""
        return self.failure is None and not self._raised

    def close(self) -> None:
        """Leave the group on purpose, so that the peers do not report a failure. Free all resources."""
        if self.is_healthy:
            self.leave()
        self._stop.set()
        # Join with a time limit, because the watching thread may be waiting for the store of a lost host.
        self._watcher.join(LOST_SECONDS if self.is_healthy else BEAT_SECONDS)
        if self._status_file is not None:
            self._status_file.close()
            self._status_file = None
        for peer in self.peers.values():
            if peer.pidfd is not None:
                os.close(peer.pidfd)
                peer.pidfd = None
        while self.at_close:
            self.at_close.pop()()

    def leave(self) -> None:
        """Announce that this worker leaves on purpose."""
        self.board.close()
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store may be lost with its host
            call_with_limit(lambda: self._watch_store.set(f"beat/{self.rank}", CLOSED.decode()), LOST_SECONDS)

    # - Failures

    def _report(self, error: WorkerError) -> None:
        """Write `error` to the store, unless another worker was first."""
        names = ("rank", "what", "where", "position", "detail", "hint", "alive")
        if self._is_cut_off:
            return
        report = json.dumps({name: getattr(error, name) for name in names})
        try:
            call_with_limit(lambda: self._store.compare_set("failure", "", report), LOST_SECONDS)
        except TimeoutError:  # the report does not reach the peers, but this worker can raise the error
            self.failure = self.failure or error
        except RuntimeError:
            pass

    def _report_left(self, missed: list[Peer], tag: str) -> None:
        """Report that the first peer of `missed` has left, and raise the failure. Do nothing if `missed` is empty.

        That peer left without making the call `tag`, in which this worker waits.
        """
        if missed:
            peer = missed[0]
            what = f"worker {peer.rank} has left the group (its program ended, or it closed its engine)"
            where = f"{peer.where}; its peers wait in {tag}"
            self._report(WorkerError(what, rank=peer.rank, where=where, position=peer.position))
            raise self._await_failure()

    def _report_stalled(self, peer: Peer, tag: str) -> None:
        """Report that a peer has stalled, with its Python stack, and kill it if its process is stopped."""
        stack, stopped = _stack_of(peer), _is_stopped(peer)
        error = WorkerError(
            f"worker {peer.rank} has stalled: its peers have waited for more than {self.stall_seconds:g} s"
            + (" (its process is stopped: SIGSTOP?)" if stopped else ""),
            rank=peer.rank,
            where=f"{peer.where}; its peers wait in {tag}",
            position=peer.position,
            detail=None if stack is None else f"its stack (most recent call first):\n{stack}",
            hint="find out where it hangs; if it is only slow, increase strategy.stall_seconds",
        )
        error.alive = True
        self._report(error)
        if stopped and peer.pidfd is not None:
            # A stopped process cannot end on its own, and its peers no longer wait for it.
            signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)

    def _await_failure(self) -> WorkerError:
        """Return the group's failure once the watching thread has read it, because a peer's report may have been
        first.
        """
        deadline = time.monotonic() + 2.0
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.failure or WorkerError("a worker failed, and the store with its report is lost")

    # - The watching thread

    def _watch(self) -> None:
        """Run the watching thread until `close`, or until the process is abandoned."""
        last_beat, failed_at = 0.0, 0.0
        while not self._stop.wait(PEER_POLL_SECONDS):
            self._store_answered = now = time.monotonic()
            if self.failure is None:
                try:
                    self._check_peers()
                    if not self.one_host and now - last_beat > BEAT_SECONDS:
                        self._beat(now)
                        last_beat = now
                except (RuntimeError, OSError) as error:
                    self.failure = self._store_lost(error)
                failed_at = now
            elif now - failed_at > GRACE_SECONDS and not self._raised:
                self._abandon(self.failure)
                return

    def _store_lost(self, error: Exception) -> WorkerError:
        """Return the failure to raise when the store's connection breaks.

        The process that has the store must have ended. If another worker has also ended, the loss of the store may be
        the reason, so that worker is not reported.
        """
        owner = None if self._launcher_has_store else self.peers.get(0)
        if owner is None:
            return WorkerError("the workers' store is lost (did the launcher end?)", detail=str(error))
        what = "worker 0 exited, so the workers' store is lost"
        return WorkerError(what, rank=0, where=owner.where, position=owner.position, detail=str(error))

    def _check_peers(self) -> None:
        """Read the failure from the store, and report peers on this host that have ended without leaving."""
        self._take_report()
        for peer in self.peers.values():
            if self.failure is None and peer.pidfd is not None and _has_ended(peer.pidfd):
                closed = peer.board is not None and peer.board.closed
                os.close(peer.pidfd)
                peer.pidfd = None
                if not closed:
                    time.sleep(0.05)  # the worker's own report names the cause, but may not be in the store yet
                    self._take_report()
                    what = f"worker {peer.rank} exited without an error report (killed?)"
                    self._report(WorkerError(what, rank=peer.rank, where=peer.where, position=peer.position))
                    self._take_report()

    def _take_report(self) -> None:
        """Read the group's failure from the store, if there is one."""
        if self.failure is None and self._watch_store.check(["failure"]):
            report = json.loads(self._watch_store.get("failure").decode())
            alive, position = report.pop("alive"), Position(*report.pop("position"))
            self.failure = WorkerError(**report, position=position)
            self.failure.alive = alive

    def _beat(self, now: float) -> None:
        """Send a heartbeat, read the heartbeats of peers on other hosts, and report peers whose heartbeats are
        missing.
        """
        self._beats += 1  # makes every heartbeat different, so that a worker without progress is still considered alive
        posted = ",".join(str(self.board.posted(channel)) for channel in range(CHANNELS)) + ",w" * self.board.waiting
        self._watch_store.set(f"beat/{self.rank}", f"{posted} {self._beats} {json.dumps(self.board.position)}")
        for peer in self.peers.values():
            if peer.board is not None or peer.beat == CLOSED:
                continue
            key = f"beat/{peer.rank}"
            beat = self._watch_store.get(key) if self._watch_store.check([key]) else b""
            if beat != peer.beat:
                peer.beat, peer.beat_seen = beat, now
            elif now - peer.beat_seen > self._lost_seconds:
                seconds = f"{self._lost_seconds:g} s"
                what = f"worker {peer.rank} on host {peer.host} has sent no heartbeat for {seconds}"
                hint = "check whether that host is down or cut off from the network, and whether the worker was killed"
                self._report(WorkerError(what, rank=peer.rank, where=peer.where, position=peer.position, hint=hint))


def _check_requested(requested: list[str]) -> None:
    """Raise ConfigError unless all workers requested the same transport and device."""
    for rank, theirs in enumerate(requested):
        if theirs != requested[0]:
            raise ConfigError(
                f"workers 0 and {rank} requested different transports",
                expected=f"{requested[0]} (worker 0)",
                got=f"{theirs} (worker {rank})",
                hint="start all workers with the same program and strategy",
            )


def _host() -> str:
    """Return an identifier of this host. The boot id distinguishes hosts with the same name."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()}/{file.read(8)}"
    return socket.gethostname()


def _has_ended(pidfd: int) -> bool:
    """Return True if the process has ended."""
    poll = select.poll()  # select() cannot handle descriptors from 1,024 on
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _is_stopped(peer: Peer) -> bool:
    """Return True if the peer is on this host and its process is stopped (by a signal or a debugger)."""
    return peer.pidfd is not None and process_state(peer.pid) in ("T", "t")


def _stack_of(peer: Peer) -> str | None:
    """Return the Python stack of the peer's main thread, or None if the peer is on another host or does not answer.

    In tests a peer may be a thread of this process.
    """
    if peer.pid == os.getpid():
        frame = sys._current_frames().get(peer.thread)
        return "".join(reversed(traceback.format_stack(frame))) if frame else None
    return None if peer.pidfd is None else ask_for_stack(peer.stack, peer.pidfd)
