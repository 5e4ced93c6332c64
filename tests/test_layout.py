"""The arithmetic of shards: nothing lost, nothing twice, and the same blocks in every layout."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from manyhands.layout import BLOCK, Layout, Range, build_layout

numels = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    params = [(f"p{index}", numel) for index, numel in enumerate(draw(numels))]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(params) - 1)), max_size=4)))
    bounds = [0, *[cut for cut in cuts if cut < len(params)], len(params)]
    units = [
        (f"u{index}", [name for name, _ in params[a:b]]) for index, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    return build_layout(params, units, draw(st.integers(1, 64)))


@given(layouts())
def test_shards_cover_every_element_once_in_whole_blocks(layout: Layout) -> None:
    for unit in layout.units:
        covered: dict[str, list[int]] = {slot.name: [] for slot in unit.slots}
        for rank in range(layout.workers):
            shard = unit.shard(rank)
            assert shard.start % BLOCK == 0
            assert shard.numel % BLOCK == 0
            assert shard.numel <= unit.shard_numel
            for piece in unit.pieces(shard):
                assert piece.in_param.start % BLOCK == 0  # so vector lanes fall alike in every shard
                assert piece.in_unit.numel == piece.in_param.numel
                covered[piece.slot.name].extend(piece.in_param)
        for slot in unit.slots:
            starts, ends = covered[slot.name][::2], covered[slot.name][1::2]
            assert starts == [0, *ends[:-1]]
            assert ends[-1] == slot.numel
        assert unit.padded_numel == unit.shard_numel * layout.workers


@given(layouts())
def test_blocks_are_numbered_alike_whatever_the_workers_and_units(layout: Layout) -> None:
    numbers = sorted(number for rank in range(layout.workers) for number in layout.block_numbers(rank))
    assert numbers == list(range(layout.num_blocks))
    slots = {slot.name: slot for unit in layout.units for slot in unit.slots}
    alone = build_layout([(name, slot.numel) for name, slot in slots.items()], [("all", list(slots))], 1)
    assert {slot.name: slot.first_block for slot in alone.units[0].slots} == {
        name: slot.first_block for name, slot in slots.items()
    }


@given(layouts(), st.integers(0, 63))
def test_block_numbers_follow_the_shards_elements(layout: Layout, rank: int) -> None:
    rank %= layout.workers
    for unit in layout.units:
        numbers = unit.block_numbers(unit.shard(rank))
        assert len(numbers) == unit.shard(rank).numel // BLOCK
        for piece in unit.pieces(unit.shard(rank)):
            first = (piece.in_unit.start - unit.shard(rank).start) // BLOCK
            assert numbers[first] == piece.slot.first_block + piece.in_param.start // BLOCK


@given(st.tuples(st.integers(0, 50), st.integers(0, 50)), st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_overlap_is_what_both_have(one: tuple[int, int], other: tuple[int, int]) -> None:
    first, second = Range(min(one), max(one)), Range(min(other), max(other))
    common = first.overlap(second)
    assert set(range(*common)) == set(range(*first)) & set(range(*second))
