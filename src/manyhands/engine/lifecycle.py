"""A unit's life: four states and a literal table of what may follow what. Anything else raises with the unit's story.

state       meaning                                         its parameters       its gradients
RESTING     between uses                                    as the stage keeps   none, or summed
GATHERING   parameters on their way                         arriving             none
READY       a micro-batch computes with it                  full                 arriving, one by one
REDUCING    gradients complete, on their way to the owners  as the stage keeps   leaving
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from manyhands.errors import InvariantError


class State(Enum):
    """See the module."""

    RESTING = "resting"
    GATHERING = "gathering"
    READY = "ready"
    REDUCING = "reducing"


class Event(Enum):
    """What can happen to a unit."""

    GATHER = "gather"  # its parameters are wanted
    GATHERED = "gathered"  # they are there
    RELEASE = "release"  # they aren't wanted for now
    REDUCE = "reduce"  # all its gradients of a micro-batch are there, and leave
    REDUCED = "reduced"  # its owners have added them
    ABORT = "abort"  # the step failed


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RESTING, Event.GATHER): State.GATHERING,
    (State.GATHERING, Event.GATHERED): State.READY,
    (State.READY, Event.RELEASE): State.RESTING,
    (State.READY, Event.REDUCE): State.REDUCING,
    (State.REDUCING, Event.REDUCED): State.RESTING,
    # A worker that has no micro-batch in a round reduces without having computed; so does one that sends its sums, and
    # one whose model has left the unit before every gradient was there.
    (State.RESTING, Event.REDUCE): State.REDUCING,
    **{(state, Event.ABORT): State.RESTING for state in State},
}


class Lifecycle:
    """The state of one unit, and how it came to it."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, State.RESTING
        self.story: deque[str] = deque(maxlen=32)

    def on(self, event: Event) -> None:
        """Make the transition. Raises InvariantError if the table has none."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise InvariantError(
                f"unit {self.name!r} can't {event.value} while it is {self.state.value}",
                detail="its story: " + (" ".join(self.story) or "none yet"),
            )
        self.story.append(f"{self.state.value}--{event.value}-->{following.value}")
        self.state = following
