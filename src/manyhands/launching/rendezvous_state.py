"""The state of torch's rendezvous as JSON, because torch would store pickles that anybody on the network may replace.

Whoever can connect to the rendezvous port can write this state. torch's own state holder unpickles what it finds there,
which executes code chosen by the writer. This module replaces the holder. It uses private classes of torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    _BackendRendezvousStateHolder,
    _NodeDesc,
    _RendezvousState,
    create_handler,
)

from manyhands.launching.remote_store import RemoteStore

_REMEMBERED_SECONDS = 60.0  # how long a difference of clocks is remembered

_MOST_BYTES = 1 << 20  # a state has about 200 bytes per host


def json_handler(store: RemoteStore, parameters: RendezvousParameters) -> tuple[DynamicRendezvousHandler, Clocks]:
    """Return torch's handler of a rendezvous whose state is in `store`, as JSON, and the comparison of the hosts'
    clocks.
    """
    backend = C10dRendezvousBackend(store, parameters.run_id)
    made = create_handler(store, backend, parameters)  # only its node and settings are used
    holder = _JsonStateHolder(backend, made._settings)
    return DynamicRendezvousHandler(made._this_node, made._settings, backend.name, store, holder), holder.clocks


class _JsonStateHolder(_BackendRendezvousStateHolder):
    """torch's holder of the state, with JSON in place of pickles.

    clocks: compares this host's clock with those of the others.
    """

    def __init__(self, backend: C10dRendezvousBackend, settings: RendezvousSettings) -> None:
        super().__init__(backend, settings)
        self.clocks = Clocks()

    def sync(self) -> bool | None:
        """Write the state if it was changed here, and read it otherwise. Return True if it was written.

        Returns None if nothing was to be written, and False if another host has written first.
        Raises RendezvousStateError if the store holds anything other than a state.
        """
        has_set: bool | None = None
        if self._dirty:
            answer = self._backend.set_state(state_to_json(self._state), self._token)
            found, has_set = (None, False) if answer is None else (answer[:2], answer[2])
        elif self._cache_duration > 0 and time.monotonic() - self._last_sync_time <= self._cache_duration:
            return None
        else:
            found = self._backend.get_state()
        self._state, self._token = (_RendezvousState(), None) if found is None else (state_of(found[0]), found[1])
        self._dirty, self._last_sync_time = False, time.monotonic()
        self.clocks.compare(self._state.last_heartbeats, datetime.now(UTC), self._last_sync_time)
        self._sanitize()
        return has_set


class Clocks:
    """Finds by how much the clocks of other hosts differ from this host's clock, from the times in their heartbeats.

    A heartbeat that changed between two reads was sent between these reads. The monotonic clock measures the time since
    then. So a heartbeat that seems older than the earlier read, or younger than the later one, comes from a clock that
    differs.

    difference: the largest difference that was found in the last minute, in seconds: a lower bound.
    """

    def __init__(self) -> None:
        self.difference = 0.0
        # For each host: its last heartbeat, and the monotonic times of the reads before and after the heartbeat.
        self._seen: dict[_NodeDesc, tuple[datetime, float, float]] = {}
        self._found_at = self._last_look = -math.inf

    def compare(self, heartbeats: Mapping[_NodeDesc, datetime], now: datetime, monotonic_seconds: float) -> None:
        """Compare the clocks. heartbeats: each host's last heartbeat, just read. now, monotonic_seconds: the time on
        two clocks.

        This host's own last heartbeat shows whether the clock of this host has jumped since.
        """
        differences = []
        for node, at in heartbeats.items():
            if node not in self._seen or self._seen[node][0] != at:
                before = self._last_look if node in self._seen else -math.inf  # a new host's heartbeat may have any age
                self._seen[node] = at, before, monotonic_seconds
            _, before, after = self._seen[node]
            age = (now - at).total_seconds()
            differences += [age - (monotonic_seconds - before), (monotonic_seconds - after) - age]
        found, self._last_look = max([0.0, *differences]), monotonic_seconds
        if found >= self.difference or monotonic_seconds - self._found_at > _REMEMBERED_SECONDS:
            self.difference, self._found_at = found, monotonic_seconds


def state_to_json(state: _RendezvousState) -> bytes:
    """Return the state as JSON. Equal states give equal bytes."""
    plain = {
        "round": state.round,
        "complete": state.complete,
        "closed": state.closed,
        "deadline": None if state.deadline is None else state.deadline.timestamp(),
        "participants": sorted([*_plain(node), rank] for node, rank in state.participants.items()),
        "wait_list": sorted(map(_plain, state.wait_list)),
        "redundancy_list": sorted(map(_plain, state.redundancy_list)),
        "last_heartbeats": sorted([*_plain(node), at.timestamp()] for node, at in state.last_heartbeats.items()),
    }
    return json.dumps(plain).encode()


def state_of(text: bytes) -> _RendezvousState:
    """Return the state that `state_to_json` has described. Raises RendezvousStateError for anything else."""
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has {len(text):,} bytes")
        plain, state = json.loads(text), _RendezvousState()
        state.round, state.complete, state.closed = (
            _is(int, plain["round"]),
            _is(bool, plain["complete"]),
            _is(bool, plain["closed"]),
        )
        state.deadline = None if plain["deadline"] is None else _time(plain["deadline"])
        state.participants = {_node(*each): _is(int, rank) for *each, rank in plain["participants"]}
        state.wait_list = {_node(*each) for each in plain["wait_list"]}
        state.redundancy_list = {_node(*each) for each in plain["redundancy_list"]}
        state.last_heartbeats = {_node(*each): _time(at) for *each, at in plain["last_heartbeats"]}
    except (ValueError, TypeError, LookupError, OverflowError, OSError, RecursionError) as error:
        raise RendezvousStateError(
            "the state in the rendezvous was not written by a launcher of this version of Manyhands: "
            f"{type(error).__name__}: {str(error)[:200]!a}"
        ) from error
    return state


def _plain(node: _NodeDesc) -> list[Any]:
    return [node.addr, node.pid, node.local_id]


def _node(address: Any, pid: Any, local_id: Any) -> _NodeDesc:
    return _NodeDesc(_is(str, address), _is(int, pid), _is(int, local_id))


def _time(seconds: Any) -> datetime:
    return datetime.fromtimestamp(_is(float, seconds), UTC)


def _is(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value
