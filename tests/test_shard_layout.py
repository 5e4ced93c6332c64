"""Shard arithmetic: every element once, and the same blocks in every layout."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from manyhands.shard_layout import BLOCK, Layout, Range, build_layout, divide_evenly

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
def test_shards_cover_every_element_once_in_complete_blocks(layout: Layout) -> None:
    for unit in layout.units:
        covered: dict[str, list[int]] = {slot.name: [] for slot in unit.slots}
        for rank in range(layout.workers):
            shard = unit.shard(rank)
            assert shard.start % BLOCK == 0
            assert shard.numel % BLOCK == 0
            assert shard.numel <= unit.shard_numel
            for piece in unit.pieces(shard):
                assert piece.in_param.start % BLOCK == 0  # so vector lanes are the same in every shard
                assert piece.in_unit.numel == piece.in_param.numel
                covered[piece.slot.name].extend(piece.in_param)
        for slot in unit.slots:
            starts, ends = covered[slot.name][::2], covered[slot.name][1::2]
            assert starts == [0, *ends[:-1]]
            assert ends[-1] == slot.numel
        assert unit.padded_numel == unit.shard_numel * layout.workers


@given(layouts())
def test_block_numbers_depend_on_neither_workers_nor_units(layout: Layout) -> None:
    numbers = sorted(number for rank in range(layout.workers) for number in layout.block_numbers(rank))
    assert numbers == list(range(layout.num_blocks))
    slots = {slot.name: slot for unit in layout.units for slot in unit.slots}
    alone = build_layout([(name, slot.numel) for name, slot in slots.items()], [("all", list(slots))], 1)
    assert {slot.name: slot.first_block for slot in alone.units[0].slots} == {
        name: slot.first_block for name, slot in slots.items()
    }


@st.composite
def owned_layouts(draw: st.DrawFn) -> Layout:
    """Some units are unsplittable."""
    cut = draw(layouts())
    params = sorted((slot for unit in cut.units for slot in unit.slots), key=lambda slot: slot.first_block)
    unsplittable = draw(st.sets(st.sampled_from([unit.name for unit in cut.units])))
    units = [(unit.name, [slot.name for slot in unit.slots]) for unit in cut.units]
    return build_layout([(slot.name, slot.numel) for slot in params], units, cut.workers, unsplittable)


@given(owned_layouts())
def test_every_element_has_one_owner_and_unsplittable_parameters_lie_in_one_shard(layout: Layout) -> None:
    for unit in layout.units:
        owners: dict[str, list[int]] = {slot.name: [] for slot in unit.slots}
        numel = 0
        for rank in range(layout.workers):
            shard = unit.shard(rank)
            assert (shard.start % BLOCK, shard.numel % BLOCK) == (0, 0)
            assert shard.start == rank * unit.shard_numel
            assert shard.numel <= unit.shard_numel
            assert len(unit.block_numbers(shard)) == shard.numel // BLOCK
            for piece in unit.pieces(shard):
                owners[piece.slot.name].append(rank)
                numel += piece.in_unit.numel
        assert numel == sum(slot.numel for slot in unit.slots)
        if unit.unsplittable:
            assert all(len(ranks) == 1 for ranks in owners.values())
            assert unit.shard_numel == max(unit.shard(rank).numel for rank in range(layout.workers))
    numbers = sorted(number for rank in range(layout.workers) for number in layout.block_numbers(rank))
    assert numbers == list(range(layout.num_blocks))


@given(owned_layouts())
def test_owners_do_not_change_block_numbers(layout: Layout) -> None:
    slots = sorted((slot for unit in layout.units for slot in unit.slots), key=lambda slot: slot.first_block)
    alone = build_layout([(slot.name, slot.numel) for slot in slots], [("all", [slot.name for slot in slots])], 1)
    assert [slot.first_block for slot in alone.units[0].slots] == [slot.first_block for slot in slots]


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 8))
def test_shares_hold_everything_once_and_the_heaviest_is_not_far_from_the_mean(sizes: list[int], shares: int) -> None:
    found = divide_evenly(sizes, shares)
    assert sorted(index for share in found for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in found]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] * shares <= sum(sizes) + (shares - 1) * max(sizes, default=0)
    assert found == divide_evenly(sizes, shares)


def test_loads_are_balanced_across_units() -> None:
    params = [(f"{unit}{index}", size * BLOCK) for unit in "abcd" for index, size in enumerate((3, 1))]
    units = [(unit, [f"{unit}0", f"{unit}1"]) for unit in "abcd"]
    layout = build_layout(params, units, 2, "abcd")
    assert [sum(unit.shard(rank).numel for unit in layout.units) // BLOCK for rank in range(2)] == [8, 8]


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
def test_overlap_has_the_elements_of_both_ranges(one: tuple[int, int], other: tuple[int, int]) -> None:
    first, second = Range(min(one), max(one)), Range(min(other), max(other))
    common = first.overlap(second)
    assert set(range(*common)) == set(range(*first)) & set(range(*second))
