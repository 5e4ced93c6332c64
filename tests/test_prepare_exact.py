"""Sums, means, variances and extremes are exact, wherever records are divided: `math.fsum` and fractions say so."""

from __future__ import annotations

import datetime
import json
import math
import random
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.engines.local import Pool
from manyhands.prepare.records.exact_arrays import float_sums

TIGHT = InProcess(0)  # ranges are worked on a few blocks at a time
RECORD = 50  # the estimated bytes of a record
CUTS = (1, 2, 3, 7, 10**6)  # records per partition
inf, nan = math.inf, math.nan

WAYS = {
    "sum": mh.Aggregate.sum(of="x"),
    "mean": mh.Aggregate.mean(of="x"),
    "variance": mh.Aggregate.variance(of="x"),
    "least": mh.Aggregate.minimum(of="x"),
    "most": mh.Aggregate.maximum(of="x"),
}


def results(values: Sequence[Any], cut: int, ways: Sequence[str], *, as_table: bool = False) -> list[Any]:
    """The aggregates of all values as one group, with at most `cut` records in a partition."""
    made = mh.Dataset.from_records([{"k": 0, "x": value} for value in values], partition_bytes=cut * RECORD)
    if as_table:
        made = made.map_batches(lambda table: table)
    (row,) = made.group_by("k").aggregate(**{way: WAYS[way] for way in ways}).take(2, engine=TIGHT, progress=False)
    return [row[way] for way in ways]


def bits(value: Any) -> str:
    """With the type, the sign of zero, and one form of NaN."""
    return f"{type(value).__name__} {value!r}"


def test_a_float_sum_does_not_depend_on_cuts(tmp_path: Path) -> None:
    random.seed(1)
    values = [random.lognormvariate(0, 4) * random.choice((-1, 1)) for _ in range(5000)]
    pq.write_table(pa.table({"k": [0] * 5000, "x": values}), tmp_path / "in.parquet", row_group_size=500)
    found = {
        made.group_by("k").aggregate(x=WAYS["sum"]).take(1, engine=TIGHT, progress=False)[0]["x"]
        for made in (
            *(
                mh.Dataset.from_records([{"k": 0, "x": x} for x in values], partition_bytes=RECORD * n)
                for n in (64, 500, 9999)
            ),
            *(mh.Dataset.read(f"{tmp_path}/in.parquet", partition_bytes=size) for size in (1, 2**30)),
        )
    }
    assert found == {-1923848.8193952963}


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize(
    ("values", "total", "mean"),
    [
        ([1e16, 1.0, -1e16, 0.0], 1.0, 0.25),
        ([0.1] * 10, 1.0, 0.1),
        ([1e308, 1e308, -1e308], 1e308, 1e308 / 3),
        ([1.7e308, 1.7e308], inf, 1.7e308),
        ([-1.7e308] * 3, -inf, -1.7e308),
        ([5e-324] * 3, 1.5e-323, 5e-324),
        ([1e308, 5e-324, -1e308], 5e-324, 0.0),
        ([2.0**53, 1.0, 2.0**-60], 2.0**53 + 2, 3002399751580331.0),
        ([1.0, inf, 2.0], inf, inf),
        ([inf, 1.0, -inf], nan, nan),
        ([1e308, 1e308, -inf], -inf, -inf),
        ([1.0, nan, inf], nan, nan),
        ([-0.0, -0.0], -0.0, -0.0),
        ([-0.0, 0.0], 0.0, 0.0),
        ([1.5, -1.5], 0.0, 0.0),
    ],
)
def test_sums_and_means_of_floats_are_rounded_once(
    values: list[float], total: float, mean: float, as_table: bool
) -> None:
    for cut in CUTS:
        found = results(values, cut, ["sum", "mean"], as_table=as_table)
        assert list(map(bits, found)) == list(map(bits, [total, mean])), cut


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([2**53 + 1, 0.5, -(2**53)], 1.5),
        ([1, 2.5, 10**400, -(10**400)], 3.5),
        ([2**70, 3], 2**70 + 3),
        ([True], 1),
        ([np.True_, np.True_, np.True_], 3),
        ([np.int8(100), np.int8(100)], 200),
        ([np.uint64(2**64 - 1), np.uint64(1)], 2**64),
        ([np.float32(0.1)] * 10, math.fsum([float(np.float32(0.1))] * 10)),
        ([np.float16(2048), np.float16(1), np.float16(1)], 2050.0),
        ([Fraction(1, 3), Fraction(2, 3)], Fraction(1)),
        ([Fraction(1, 3), 1e16, Fraction(2, 3), -1e16], 1.0),
        ([1e16 + 1j, 1 + 1e16j, -1e16 + 0j, -1e16j], 1 + 1j),
        ([Decimal("1" + "0" * 30), Decimal("0.01"), Decimal("-1e30")], Decimal("0.01")),
        ([Decimal("Infinity"), Decimal(1), Decimal("-Infinity")], Decimal("NaN")),
        ([Decimal("sNaN"), Decimal(1)], Decimal("NaN")),
        ([datetime.timedelta(days=1), datetime.timedelta(microseconds=1)], datetime.timedelta(days=1, microseconds=1)),
        ([[1], [2]], [1, 2]),
    ],
)
def test_sums_of_other_numbers_are_exact(values: list[Any], total: Any) -> None:
    for cut in CUTS:
        assert list(map(bits, results(values, cut, ["sum"]))) == [bits(total)], cut


def test_a_sum_is_a_float_only_if_a_value_is() -> None:
    records = [{"k": number % 50, "x": number if number % 50 < 25 else number / 2} for number in range(500)]
    made = mh.Dataset.from_records(records).group_by("k").aggregate(x=WAYS["sum"])
    found = {row["k"]: row["x"] for row in made.take(99, engine=TIGHT, progress=False)}
    assert {key for key, value in found.items() if type(value) is int} == set(range(25))
    assert found[1] == sum(range(1, 500, 50))


def test_means_of_decimals_keep_their_digits() -> None:
    for cut in CUTS:
        long = Decimal("1234567890123456789012345678901234567890.5")
        assert results([long, long], cut, ["mean"]) == [long]
        assert results([Decimal(1), Decimal(0), Decimal(0)], cut, ["mean"]) == [Decimal("0." + "3" * 28)]


def test_a_sum_of_decimals_with_too_many_digits_is_refused() -> None:
    with pytest.raises(mh.DataError, match="a sum of decimals has too many digits"):
        results([Decimal("1e999999"), Decimal(1)], 9, ["sum"])


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize(
    ("values", "least", "most"),
    [
        ([nan, 1.0, 2.0], 1.0, nan),
        ([1.0, nan, 2.0], 1.0, nan),
        ([1.0, 2.0, nan], 1.0, nan),
        ([nan, nan], nan, nan),
        ([nan, inf, -inf], -inf, nan),
        ([0.0, -0.0], 0.0, 0.0),
        ([-0.0, 0.0], -0.0, -0.0),
        ([1.0, -0.0, 0.0], -0.0, 1.0),
        ([-1.0, 0.0, -0.0, nan], -1.0, nan),
    ],
)
def test_minimum_and_maximum_order_nan_above_every_number(
    values: list[float], least: float, most: float, as_table: bool
) -> None:
    for cut in CUTS:
        found = results(values, cut, ["least", "most"], as_table=as_table)
        assert list(map(bits, found)) == list(map(bits, [least, most])), cut


@pytest.mark.parametrize(
    ("values", "least", "most"),
    [
        ([1, 1.0, True], 1, 1),
        ([True, 1.0, 1], True, True),
        ([2**53 + 1, 2.0**53, 2**53], 2.0**53, 2**53 + 1),
        ([np.int64(2**53 + 1), np.float64(2.0**53)], 2.0**53, 2**53 + 1),
        ([Decimal("NaN"), Decimal(1), Decimal("sNaN")], Decimal(1), Decimal("NaN")),
        ([Decimal("0.3"), 0.3], 0.3, Decimal("0.3")),
        ([(nan, 1), (1.0, 3), (float("nan"), 2)], (1.0, 3), (nan, 2)),
        ([[1, nan], [1]], [1], [1, nan]),
        (["b", "a"], "a", "b"),
    ],
)
def test_equal_and_odd_values_have_one_minimum_and_maximum(values: list[Any], least: Any, most: Any) -> None:
    for cut in CUTS:
        assert list(map(bits, results(values, cut, ["least", "most"]))) == list(map(bits, [least, most])), cut


def test_values_without_an_order_have_no_minimum() -> None:
    for cut in (1, 9):
        with pytest.raises(mh.DataError, match="values have no order, because neither is less"):
            results([frozenset({1}), frozenset({2})], cut, ["least"])


def test_variances_are_exact_and_rounded_once() -> None:
    values = [1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16]
    sample = mh.Aggregate.variance(sample=True)
    for cut in CUTS:
        assert results(values, cut, ["variance"]) == [22.5]
        assert results(list(map(int, values)), cut, ["variance"], as_table=True) == [22.5]
        assert results([1e-300, 3e-300, 1e200, -1e200], cut, ["variance"]) == [inf]
        assert results([1e-170, 3e-170], cut, ["variance"]) == [float(Fraction(3e-170 - 1e-170) ** 2 / 4)]
        assert list(map(bits, results([1.0, inf], cut, ["variance"]))) == ["float nan"]
        assert results([Decimal(1), Decimal(2)], cut, ["variance"]) == [Decimal("0.25")]
        assert results([Fraction(1, 3), Fraction(2, 3)], cut, ["variance"]) == [Fraction(1, 36)]
        made = mh.Dataset.from_records(values, partition_bytes=8 * cut).group_by(lambda x: x > 1e9 + 14)
        rows = made.aggregate(x=sample).take(3, engine=TIGHT, progress=False)
        assert [row["x"] for row in rows] == [21.0, None]


def test_more_values_than_one_chunk_carries_are_added_exactly() -> None:
    values = np.tile(np.array([1e300, 1.0, 2.0**-40, -1e300, 0.1, 1e-300, -(2.0**60)]), 300_000)
    assert len(values) > 2**21
    (state,) = float_sums(np.zeros(len(values), np.intp), 1, values)
    assert mh.Aggregate.sum().finish is not None
    assert mh.Aggregate.sum().finish(state) == math.fsum(values.tolist())


numbers = st.one_of(
    st.floats(),
    st.floats(-1e3, 1e3).map(lambda x: round(x, 2)),
    st.sampled_from(
        [0.0, -0.0, 1e308, -1e308, 1.7976931348623157e308, 5e-324, -5e-324, 2.0**53, 1e16, -1e16, inf, nan]
    ),
)


def exact(values: list[float]) -> tuple[float, float, float]:
    """Sum, mean and variance by fractions."""
    if not all(map(math.isfinite, values)):
        special = sum(value for value in values if not math.isfinite(value))
        return special, special, nan
    total = sum(map(Fraction, values))
    mean = total / len(values)
    if not total:
        zero = -0.0 if all(math.copysign(1, value) < 0 for value in values) and not any(values) else 0.0
        return zero, zero, rounded(sum(Fraction(value) ** 2 for value in values) / len(values))
    return rounded(total), rounded(mean), rounded(sum((Fraction(value) - mean) ** 2 for value in values) / len(values))


def rounded(value: Fraction | int) -> float:
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return inf if value > 0 else -inf


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), numbers), min_size=1, max_size=120), st.integers(1, 60), st.booleans())
def test_aggregates_of_any_floats_equal_those_of_fractions(
    pairs: list[tuple[int, float]], cut: int, as_table: bool
) -> None:
    made = mh.Dataset.from_records([{"k": k, "x": x} for k, x in pairs], partition_bytes=cut * RECORD)
    if as_table:
        made = made.map_batches(lambda table: table)
    for row in made.group_by("k").aggregate(**WAYS).take(9, engine=TIGHT, progress=False):
        values = [x for k, x in pairs if k == row["k"]]
        least = min(values, key=lambda x: (math.isnan(x), x))
        most = max(values, key=lambda x: (math.isnan(x), 0.0 if math.isnan(x) else x))
        found = [row["sum"], row["mean"], row["variance"], row["least"], row["most"]]
        assert list(map(bits, found)) == list(map(bits, [*exact(values), least, most]))


def test_exact_aggregates_have_the_same_bytes_with_any_workers_and_memory(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    count = 6000
    values = np.round(np.exp(draws.normal(3, 2, count)), 2) * draws.choice([1.0, -1.0, 1e12, 1e-12], count)
    keys = draws.integers(0, 1500, count)
    for number, part in enumerate(np.array_split(np.arange(count), 3)):
        pq.write_table(
            pa.table({"k": keys[part], "x": values[part]}), tmp_path / f"{number}.parquet", row_group_size=600
        )

    def written(engine: Any, partition_bytes: int, *, as_table: bool = True) -> bytes:
        """The bytes of all output files: where input is divided decides how many there are."""
        made = mh.Dataset.read(f"{tmp_path}/*.parquet", partition_bytes=partition_bytes)
        made = made if as_table else made.map(lambda row: row)
        folder = f"{tmp_path}/out{len(list(tmp_path.iterdir()))}"
        summary = made.group_by("k").aggregate(**WAYS).write(folder, engine=engine, progress=False)
        engine.close()
        return b"".join(Path(folder, name).read_bytes() for name in summary.files)

    expected = written(InProcess(2**33), 2**30)
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["k"] for row in rows] == sorted(set(keys.tolist()))
    assert all(row["sum"] == math.fsum(values[keys == row["k"]].tolist()) for row in rows[::100])
    assert written(InProcess(0), 2**14) == expected
    assert written(InProcess(0), 2**15, as_table=False) == expected
    assert written(Pool(2, 2**27), 2**16) == expected
