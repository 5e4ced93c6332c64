"""Shard arithmetic: blocks, parameter slots, unit layouts and ranges, in integers only.

Every parameter starts at the start of a block, so each block belongs to one parameter and has the same number in every
layout:

    unit "layers.0"      |w: 2,500 elements              |b: 30      |        BLOCK = 1,024
    blocks                [  0  ][  1  ][  2: 452 + pad  ][  3: 30 + pad  ]
    2 workers             [ worker 0: 2 blocks  ][ worker 1: 2 blocks     ]
    3 workers             [  worker 0: 2  ][  worker 1: 2  ][ worker 2: 2, only padding  ]

A shard is a run of complete blocks, of the same length on every worker (the last shards may hold only padding). So with
any number of workers, an elementwise kernel processes an element in the same vector lane, and a block-wise reduction
processes the same blocks.

In an *unsplittable* unit every parameter lies completely in the shard of one worker, its owner. Padding makes the
shards equally long:

    unsplittable "layers.1"     |w: 2,500 elements              |b: 30      |
    2 workers             [ worker 0: w, 3 blocks               ][ worker 1: b, 1 block, then 2 of padding ]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from manyhands.errors import InvariantError

BLOCK = 1024
"""The number of elements in a block.

Sharding, norms and digests work on blocks. Never change this number, because digests depend on it.
"""


class Range(NamedTuple):
    """The elements [start, end)."""

    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start

    def overlap(self, other: Range) -> Range:
        """Return the elements that are in both ranges. An empty range has end == start."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.end, other.end)))


def blocks_of(numel: int) -> int:
    """Return the number of blocks that hold `numel` elements. The last block may be partly filled."""
    return -(-numel // BLOCK)


@dataclass(frozen=True, kw_only=True)
class ParamSlot:
    """The position of a parameter in its unit."""

    name: str
    numel: int
    start: int  # the first element in the unit, a multiple of BLOCK
    first_block: int  # the number of its first block in the model

    @property
    def range(self) -> Range:
        """Return the range of the parameter's elements in the unit, without the padding after them."""
        return Range(self.start, self.start + self.numel)

    @property
    def num_blocks(self) -> int:
        return blocks_of(self.numel)

    @property
    def padded(self) -> Range:
        """Return the range of the parameter's blocks in the unit, padding included."""
        return Range(self.start, self.start + self.num_blocks * BLOCK)


class ParamPiece(NamedTuple):
    """The part of a parameter that lies in a given range of its unit."""

    slot: ParamSlot
    in_unit: Range
    in_param: Range


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """Parameters that travel together, and their shards on `workers` workers.

    slots: the parameters' positions, in their order in the unit.
    shard_numel: the number of elements of each worker's shard, padding included.
    unsplittable: True if every parameter lies in one shard. In that case, padding follows each shard's last parameter.
    """

    name: str
    slots: tuple[ParamSlot, ...]
    workers: int
    shard_numel: int
    unsplittable: bool = False

    @property
    def num_blocks(self) -> int:
        return sum(slot.num_blocks for slot in self.slots)

    @property
    def padded_numel(self) -> int:
        """Return the number of elements of the unsharded unit in a buffer, padding included."""
        return self.shard_numel * self.workers

    @property
    def extent(self) -> Range:
        """Return the range from the first block to the last, without the padding at the end of the unit."""
        return Range(0, max((slot.padded.end for slot in self.slots), default=0))

    @property
    def gaps(self) -> list[Range]:
        """Return the ranges of padding between parameters, before the first one, and after the last one up to
        padded_numel.
        """
        ends = [0, *(slot.range.end for slot in self.slots)]
        starts = [*(slot.start for slot in self.slots), self.padded_numel]
        return [Range(end, start) for end, start in zip(ends, starts, strict=True)]

    def shard(self, rank: int) -> Range:
        """Return the range of the blocks that `rank` owns, without the padding that completes the shard."""
        return self.part(rank, self.workers)

    def part(self, index: int, parts: int) -> Range:
        """Return the range of the blocks in part `index` of `parts`, without the padding that completes the part.

        All parts are equally long and consist of complete shards, because `parts` is a divisor of `workers`.
        """
        numel = self.padded_numel // parts
        mine = Range(index * numel, (index + 1) * numel)
        ends = [common.end for slot in self.slots if (common := slot.padded.overlap(mine)).numel]
        return Range(mine.start, max(ends, default=mine.start))

    def pieces(self, within: Range) -> Iterator[ParamPiece]:
        """Yield the parts of parameters inside `within`, in order."""
        for slot in self.slots:
            common = slot.range.overlap(within)
            if common.numel:
                yield ParamPiece(slot, common, Range(common.start - slot.start, common.end - slot.start))

    def block_numbers(self, within: Range) -> list[int]:
        """Return the model-wide numbers of the blocks inside `within`, in order. `within` has complete blocks only."""
        numbers: list[int] = []
        for slot in self.slots:
            blocks = Range(slot.start // BLOCK, slot.start // BLOCK + slot.num_blocks)
            common = blocks.overlap(Range(within.start // BLOCK, within.end // BLOCK))
            first = slot.first_block - blocks.start
            numbers.extend(range(first + common.start, first + common.end))
        return numbers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All units of a model on `workers` workers. Raises InvariantError if slots overlap or leave gaps."""

    units: tuple[UnitLayout, ...]
    workers: int

    def __post_init__(self) -> None:
        slots = sorted((slot for unit in self.units for slot in unit.slots), key=lambda slot: slot.first_block)
        for before, after in pairwise(slots):
            if before.first_block + before.num_blocks != after.first_block:
                raise InvariantError(
                    "the block numbers are not consecutive",
                    where=f"{before.name} -> {after.name}",
                    got=after.first_block,
                )
        if len({unit.name for unit in self.units}) != len(self.units):
            raise InvariantError("two units have the same name", got=[unit.name for unit in self.units])
        for unit in self.units:
            for one, other in pairwise(unit.slots):
                gap = other.start - one.padded.end
                if gap < 0 or (gap and not unit.unsplittable):
                    raise InvariantError("parameters overlap or leave a gap", where=f"{unit.name}: {other.name}")
            for slot in filter(lambda slot: slot.numel, unit.slots):
                if unit.unsplittable and slot.start // unit.shard_numel != (slot.padded.end - 1) // unit.shard_numel:
                    raise InvariantError("a parameter is split", where=f"{unit.name}: {slot.name}", got=slot.padded)

    @property
    def num_blocks(self) -> int:
        return sum(unit.num_blocks for unit in self.units)

    @property
    def numel(self) -> int:
        """Return the number of elements of all parameters, without padding."""
        return sum(slot.numel for unit in self.units for slot in unit.slots)

    def block_numbers(self, rank: int) -> list[int]:
        """Return the numbers of the blocks in `rank`'s shards, unit by unit."""
        return [number for unit in self.units for number in unit.block_numbers(unit.shard(rank))]


def divide_evenly(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Divide the indices of `sizes` into `shares` shares. Return the shares, the heaviest first.

    Each size, the largest first, is assigned to the share that is lightest so far. So the heaviest share is at most 4/3
    of the best possible value (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    found: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = loads.index(min(loads))
        found[lightest].append(index)
        loads[lightest] += sizes[index]
    return [found[share] for share in sorted(range(shares), key=lambda share: -loads[share])]


def build_layout(
    params: Sequence[tuple[str, int]],
    units: Sequence[tuple[str, Sequence[str]]],
    workers: int,
    unsplittable: Collection[str] = (),
) -> Layout:
    """Lay out `params` (name, numel; in construction order) in `units` (unit name, parameter names).

    unsplittable: names of the units whose parameters each have one owner.
    """
    # Blocks are numbered in construction order, so a block's number depends on neither the units nor the workers.
    numels = dict(params)
    first_blocks, number = {}, 0
    for name, numel in params:
        first_blocks[name] = number
        number += blocks_of(numel)
    layouts, loads = [], [0] * workers
    for unit_name, names in units:
        blocks = [blocks_of(numels[name]) for name in names]
        if unit_name in unsplittable:
            starts, shard_blocks = _unsplittable_starts(blocks, loads)
        else:
            starts, shard_blocks = [0, *accumulate(blocks)], -(-sum(blocks) // workers)
        slots = [
            ParamSlot(name=name, numel=numels[name], start=start * BLOCK, first_block=first_blocks[name])
            for name, start in zip(names, starts, strict=False)
        ]
        layouts.append(
            UnitLayout(
                name=unit_name,
                slots=tuple(sorted(slots, key=lambda slot: slot.start)),
                workers=workers,
                shard_numel=shard_blocks * BLOCK,
                unsplittable=unit_name in unsplittable,
            )
        )
    return Layout(units=tuple(layouts), workers=workers)


def _unsplittable_starts(blocks: Sequence[int], loads: list[int]) -> tuple[list[int], int]:
    """Return each parameter's first block in its unit, and the number of blocks in a shard.

    blocks: the number of blocks of each parameter. loads: the number of blocks that each worker owns so far; this
    function adds the unit's blocks to it.
    """
    shares = divide_evenly(blocks, len(loads))
    shard_blocks = sum(blocks[index] for index in shares[0])
    starts = [0] * len(blocks)
    # The heaviest share is assigned to the worker with the lightest load from earlier units, to balance the model.
    for share, owner in zip(shares, sorted(range(len(loads)), key=lambda rank: loads[rank]), strict=True):
        start = owner * shard_blocks
        for index in sorted(share):
            starts[index] = start
            start += blocks[index]
        loads[owner] += start - owner * shard_blocks
    return starts, shard_blocks
