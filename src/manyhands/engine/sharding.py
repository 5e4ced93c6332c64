"""The shardings DDP, ZERO1, ZERO2 and ZERO3, each defined by three placements.

    Bytes per parameter and worker for bf16 with AdamW, on N workers that share no memory. Partial sums in flight (fp32)
    and the total gradient that clipping needs are not included. For shared memory see docs/memory.md.

              param         grad          optim          bytes
    DDP       replicated    replicated    replicated     2 + 2 + 12 + 4 (the summed gradient)
    ZERO1     replicated    replicated    sharded        2 + 2 + 12/N
    ZERO2     replicated    sharded       sharded        2 + one unit's + 12/N
    ZERO3     sharded       sharded       sharded        2/N + one unit's + 12/N

Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5. `shard_layout.py` decides which elements each
worker owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from manyhands.errors import ConfigError
from manyhands.options import nearest


class Placement(Enum):
    """Placement of one kind of state: a full copy on every worker, or one shard on each worker."""

    REPLICATED = "replicated"
    SHARDED = "sharded"


REPLICATED, SHARDED = Placement.REPLICATED, Placement.SHARDED


@dataclass(frozen=True)
class Sharding:
    """The placements of parameters, of gradients, and of optimizer state with master weights."""

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
    """Return the sharding of this name. Raises ConfigError if there is none."""
    if name not in SHARDING_BY_NAME:
        raise ConfigError(
            "no such sharding",
            expected=", ".join(SHARDING_BY_NAME),
            got=repr(name),
            hint=nearest(name, SHARDING_BY_NAME),
        )
    return SHARDING_BY_NAME[name]
