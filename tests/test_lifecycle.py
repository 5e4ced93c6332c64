"""A unit's states: transitions of the table are applied, all others raise with the unit's history."""

from __future__ import annotations

import itertools

import pytest

from manyhands.engine.units.unit import TRANSITIONS, Event, Lifecycle, State
from manyhands.errors import InvariantError


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_of_state_and_event(state: State, event: Event) -> None:
    life = Lifecycle("blocks.0")
    life.state = state
    if (state, event) in TRANSITIONS:
        life.on(event)
        assert life.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(InvariantError, match=r"blocks\.0"):
            life.on(event)
        assert life.state is state


def test_the_error_contains_the_history() -> None:
    life = Lifecycle("blocks.0")
    life.on(Event.UNSHARD)
    life.on(Event.UNSHARDED)
    with pytest.raises(InvariantError) as caught:
        life.on(Event.REDUCED)
    assert "resting--unshard-->unsharding unsharding--unsharded-->ready" in str(caught.value)


def test_abort_leads_to_resting_from_every_state() -> None:
    assert all(TRANSITIONS[state, Event.ABORT] is State.RESTING for state in State)
