"""The rendezvous of several hosts, which decides which hosts take part in a run.

The launchers of several hosts meet through torch's c10d rendezvous and agree on the hosts of a run. The first host runs
the store that they all connect to. The store also holds the facts about the run that a joining host needs. When a host
joins or is lost, torch's elastic agents stop their workers and restart them with the new number of workers.

Hosts are not authenticated: whoever reaches the store may read and write it. So values from the store are plain data,
and nothing in it is executed. Every request to the store has a time limit (`launching/remote_store.py`).
"""

from __future__ import annotations

import fcntl
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.formatting import printable
from manyhands.launching.remote_store import ANSWER_SECONDS, RemoteStore, ask_store
from manyhands.launching.rendezvous_state import json_handler
from manyhands.launching.supervision import StopRequest, WorkerMonitor
from manyhands.output import say

PORT = 29400
"""The default port of the first host's store. torchrun has the same default."""

_HOSTS_BACKEND = "manyhands-hosts"

_LAST_CALL_SECONDS = 1  # how long a rendezvous stays open for more hosts once there are enough

_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_ATTEMPTS = 1, 6  # a launcher that misses 6 heartbeats, one a second, is lost

_GATHER_SECONDS = 10.0  # how long a host waits for other hosts to meet again

_NOTICE_SECONDS = 8.0  # the time that workers have to detect a lost host themselves and exit

_CONNECT_SECONDS = 10.0  # time limit for connecting to the first host

_RUN_KEY = "manyhands/run"
"""The key in the store under which the first host publishes the fields of a Rendezvous that a joining host needs."""

_STOPPED_KEY = "manyhands/stopped"
"""The key in the store that the first host sets when it is requested to stop the run."""

_PUBLISHED = ("run_id", "min_hosts", "max_hosts", "max_restarts", "fingerprints")

_MOST_HOSTS = 1 << 16

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """The address and the rules of a rendezvous.

    host, port: the address of the first host's store. run_id: the unique name of this run. min_hosts, max_hosts: the
    numbers of hosts that may take part. max_restarts: how often workers are restarted after a failure. is_first: True
    on the host that has the store. fingerprints: hashes of the values that must be equal on all hosts, by name; the
    first host publishes them. on_restart: called before workers are restarted, with the reason if a worker on this host
    reported one, and otherwise with None.
    """

    host: str
    port: int
    run_id: str
    min_hosts: int
    max_hosts: int
    max_restarts: int
    is_first: bool
    fingerprints: dict[str, str]
    on_restart: Callable[[WorkerError | Interrupted | None], None] | None = None

    @property
    def endpoint(self) -> str:
        """Return the address as the user writes it: HOST:PORT."""
        return f"{self.host}:{self.port}"

    def launch_options(self) -> dict[str, Any]:
        """Return options for torch's LaunchConfig.

        Raises ConfigError if the first host cannot be reached or, on the first host, if the port cannot be used.
        """
        listener = _listen(self.host, self.port) if self.is_first else None
        rendezvous_handler_registry.register(_HOSTS_BACKEND, HostsRendezvousHandler)
        return {
            "min_nodes": self.min_hosts,
            "max_nodes": self.max_hosts,
            "run_id": self.run_id,
            "rdzv_backend": _HOSTS_BACKEND,
            "rdzv_endpoint": self.endpoint,
            "rdzv_configs": {
                "rendezvous": self,
                "listener": listener,
                "last_call_timeout": _LAST_CALL_SECONDS,
                "keep_alive_interval": _KEEP_ALIVE_SECONDS,
                "keep_alive_max_attempt": _KEEP_ALIVE_ATTEMPTS,
            },
            "local_addr": own_address(self.host, self.port),
            "max_restarts": self.max_restarts,
        }


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on this address alone. Raises ConfigError if the address cannot be used.

    torch itself would listen on all addresses of this host, and would report a port in use only after a minute.
    """
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            "the rendezvous address cannot be used",
            where=f"{host}:{port}",
            got=error.strerror,
            hint="--rendezvous HOST:PORT must name an address of this host, and a port that no other run or program "
            "uses",
        ) from error


def join_hosts(endpoint: str, fingerprints: Mapping[str, str]) -> Rendezvous:
    """Return the rendezvous that the first host has published.

    fingerprints: this host's own, as in Rendezvous. They must be equal to those of the first host. Raises ConfigError
    if there is no run at `endpoint`, or if fingerprints differ. The error names the keys that differ.
    """
    host, port = parse_endpoint(endpoint)
    try:
        _wait_until_listening(host, port)
        found = _published(ask_store(lambda: _read_run(host, port)))
    except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            "there is no run to join at this address",
            where=f"{host}:{port}",
            got=printable(str(error).partition("\n")[0][:200]),
            hint="use the address that manyhands train --hosts prints on the first host, and check that this host can "
            "reach it",
        ) from error
    theirs = found["fingerprints"]
    differ = sorted(key for key in theirs.keys() | fingerprints.keys() if theirs.get(key) != fingerprints.get(key))
    if differ:
        names = [printable(key[:80]) for key in differ]
        raise ConfigError(
            "this host would train a different run than the first host",
            where=f"{host}:{port}",
            expected="the recipe and options of the first host",
            got=f"different: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}",
            hint="use the command that the first host prints, with the same recipe file",
        )
    return Rendezvous(host=host, port=port, is_first=False, **found)


def _published(text: bytes) -> dict[str, Any]:
    """Return the values that the first host has published: numbers, hashes and a random name.

    Raises ValueError, KeyError or TypeError.
    """
    found = json.loads(text)
    run_id, fingerprints = found["run_id"], found["fingerprints"]
    numbers = [found[name] for name in ("min_hosts", "max_hosts", "max_restarts")]
    if not (isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id)):
        raise ValueError("the name of the run was not made by Manyhands")
    if (
        not all(type(number) is int and 0 <= number < _MOST_HOSTS for number in numbers)
        or not 0 < numbers[0] <= numbers[1]
    ):
        raise ValueError("the numbers of hosts and restarts are not valid")
    if not isinstance(fingerprints, dict) or not all(isinstance(each, str) for each in fingerprints.values()):
        raise ValueError("the fingerprints are not valid")
    return {name: found[name] for name in _PUBLISHED}


def _connect(host: str, port: int, listener: socket.socket | None = None) -> TCPStore:
    """Connect to the store at this address. If a listening socket is given, first start the store on it."""
    limit = timedelta(seconds=ANSWER_SECONDS)
    if listener is None:
        return TCPStore(host, port, is_master=False, timeout=limit)
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listener.detach()
    )


def _read_run(host: str, port: int) -> bytes:
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_CONNECT_SECONDS)).get(_RUN_KEY)


def _wait_until_listening(host: str, port: int) -> None:
    """Wait until a process listens on that port. Raises OSError.

    torch's client would also wait, but would print a long message for each attempt.
    """
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), _CONNECT_SECONDS).close()
        except ConnectionRefusedError:  # the first host may still be starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "host". Raises ConfigError."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError("this is not a host and port", expected=f"HOST or HOST:PORT, such as first:{PORT}", got=text)
    return host, int(port)


def own_address(host: str, port: int) -> str:
    """Return this host's address on the route to `host`. Raises ConfigError if there is no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            "the host cannot be reached", where=host, got=error, hint="check its name or address"
        ) from error


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address, or None if there is none.

    The interface is passed to Gloo, which would otherwise use the interface that the host's own name resolves to.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    return None


class HostsRendezvousHandler(RendezvousHandler):
    """torch's rendezvous handler, which also checks this host's workers and whether a stop was requested.

    The checks run whenever the agent asks how many hosts are waiting, and while a request to the store is pending. A
    lost host triggers a new rendezvous, in the same way as a joining host does in torch.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        rendezvous: Rendezvous = parameters.get("rendezvous")
        self._stop: StopRequest = parameters.get("stop")
        self._monitor: WorkerMonitor = parameters.get("monitor")
        self._is_first = rendezvous.is_first
        self._agent_thread = threading.get_ident()  # the thread that starts and ends workers
        self._may_stop = self._has_no_workers = True
        self._num_hosts = 0  # the number of hosts in the current round
        listener: socket.socket | None = parameters.get("listener")
        client = ask_store(lambda: _connect(rendezvous.host, rendezvous.port, listener), self._check)
        self._store = RemoteStore(client, self._check)
        self._handler, self._clocks = json_handler(self._store, parameters)
        if rendezvous.is_first:
            self._store.set(_RUN_KEY, json.dumps({name: getattr(rendezvous, name) for name in _PUBLISHED}))
        self._may_stop = False

    def get_backend(self) -> str:
        return _HOSTS_BACKEND

    @property
    def use_agent_store(self) -> bool:
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        # Kill the processes that the previous round's workers left, because torch ends only sessions of live workers.
        self._stop.kill_rest()
        with self._stoppable(has_no_workers=True), self._clocks_compared():
            while True:
                # A host may be lost immediately after it joined. The agent would wait for it and give up, so check that
                # all hosts are present. If a host is missing, repeat the rendezvous.
                with suppress(DistStoreError):
                    info = self._meet()
                    info.store.set(f"here/{info.rank}", "")
                    arrived = [f"here/{rank}" for rank in range(info.world_size)]
                    info.store.wait(arrived, timedelta(seconds=_GATHER_SECONDS))
                    self._num_hosts = info.world_size
                    self._stop.regroups = False
                    return info

    @contextmanager
    def _clocks_compared(self) -> Iterator[None]:
        """Note at the end of the block by how much the clocks of the hosts differ."""
        try:
            yield
        finally:
            self._stop.clock_difference = self._clocks.difference

    def _meet(self) -> RendezvousInfo:
        try:
            return self._handler.next_rendezvous()
        except RendezvousClosedError:
            self._note_stop()
            raise
        except RendezvousGracefulExitError as error:  # otherwise torch's launcher would fail with an AttributeError
            self._note_stop()
            raise RendezvousClosedError(str(error)) from error

    def _note_stop(self) -> None:
        """Note whether the rendezvous was closed because the first host was requested to stop the run."""
        if not self._stop.stopped_by_first_host:
            with suppress(DistError):  # if the first host is lost, the reason is unknown
                self._stop.stopped_by_first_host = self._store.check([_STOPPED_KEY])

    @contextmanager
    def _stoppable(self, *, has_no_workers: bool) -> Iterator[None]:
        """Let a request to stop raise SignalException inside the block, even while a request to the store is pending.

        has_no_workers: True if no workers currently run on this host. If the first host is requested to stop, the
        rendezvous is closed on all hosts, because they cannot meet without its store.
        """
        self._may_stop, self._has_no_workers = True, has_no_workers
        try:
            yield
        except SignalException:
            self._may_stop = False
            if self._is_first:
                self._store.set(_STOPPED_KEY, "")
                self._handler.set_closed()
            raise
        finally:
            self._may_stop = False

    def _check(self) -> None:
        """Raise SignalException if a stop was requested, and check this host's workers."""
        # Raise only in the agent's thread, because torch sends the heartbeats of this host from another thread.
        if self._may_stop and threading.get_ident() == self._agent_thread:
            # Without workers, no worker can miss the signal.
            self._stop.raise_if_requested(all_started=self._has_no_workers)
            if not self._has_no_workers:
                self._monitor.check()

    def num_nodes_waiting(self) -> int:
        with self._stoppable(has_no_workers=False):
            self._check()
            known = self._stop.clocks_differ
            try:
                with self._clocks_compared():
                    waiting = ask_store(self._handler.num_nodes_waiting, self._check)
            except (RendezvousError, DistError):  # the first host is lost, or its launcher was stopped
                self._kill_workers_later()
                raise
        state = self._handler._state_holder.state  # private: torch's interface reports waiting hosts, not lost ones
        lost = 0 if state.closed else max(0, self._num_hosts - len(state.participants))
        if state.closed:
            self._note_stop()
        if lost:
            self._kill_workers_later()
        if waiting + lost > 0:  # the agent stops its workers now
            self._stop.regroups = True
            if self._stop.clocks_differ and not known:
                say(self._stop.how_clocks_differ)
        return waiting + lost

    def _kill_workers_later(self) -> None:
        """Kill workers that do not exit soon. The agent itself would send SIGTERM and wait for half a minute."""
        self._stop.kill_later(_NOTICE_SECONDS)

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        return self._handler.shutdown()
