"""The workers of a group, their heartbeats and their failures.

Every worker announces itself in the store (host, pid, notice board), opens the boards of the workers on its host and
keeps a watching thread. A worker that raises leaves its story in the store. One that dies is noticed by its pidfd if it
is on this host, else by its heartbeat in the store. One that keeps the others waiting too long is declared stalled by
those who wait, who ask it for its Python stack. Whatever comes first is *the* failure: all workers raise the same
WorkerError; one that doesn't come round to raising it (it hangs in a kernel, say) ends GRACE_SECONDS later.
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

BEAT_SECONDS = 1.0

LOST_SECONDS = 10.0

HURRIED_LOST_SECONDS = 3.0  # where a connection broke, too

GRACE_SECONDS = 1.5

JOIN_SECONDS = 300.0

CLOSED = b"closed"  # the last beat of a worker that left on purpose


@dataclass
class Peer:
    """Another worker, as this one sees it."""

    rank: int
    host: str
    pid: int
    thread: int
    stack: str  # "pid:fd" of the file that it dumps its stack into
    board: Board | None  # None: on another host
    pidfd: int | None = None
    beat: bytes = b""
    beat_seen: float = 0.0

    @property
    def position(self) -> Position:
        if self.board is not None:
            return self.board.position
        return NO_POSITION if self.beat in (b"", CLOSED) else Position(*json.loads(self.beat.split(b" ", 2)[2]))

    def posted(self, channel: int) -> int:
        """How many collective calls it has begun on that lane, as far as is known here."""
        if self.board is not None:
            return self.board.posted(channel)
        return 0 if self.beat in (b"", CLOSED) else int(self.beat.split(b" ")[0].split(b",")[channel])

    @property
    def waits(self) -> bool:
        """Whether it waits for others itself, as far as is known here."""
        if self.board is not None:
            return self.board.waiting
        return self.beat not in (b"", CLOSED) and self.beat.split(b" ")[0].endswith(b"w")

    @property
    def drained(self) -> int:
        return 0 if self.board is None else self.board.drained

    @property
    def has_left(self) -> bool:
        return self.beat == CLOSED if self.board is None else self.board.closed

    @property
    def where(self) -> str:
        return f"worker {self.rank} (pid {self.pid} on {self.host}), {self.position.words or 'starting'}"


class Membership:
    """This worker's place among `size` workers that share `store`. Collective: returns when all are there.

    wishes: what all must want alike (the kind of group, the device). Raises ConfigError, WorkerError.
    Attributes: `board` (mine), `peers` (the others, by rank), `failure` (set once something went wrong).
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
        self._noticed = False  # the main thread has raised the failure (or its own): it is on its way out
        self._store, self._abandon, self._text_rounds, self._beats = store, abandon, 0, 0
        self.one_host = False  # not before all have said where they are
        self._stop = threading.Event()
        self._lost_seconds, self._heard = LOST_SECONDS, math.inf  # when the store answered the watching thread last
        self._store_is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else worker 0 keeps it
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
        self.hosts = [str(other["host"]) for other in others]  # of each worker
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
        arena.seal()
        # A thread has a client of its own: one that waits holds its client's lock.
        self._watch_store = store.clone() if hasattr(store, "clone") else store
        self._watcher = threading.Thread(target=self._watch, name="manyhands-watch", daemon=True)
        self._watcher.start()

    def all_gather_text(self, text: str) -> list[str]:
        """Everyone's text, by rank. Collective, blocks; slow (through the store): for setting up."""
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
                        f"worker {rank} did not come to the group within {JOIN_SECONDS:.0f} s",
                        rank=rank,
                        hint="see that all workers run the same program and can reach MASTER_ADDR:MASTER_PORT",
                    )
                time.sleep(0.002)
            texts.append(self._store.get(f"{prefix}/{rank}").decode())
        return texts

    def hurry(self) -> None:
        """A connection broke: from now on who isn't heard of for a few seconds is taken for lost."""
        self._lost_seconds = HURRIED_LOST_SECONDS

    @property
    def _is_cut_off(self) -> bool:
        """Whether the watching thread has waited for the store's answer for as long. A launcher on this host is never
        judged: it's held (Ctrl-Z), and boards suffice to go on. If it ends, the store isn't silent, but breaks."""
        if self._store_is_launchers and self.one_host:
            return False
        return time.monotonic() - self._heard > LOST_SECONDS

    def enter(self, position: Position) -> None:
        """Where this worker is from now on, for whoever watches it."""
        self.board.enter(position)
        if self._status_file is not None:
            self._status_file.enter(position)

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is None and self._is_cut_off:
            self.failure = WorkerError(
                f"worker 0's host, {self.hosts[0]}, has not answered for {LOST_SECONDS:g} s",
                rank=0,
                where=self._where,
                hint="see whether that host is down, or this one is cut off from the network",
            )
        if self.failure is not None:
            self._noticed = True
            raise self.failure

    def check_wait(self, began: float, tag: str, behind: list[Peer], left: set[int]) -> None:
        """Called while waiting since `began` (monotonic) for those peers. left: the ranks that had left already when
        the wait was last seen not to be over: who leaves later may have made the call."""
        self.check()
        self._report_left([peer for peer in behind if peer.rank in left], tag)
        seconds = time.monotonic() - began
        if seconds < self.stall_seconds:
            return
        if not behind:  # all have made the call: one was stopped before its bytes were sent, or is at something else
            behind = [peer for peer in self.peers.values() if _is_stopped(peer) or not peer.waits]
        if not behind:
            raise InvariantError("waited too long for calls that every worker has made", where=tag)
        # Who waits itself is going to tell for whom.
        to_blame = [peer for peer in behind if _is_stopped(peer)] or [peer for peer in behind if not peer.waits]
        if to_blame or seconds > 2 * self.stall_seconds:
            self._report_stalled((to_blame or behind)[0], tag)
            raise self._await_failure()

    def fail(self, error: BaseException) -> None:
        """Leave `error`, raised here, for the others and for the parent. The first failure of the group wins."""
        where, position = self._where, self.board.position
        record_failure(error, where=where, position=position)
        self._noticed = True
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
        return f"worker {self.rank} (pid {os.getpid()} on {_host()}), {self.board.position.words or 'starting'}"

    @property
    def is_well(self) -> bool:
        """Whether nobody has failed, as far as is known here."""
        return self.failure is None and not self._noticed

    def close(self) -> None:
        """Leave on purpose; the others don't take it for a failure."""
        if self.is_well:
            self.leave()
        self._stop.set()
        self._watcher.join(LOST_SECONDS if self.is_well else BEAT_SECONDS)  # it may wait for a host that is gone
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
        """Say that this worker goes on purpose."""
        self.board.close()
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store may be gone with its host
            call_with_limit(lambda: self._watch_store.set(f"beat/{self.rank}", CLOSED.decode()), LOST_SECONDS)

    # - Failures

    def _report(self, error: WorkerError) -> None:
        names = ("rank", "what", "where", "position", "detail", "hint", "alive")
        if self._is_cut_off:
            return
        report = json.dumps({name: getattr(error, name) for name in names})
        try:
            call_with_limit(lambda: self._store.compare_set("failure", "", report), LOST_SECONDS)
        except TimeoutError:  # what is known here is told here
            self.failure = self.failure or error
        except RuntimeError:
            pass

    def _report_left(self, missed: list[Peer], tag: str) -> None:
        """Those who are waited for, but have left."""
        if missed:
            peer = missed[0]
            what = f"worker {peer.rank} has left (its program came to its end, or closed the engine)"
            where = f"{peer.where}; the others wait in {tag}"
            self._report(WorkerError(what, rank=peer.rank, where=where, position=peer.position))
            raise self._await_failure()

    def _report_stalled(self, peer: Peer, tag: str) -> None:
        stack, stopped = _stack_of(peer), _is_stopped(peer)
        error = WorkerError(
            f"worker {peer.rank} has kept the others waiting for more than {self.stall_seconds:g} s"
            + (" (its process is stopped: SIGSTOP?)" if stopped else ""),
            rank=peer.rank,
            where=f"{peer.where}; the others wait in {tag}",
            position=peer.position,
            detail=None if stack is None else f"its stack (most recent call first):\n{stack}",
            hint="see where it hangs; if it only takes long, raise strategy.stall_seconds",
        )
        error.alive = True
        self._report(error)
        if stopped and peer.pidfd is not None:
            signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)  # it can't end by itself, and was just given up

    def _await_failure(self) -> WorkerError:
        deadline = time.monotonic() + 2.0
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.failure or WorkerError("a worker failed, and the store with its story is gone")

    # - The watching thread

    def _watch(self) -> None:
        last_beat, failed_at = 0.0, 0.0
        while not self._stop.wait(PEER_POLL_SECONDS):
            self._heard = now = time.monotonic()
            if self.failure is None:
                try:
                    self._look()
                    if not self.one_host and now - last_beat > BEAT_SECONDS:
                        self._beat(now)
                        last_beat = now
                except (RuntimeError, OSError) as error:
                    self.failure = self._store_gone(error)
                failed_at = now
            elif now - failed_at > GRACE_SECONDS and not self._noticed:
                self._abandon(self.failure)
                return

    def _store_gone(self, error: Exception) -> WorkerError:
        """Who ended with the store. (Another one that was seen to end meanwhile may have ended because of that.)"""
        keeper = None if self._store_is_launchers else self.peers.get(0)
        if keeper is None:
            what = "the store through which the workers find each other is gone (did the launcher end?)"
            return WorkerError(what, detail=str(error))
        what = "worker 0 ended, and with it the store through which the workers find each other"
        return WorkerError(what, rank=0, where=keeper.where, position=keeper.position, detail=str(error))

    def _look(self) -> None:
        self._take_report()
        for peer in self.peers.values():
            if self.failure is None and peer.pidfd is not None and _has_ended(peer.pidfd):
                closed = peer.board is not None and peer.board.closed
                os.close(peer.pidfd)
                peer.pidfd = None
                if not closed:
                    time.sleep(0.05)  # what it left in the store may be on its way
                    self._take_report()
                    what = f"worker {peer.rank} ended without a word (killed?)"
                    self._report(WorkerError(what, rank=peer.rank, where=peer.where, position=peer.position))
                    self._take_report()

    def _take_report(self) -> None:
        if self.failure is None and self._watch_store.check(["failure"]):
            report = json.loads(self._watch_store.get("failure").decode())
            alive, position = report.pop("alive"), Position(*report.pop("position"))
            self.failure = WorkerError(**report, position=position)
            self.failure.alive = alive

    def _beat(self, now: float) -> None:
        self._beats += 1  # so that no two beats are the same
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
                what = f"worker {peer.rank} on another host, {peer.host}, has not been heard of for {seconds}"
                hint = "see whether that host is down or cut off from the network, or the worker was killed there"
                self._report(WorkerError(what, rank=peer.rank, where=peer.where, position=peer.position, hint=hint))


def _check_requested(requested: list[str]) -> None:
    for rank, theirs in enumerate(requested):
        if theirs != requested[0]:
            raise ConfigError(
                f"workers 0 and {rank} don't want the same group",
                expected=f"{requested[0]} (worker 0)",
                got=f"{theirs} (worker {rank})",
                hint="start all workers with the same program and strategy",
            )


def _host() -> str:
    """This host, as told apart from others that may share its name (containers)."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()}/{file.read(8)}"
    return socket.gethostname()


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()  # not select: it can't look at descriptors from 1,024 on
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _is_stopped(peer: Peer) -> bool:
    return peer.pidfd is not None and process_state(peer.pid) in ("T", "t")


def _stack_of(peer: Peer) -> str | None:
    """The peer's Python stack, if it lives on this host and answers within a second: its main thread's."""
    if peer.pid == os.getpid():
        frame = sys._current_frames().get(peer.thread)
        return "".join(reversed(traceback.format_stack(frame))) if frame else None
    return None if peer.pidfd is None else ask_for_stack(peer.stack, peer.pidfd)
