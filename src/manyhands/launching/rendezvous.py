"""Rendezvous of several hosts: which hosts take part in a run.

A store on another host that may be stopped or cut off: torch's client would wait for it without limit, deaf to
signals.

Several hosts: where their launchers meet and agree on who takes part, by torch's c10d rendezvous.
The first host keeps the store at which all meet, and in it what a host that joins must know of the run. When a host
comes, or is lost, torch's elastic agents stop their workers and start them again, more of them or fewer.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, DistStoreError, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.launching.supervision import Stop, WorkerMonitor
from manyhands.members.processes import Answer, call_with_limit

ANSWER_SECONDS = 20.0

_WAIT_SECONDS = 30.0  # for a key, unless told otherwise

_LOOK_SECONDS = 0.05


def ask_store(call: Callable[[], Answer], meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """What a call to the first host's store gives or raises; see `answered`. Raises DistNetworkError if it takes longer
    than ANSWER_SECONDS."""
    try:
        return call_with_limit(call, ANSWER_SECONDS, meanwhile)
    except TimeoutError as error:
        raise DistNetworkError(f"the first host has not answered for {ANSWER_SECONDS:g} s") from error


class RemoteStore(Store):
    """`near`, torch's client of such a store, with `meanwhile` called while it's awaited. Once it hasn't answered it's
    not asked again. (C++ calls these methods, too, for the stores with a prefix: someone must hold this object.)"""

    def __init__(self, client: Store, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._client, self._meanwhile = client, meanwhile
        self._silent: DistNetworkError | None = None

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        self._meanwhile()
        if self._silent is not None:
            raise self._silent
        try:
            return ask_store(call, self._meanwhile)
        except DistNetworkError as error:
            self._silent = error
            raise

    def wait(self, keys: list[str], limit: timedelta = timedelta(seconds=_WAIT_SECONDS)) -> None:
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise DistStoreError(f"nobody has set {', '.join(keys)} within {limit.total_seconds():g} s")
            time.sleep(_LOOK_SECONDS)

    def check(self, keys: list[str]) -> bool:
        return self._ask(lambda: self._client.check(keys))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._ask(lambda: self._client.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return self._ask(lambda: self._client.multi_get(keys))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._client.set(key, value))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._ask(lambda: self._client.multi_set(keys, values))  # type: ignore[attr-defined]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self._ask(lambda: self._client.compare_set(key, expected, value))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._client.add(key, amount))


PORT = 29400

_HOSTS_BACKEND = "manyhands-hosts"

_LAST_CALL_SECONDS = 1  # that others are waited for, once the fewest are there

_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_ATTEMPTS = 1, 6  # without a sign of life for so long a host's launcher is given up

_GATHER_SECONDS = 10.0  # between the first and the last host of a round

_COMING_ROUND_SECONDS = 8.0  # for workers to notice a lost host themselves, and end

_REACH_SECONDS = 10.0

_RUN, _TOLD = "manyhands/run", ("run", "least", "most", "restarts", "said")

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """host, port: where all meet. run: a name for it that is this run's alone. least, most: hosts. restarts: how often
    workers are started again after a failure. first: whether this host keeps the store. said: what the others learn of
    the run from the first. tell: called before workers are started again, with why, if a worker here knows."""

    host: str
    port: int
    run: str
    least: int
    most: int
    restarts: int
    first: bool
    said: dict[str, Any]
    tell: Callable[[WorkerError | Interrupted | None], None] | None = None

    @property
    def endpoint(self) -> str:
        """As a person writes it."""
        return f"{self.host}:{self.port}"

    def launch_options(self) -> dict[str, Any]:
        """For torch's configuration of a launch. Raises ConfigError if the first host can't be reached, or if this is
        the first, and its port can't be had."""
        if self.first:
            _try_port(self.endpoint, self.port)
        rendezvous_handler_registry.register(_HOSTS_BACKEND, HostsRendezvousHandler)
        return {
            "min_nodes": self.least,
            "max_nodes": self.most,
            "run_id": self.run,
            "rdzv_backend": _HOSTS_BACKEND,
            "rdzv_endpoint": self.endpoint,
            "rdzv_configs": {
                "rendezvous": self,
                "is_host": self.first,
                "last_call_timeout": _LAST_CALL_SECONDS,
                "keep_alive_interval": _KEEP_ALIVE_SECONDS,
                "keep_alive_max_attempt": _KEEP_ALIVE_ATTEMPTS,
                "read_timeout": round(ANSWER_SECONDS),
            },
            "local_addr": own_address(self.host, self.port),
            "max_restarts": self.restarts,
        }


def _try_port(endpoint: str, port: int) -> None:
    """torch would only say that it can't connect, and that after a minute."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            "the hosts can't meet at this port",
            where=endpoint,
            got=error.strerror,
            hint="another run or program may listen there: choose a port with --rendezvous HOST:PORT, or end it",
        ) from error


def join_hosts(endpoint: str) -> Rendezvous:
    """What the first host says of its run. Raises ConfigError if there's none at that endpoint."""
    host, port = parse_endpoint(endpoint)
    try:
        _await(host, port)
        told = json.loads(ask_store(lambda: _told(host, port)))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "no run can be joined there",
            where=f"{host}:{port}",
            got=str(error).partition("\n")[0][:200],
            hint="on the first host, manyhands train --hosts says where; see that its port can be reached from here",
        ) from error
    return Rendezvous(host=host, port=port, first=False, **told)


def _told(host: str, port: int) -> bytes:
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_REACH_SECONDS)).get(_RUN)


def _await(host: str, port: int) -> None:
    """Until somebody listens there. (torch would tell of each try at length.) Raises OSError."""
    deadline = time.monotonic() + _REACH_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), _REACH_SECONDS).close()
        except ConnectionRefusedError:  # the first host may be on its way
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `host`. Raises ConfigError."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            "an endpoint can't be understood", expected=f"HOST or HOST:PORT, such as first:{PORT}", got=text
        )
    return host, int(port)


def own_address(host: str, port: int) -> str:
    """This host's address as `host` sees it. Raises ConfigError if there's no way to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError("a host can't be reached", where=host, got=error, hint="check its name or address") from error


def interface_of(address: str) -> str | None:
    """The network interface that has an address: Gloo would take the one that the host's name leads to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    return None


class HostsRendezvousHandler(RendezvousHandler):
    """torch's, with a look at this host's workers and at the wish to stop whenever the agent asks who waits, and while
    it waits itself. A host that is lost is a reason to meet again, as one that comes is for torch."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        rendezvous: Rendezvous = parameters.get("rendezvous")
        self._stop: Stop = parameters.get("stop")
        self._watch: WorkerMonitor = parameters.get("watch")
        self._first = rendezvous.first
        self._agent = threading.get_ident()  # the thread that starts workers, and ends them
        self._heeds = self._meets = True
        self._hosts = 0  # in the last round
        _, client = ask_store(lambda: create_backend(parameters), self._look)
        self._store = RemoteStore(client, self._look)
        backend = C10dRendezvousBackend(self._store, parameters.run_id)
        self._handler = create_handler(self._store, backend, parameters)
        if rendezvous.first:
            self._store.set(_RUN, json.dumps({name: getattr(rendezvous, name) for name in _TOLD}))
        self._heeds = False

    def get_backend(self) -> str:
        return _HOSTS_BACKEND

    @property
    def use_agent_store(self) -> bool:
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        self._stop.kill_rest()  # of the round before: torch ends only the sessions whose worker still lives
        with self._heeding(meets=True):
            while True:
                # A host may be lost as soon as it had joined: the agent would wait for it, and give up.
                with suppress(DistStoreError):
                    info = self._handler.next_rendezvous()
                    info.store.set(f"here/{info.rank}", "")
                    here = [f"here/{rank}" for rank in range(info.world_size)]
                    info.store.wait(here, timedelta(seconds=_GATHER_SECONDS))
                    self._hosts = info.world_size
                    return info

    @contextmanager
    def _heeding(self, *, meets: bool) -> Iterator[None]:
        """While it lasts, a wish to stop is raised, also from where a store is asked. Without the first host nobody can
        meet any more: when it's asked to stop, the run stops on all hosts. meets: there are no workers here now."""
        self._heeds, self._meets = True, meets
        try:
            yield
        except SignalException:
            self._heeds = False
            if self._first:
                self._handler.set_closed()
            raise
        finally:
            self._heeds = False

    def _look(self) -> None:
        """While a store is asked: whether this host is to stop, and at its workers. (torch has a thread that asks, too,
        and says so that this host lives.)"""
        if self._heeds and threading.get_ident() == self._agent:
            self._stop.raise_if_asked(all_started=self._meets)  # while hosts meet there are none that it could miss
            if not self._meets:
                self._watch.look()

    def num_nodes_waiting(self) -> int:
        with self._heeding(meets=False):
            self._look()
            try:
                waiting = ask_store(self._handler.num_nodes_waiting, self._look)
            except (RendezvousError, DistError):  # the first host is lost, or its launcher stopped
                self._end_deaf_workers()
                raise
        state = self._handler._state_holder.state  # torch shows only who waits, not who is lost
        lost = 0 if state.closed else max(0, self._hosts - len(state.participants))
        if lost:
            self._end_deaf_workers()
        return waiting + lost

    def _end_deaf_workers(self) -> None:
        """Before long: the agent asks them first, and gives them half a minute."""
        self._stop.kill_later(_COMING_ROUND_SECONDS)

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        return self._handler.shutdown()
