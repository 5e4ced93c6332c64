"""The state of torch's rendezvous as JSON, because torch would store pickles that anybody on the network may replace.

Whoever can connect to the rendezvous port can write this state. torch's own state holder unpickles what it finds there,
which executes code chosen by the writer. This module replaces the holder. It uses private classes of torch.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    _BackendRendezvousStateHolder,
    _NodeDesc,
    _RendezvousState,
    create_handler,
)

from manyhands.launching.remote_store import RemoteStore

_MOST_BYTES = 1 << 20  # a state has about 200 bytes per host


def json_handler(store: RemoteStore, parameters: RendezvousParameters) -> DynamicRendezvousHandler:
    """Return torch's handler of a rendezvous whose state is in `store`, as JSON."""
    backend = C10dRendezvousBackend(store, parameters.run_id)
    made = create_handler(store, backend, parameters)  # only its node and settings are used
    holder = _JsonStateHolder(backend, made._settings)
    return DynamicRendezvousHandler(made._this_node, made._settings, backend.name, store, holder)


class _JsonStateHolder(_BackendRendezvousStateHolder):
    """torch's holder of the state, with JSON in place of pickles."""

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
        self._sanitize()
        return has_set


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
