"""Batches as NumPy arrays hold the values of the table, or the batch is refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.records.numpy_form import numpy_columns

BIG = 2**53 + 1  # the first integer that a float can't hold
ALONE: dict[str, Any] = {"workers": 0, "progress": False}


def same(columns: Any) -> Any:
    return columns


def through_numpy(array: Any, tmp_path: Path, function: Any = same) -> list[Any]:
    """The values of a column after a function of NumPy arrays."""
    pq.write_table(pa.table({"x": array}), tmp_path / "in.parquet")
    made = mh.Dataset.read(f"{tmp_path}/in.parquet").map_batches(function, form="numpy")
    return [row["x"] for row in made.take(99, **ALONE)]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([BIG, None]),
        pa.chunked_array([[BIG], [None]]),
        pa.array([2**64 - 1, None], pa.uint64()),
        pa.array([-BIG, None]),
        pa.array([BIG, None]).dictionary_encode(),
        pa.array([[BIG, None], [1]]),
        pa.array([[[BIG], [None]]]),
        pa.array([[BIG, None]], pa.list_(pa.int64(), 2)),
        pa.array([{"a": BIG}, {"a": None}]),
        pa.array([[("a", BIG), ("b", None)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[{"a": BIG}, {"a": None}]]),
    ],
    ids=lambda array: str(array.type),
)
def test_integers_beside_nulls_are_refused_if_floats_can_not_hold_them(array: Any) -> None:
    with pytest.raises(mh.DataError) as caught:
        numpy_columns(pa.table({"n": array}))
    assert caught.value.what == "column 'n' can't be passed as NumPy arrays without changing values"
    assert "beside a null" in str(caught.value.got)
    assert "form='arrow'" in str(caught.value.hint)


def test_the_error_of_a_batch_names_the_column(tmp_path: Path) -> None:
    with pytest.raises(mh.DataError, match="column 'x' can't be passed as NumPy arrays"):
        through_numpy(pa.array([BIG, None]), tmp_path)


@pytest.mark.parametrize(
    ("array", "dtype", "values"),
    [
        (pa.array([BIG, 2]), "int64", [BIG, 2]),
        (pa.array([2**53, None]), "float64", [2.0**53, np.nan]),
        (pa.array([2**60, -(2**63), None]), "float64", [2.0**60, -(2.0**63), np.nan]),
        (pa.array([2**63, None], pa.uint64()), "float64", [2.0**63, np.nan]),
        (pa.array([1, None], pa.int8()), "float64", [1.0, np.nan]),
        (pa.array([True, None]), "object", [True, None]),
        (pa.array(["b", "a", None]).dictionary_encode(), "object", ["b", "a", None]),
        (pa.array([1, None, 3]).dictionary_encode(), "float64", [1.0, np.nan, 3.0]),
        (pa.array([True, None, False]).dictionary_encode(), "object", [True, None, False]),
        (pa.array([Decimal("1.1"), None]), "object", [Decimal("1.1"), None]),
        (pa.array([1, None], pa.timestamp("ns")), "datetime64[ns]", [1, None]),
        (pa.array([3, None], pa.date32()), "datetime64[D]", [datetime.date(1970, 1, 4), None]),
        (pa.array([7, None], pa.time64("ns")).slice(1), "object", [None]),
        (pa.array([None, {"a": BIG}]), "object", [None, {"a": BIG}]),
        (
            pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array([5, None])),
            "float64",
            [5, 5, np.nan],
        ),
        (pa.chunked_array([], pa.int64()), "int64", []),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_columns_keep_their_values_as_numpy_arrays(array: Any, dtype: str, values: list[Any]) -> None:
    found = numpy_columns(pa.table({"x": array}))["x"]
    assert str(found.dtype) == dtype
    assert repr(found.tolist()) == repr(np.array(values, found.dtype).tolist())


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1001], pa.time64("ns")),
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),  # pyarrow 26 crashes
        pa.array([[(1, 2, 3)]], pa.list_(pa.month_day_nano_interval())),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
    ],
    ids=lambda array: str(array.type),
)
def test_types_that_numpy_lacks_are_refused(array: Any) -> None:
    with pytest.raises(mh.DataError, match="column 'x' can't be passed as NumPy arrays"):
        numpy_columns(pa.table({"x": array}))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (np.ma.array([BIG, 2], mask=[False, True]), [BIG, None]),
        (np.ma.array([1.5, 2.5], mask=[True, False]), [None, 2.5]),
        (np.array([2**64 - 1], np.uint64), [2**64 - 1]),
        (np.array([1.5], np.float16), [1.5]),
        (np.array([3, "NaT"], "M8[D]"), [datetime.date(1970, 1, 4), None]),
        (np.array([1.5, None], object), [1.5, None]),
        (np.arange(6)[::-2], [5, 3, 1]),
        ([datetime.date(1970, 1, 4), None], [datetime.date(1970, 1, 4), None]),
    ],
    ids=str,
)
def test_columns_that_a_function_returns_keep_their_values(column: Any, values: list[Any], tmp_path: Path) -> None:
    assert through_numpy(pa.array([0]), tmp_path, lambda columns: {"x": column}) == values


DAY, UTC = datetime.datetime(2020, 1, 1, 5), datetime.UTC


@pytest.mark.parametrize(
    "values",
    [
        [DAY.date(), DAY],
        [DAY, DAY.date()],
        [DAY, DAY.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=3)))],
        [DAY.replace(tzinfo=UTC), DAY],
        [b"\xff", "a"],
        [2**53 + 1, 0.5],
    ],
    ids=str,
)
def test_objects_that_arrow_would_convert_to_another_type_are_refused(values: list[Any], tmp_path: Path) -> None:
    for column in (values, np.array([*values, None], object)[:-1]):
        with pytest.raises(mh.DataError):
            through_numpy(pa.array([0]), tmp_path, lambda columns, column=column: {"x": column})
