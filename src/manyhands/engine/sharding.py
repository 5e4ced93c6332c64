"""Shardings as values: DDP, ZERO1, ZERO2 and ZERO3, three placements each.

    bytes per parameter and worker, bf16 with AdamW, each worker with memory of its own (N workers; the fp32 sums in
    flight, and what clipping keeps, come on top; where workers share memory, see docs/memory.md)

              param         grad          optim          bytes
    DDP       replicated    replicated    replicated     2 + 2 + 12 + 4 (the summed gradient)
    ZERO1     replicated    replicated    sharded        2 + 2 + 12/N
    ZERO2     replicated    sharded       sharded        2 + one unit's + 12/N
    ZERO3     sharded       sharded       sharded        2/N + one unit's + 12/N

Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from manyhands.config import nearest
from manyhands.errors import ConfigError


class Placement(Enum):
    """Whether every worker holds all of something, or only its shard."""

    REPLICATED = "replicated"
    SHARDED = "sharded"


REPLICATED, SHARDED = Placement.REPLICATED, Placement.SHARDED


@dataclass(frozen=True)
class Sharding:
    """Where parameters, gradients and optimizer state (with master weights) are."""

    name: str
    param: Placement
    grad: Placement
    optim: Placement


DDP = Sharding("ddp", REPLICATED, REPLICATED, REPLICATED)

ZERO1 = Sharding("zero1", REPLICATED, REPLICATED, SHARDED)

ZERO2 = Sharding("zero2", REPLICATED, SHARDED, SHARDED)

ZERO3 = Sharding("zero3", SHARDED, SHARDED, SHARDED)

SHARDING_BY_NAME = {sharding.name: sharding for sharding in (DDP, ZERO1, ZERO2, ZERO3)}


def sharding_named(name: str) -> Sharding:
    """The sharding of that name. Raises ConfigError."""
    if name not in SHARDING_BY_NAME:
        raise ConfigError(
            "no such sharding",
            expected=", ".join(SHARDING_BY_NAME),
            got=repr(name),
            hint=nearest(name, SHARDING_BY_NAME),
        )
    return SHARDING_BY_NAME[name]
