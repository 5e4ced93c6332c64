"""Counted randomness: known numbers, no collisions, and generators whose states are restored."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.numerics.counters import derive, deriving
from manyhands.numerics.seeds import preserved_generators, seed_generators

counters = st.lists(st.one_of(st.integers(), st.text()), max_size=4)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def raise_after_drawing() -> None:
    seed_generators(6)
    raise ZeroDivisionError


def test_derived_seeds_never_change() -> None:
    """These numbers are guaranteed: changing one changes the bits of every run."""
    assert derive(0) == 8_831_920_809_871_563_824
    assert derive(7, "compute", 3, 1) == 3_569_116_692_197_316_867
    assert derive(7, "data", 3, 1) != derive(7, "compute", 3, 1)
    assert deriving("compute", 3, 1)(7) == 3_569_116_692_197_316_867


@given(st.integers(), counters, st.integers(), counters)
def test_only_equal_tuples_share_a_seed(a: int, first: list[int | str], b: int, second: list[int | str]) -> None:
    assert 0 <= derive(a, *first) < 2**63
    assert (derive(a, *first) == derive(b, *second)) == ((a, *first) == (b, *second))


@pytest.mark.parametrize(
    ("first", "second"), [((1, 23), (12, 3)), ((1, "2"), (1, 2)), ((1, "a", "b"), (1, "ab")), ((1, "s1:a;"), (1, "a"))]
)
def test_different_tuples_have_different_encodings(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert derive(*first) != derive(*second)


def test_numpy_integers_count_as_integers_and_fractions_are_refused() -> None:
    assert derive(3, np.int64(5)) == derive(3, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        derive(3, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1, 2**32, 2**63 - 1])
def test_seeding_decides_every_generator(value: int) -> None:
    with preserved_generators():
        seed_generators(value)
        first = draw()
        draw()
        seed_generators(value)
        assert draw() == first
        seed_generators(value ^ (1 << 40) ^ 1)
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_seeding_a_gpu_that_is_not_in_use_is_prepared_once() -> None:
    with preserved_generators():
        seed_generators(1)
        queued = len(torch.cuda._queued_calls)
        seed_generators(2)
        assert len(torch.cuda._queued_calls) == queued
    seeding = [call for call, *_ in torch.cuda._queued_calls if call.__module__ == "manyhands.numerics.seeds"]
    assert len(seeding) == (not torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def test_generators_are_restored_even_after_an_error() -> None:
    with preserved_generators():
        seed_generators(5)
        expected = draw()
        seed_generators(5)
        with pytest.raises(ZeroDivisionError), preserved_generators():
            raise_after_drawing()
        assert draw() == expected
