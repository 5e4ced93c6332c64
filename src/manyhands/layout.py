"""The one arithmetic of shards: from (names, sizes, units, workers) to blocks, offsets and ranges. Integers only.

Every parameter starts at a block, so a block belongs to one parameter and has one number, the same in every layout:

    unit "layers.0"      |w: 2,500 elements              |b: 30      |        BLOCK = 1,024
    blocks                [  0  ][  1  ][  2: 452 + pad  ][  3: 30 + pad  ]
    2 workers             [ worker 0: 2 blocks  ][ worker 1: 2 blocks     ]
    3 workers             [  worker 0: 2  ][  worker 1: 2  ][ worker 2: 2, only padding  ]

A shard is a run of whole blocks, as long for every worker (the last ones may hold nothing but padding). So an
elementwise kernel sees the same vector lanes, and a block-wise reduction the same blocks, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from manyhands.errors import InvariantError

BLOCK = 1024
"""Elements in a block: the unit of sharding, of norms and of digests."""


class Range(NamedTuple):
    """Elements [start, end)."""

    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start

    def overlap(self, other: Range) -> Range:
        """What both have (empty ranges have end == start)."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.end, other.end)))


def blocks_of(numel: int) -> int:
    """Blocks that `numel` elements fill, the last one perhaps partly."""
    return -(-numel // BLOCK)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a parameter lies in its unit."""

    name: str
    numel: int
    start: int  # in the unit, a multiple of BLOCK
    first_block: int  # number of its first block in the model

    @property
    def range(self) -> Range:
        """Its elements in the unit, without the padding behind them."""
        return Range(self.start, self.start + self.numel)

    @property
    def num_blocks(self) -> int:
        return blocks_of(self.numel)


class Piece(NamedTuple):
    """The part of a parameter that lies in a given range of its unit."""

    slot: Slot
    in_unit: Range
    in_param: Range


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """Parameters that travel together, and their shards among `workers`."""

    name: str
    slots: tuple[Slot, ...]
    workers: int

    @property
    def num_blocks(self) -> int:
        return sum(slot.num_blocks for slot in self.slots)

    @property
    def shard_numel(self) -> int:
        """Elements of each worker's shard, padding included."""
        return -(-self.num_blocks // self.workers) * BLOCK

    @property
    def padded_numel(self) -> int:
        """Elements of the whole unit in a buffer, padding included."""
        return self.shard_numel * self.workers

    @property
    def whole(self) -> Range:
        """All blocks, without the padding that only evens out the shards."""
        return Range(0, self.num_blocks * BLOCK)

    @property
    def gaps(self) -> list[Range]:
        """The padding behind each parameter, and behind the last one up to padded_numel."""
        starts = [*(slot.start for slot in self.slots[1:]), self.padded_numel]
        return [Range(slot.range.end, start) for slot, start in zip(self.slots, starts, strict=True)]

    def shard(self, rank: int) -> Range:
        """The blocks that `rank` owns, without the padding that only evens out the shards."""
        return Range(rank * self.shard_numel, (rank + 1) * self.shard_numel).overlap(self.whole)

    def pieces(self, within: Range) -> Iterator[Piece]:
        """The parts of parameters inside `within`, in order."""
        for slot in self.slots:
            common = slot.range.overlap(within)
            if common.numel:
                yield Piece(slot, common, Range(common.start - slot.start, common.end - slot.start))

    def block_numbers(self, within: Range) -> list[int]:
        """The model-wide numbers of the blocks inside `within` (whole blocks), in order."""
        numbers: list[int] = []
        for slot in self.slots:
            blocks = Range(slot.start // BLOCK, slot.start // BLOCK + slot.num_blocks)
            common = blocks.overlap(Range(within.start // BLOCK, within.end // BLOCK))
            first = slot.first_block - blocks.start
            numbers.extend(range(first + common.start, first + common.end))
        return numbers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All units of a model among `workers`."""

    units: tuple[UnitLayout, ...]
    workers: int

    def __post_init__(self) -> None:
        slots = sorted((slot for unit in self.units for slot in unit.slots), key=lambda slot: slot.first_block)
        for before, after in pairwise(slots):
            if before.first_block + before.num_blocks != after.first_block:
                raise InvariantError(
                    "blocks are not numbered without gaps",
                    where=f"{before.name} -> {after.name}",
                    got=after.first_block,
                )
        if len({unit.name for unit in self.units}) != len(self.units):
            raise InvariantError("two units have the same name", got=[unit.name for unit in self.units])
        for unit in self.units:
            for one, other in pairwise(unit.slots):
                if other.start != one.start + one.num_blocks * BLOCK:
                    raise InvariantError("parameters overlap or leave a gap", where=f"{unit.name}: {other.name}")

    @property
    def num_blocks(self) -> int:
        return sum(unit.num_blocks for unit in self.units)

    @property
    def numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(slot.numel for unit in self.units for slot in unit.slots)

    def block_numbers(self, rank: int) -> list[int]:
        """The numbers of the blocks in `rank`'s shards, unit by unit."""
        return [number for unit in self.units for number in unit.block_numbers(unit.shard(rank))]


def build_layout(params: Sequence[tuple[str, int]], units: Sequence[tuple[str, Sequence[str]]], workers: int) -> Layout:
    """Lay out `params` (name, numel; in construction order) in `units` (unit name, parameter names).

    Blocks are numbered in construction order, so a block's number depends on neither the units nor the workers.
    """
    numels = dict(params)
    first_blocks, number = {}, 0
    for name, numel in params:
        first_blocks[name] = number
        number += blocks_of(numel)
    layouts = []
    for unit_name, names in units:
        slots, start = [], 0
        for name in names:
            slots.append(Slot(name=name, numel=numels[name], start=start, first_block=first_blocks[name]))
            start += blocks_of(numels[name]) * BLOCK
        layouts.append(UnitLayout(name=unit_name, slots=tuple(slots), workers=workers))
    return Layout(units=tuple(layouts), workers=workers)
