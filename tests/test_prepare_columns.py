"""Columns of data jobs: tables of very many columns, sets, dates, times, and arrays as values."""

from __future__ import annotations

import gc
import io
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.io.writing import ParquetWriter, parquet_tables, rewrite
from manyhands.prepare.records import schemas
from manyhands.prepare.records.columns import without_views
from manyhands.prepare.records.schemas import common_type, conformed

ALONE: dict[str, Any] = {"workers": 0, "progress": False}
NAMES = [f"c{number}" for number in range(1000)]


class _Counting:
    """A table that counts how often its names are looked up: pyarrow makes a new list each time."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.lookups = table, 0

    def __getattr__(self, name: str) -> Any:
        self.lookups += name == "column_names"
        return getattr(self.table, name)

    def __len__(self) -> int:
        return len(self.table)


def test_the_names_of_a_table_are_looked_up_once_not_per_column() -> None:
    table: Any = _Counting(pa.table({name: pa.array([1, 2], pa.int32()) for name in NAMES[1:]}))
    schema = pa.schema([(name, pa.int64()) for name in NAMES])
    found = conformed(table, schema)
    assert table.lookups == 1
    assert found.schema.equals(schema)
    assert found.to_pydict() == {"c0": [None, None]} | {name: [1, 2] for name in NAMES[1:]}


def test_many_columns_of_views_become_text_and_keep_their_order() -> None:
    kinds = [pa.string_view(), pa.int64()]
    fields = [pa.field(name, kinds[index % 2], metadata={"at": name}) for index, name in enumerate(NAMES)]
    columns = [pa.array(["x" if index % 2 == 0 else 7], field.type) for index, field in enumerate(fields)]
    found = without_views(pa.Table.from_arrays(columns, schema=pa.schema(fields, {"of": "all"})))
    plain = [field.with_type(pa.string()) if index % 2 == 0 else field for index, field in enumerate(fields)]
    assert found.schema.equals(pa.schema(plain, {"of": "all"}), check_metadata=True)
    assert found.to_pydict() == {name: ["x" if index % 2 == 0 else 7] for index, name in enumerate(NAMES)}


def test_a_missing_column_is_named_among_many(tmp_path: Path) -> None:
    pq.write_table(pa.table({name: [1] for name in NAMES}), tmp_path / "wide.parquet")
    with pytest.raises(mh.DataError, match="there is no column 'missing'"):
        mh.Dataset.read(f"{tmp_path}/wide.parquet", columns=[*NAMES, "missing", "other"]).take(1, **ALONE)
    row = mh.Dataset.read(f"{tmp_path}/wide.parquet", columns=NAMES).take(1, **ALONE)
    assert row == [dict.fromkeys(NAMES, 1)]


def test_a_column_of_nanoseconds_becomes_records_without_pandas() -> None:
    for values in (pa.array([1000, None], pa.timestamp("ns")), pa.chunked_array([pa.array([2000], pa.time64("ns"))])):
        micro = pa.timestamp("us") if pa.types.is_timestamp(values.type) else pa.time64("us")
        assert mh.Dataset.from_records(values).take(2, **ALONE) == values.cast(micro).to_pylist()


def test_a_column_with_odd_nanoseconds_is_refused() -> None:
    with pytest.raises(mh.DataError, match="a value of column 'value' has no Python form"):
        mh.Dataset.from_records(pa.array([1], pa.timestamp("ns")))


@pytest.mark.parametrize("value", [{"b", "a"}, frozenset({"a"}), [{"a"}], {"in": {"a"}}, [{"in": [{"a"}]}]])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_sets_whose_order_differs_between_processes_are_refused(tmp_path: Path, value: Any, form: str) -> None:
    made = mh.Dataset.from_records([{"tags": ["a"]}, {"tags": value}] if isinstance(value, set) else [{"tags": value}])
    with pytest.raises(mh.DataError) as caught:
        made.write(f"{tmp_path}/out", format=form, **ALONE)
    assert ("use sorted lists" in str(caught.value)) or form == "jsonl"
    assert not list(tmp_path.glob("out/part-*"))


def test_dates_of_two_widths_have_one_type_in_either_order() -> None:
    for pair in ((pa.date32(), pa.date64()), (pa.date64(), pa.date32())):
        assert common_type(*pair) == common_type(*pair, strict=True) == pa.date64()
    assert common_type(pa.date32(), pa.date32()) == pa.date32()
    assert common_type(pa.date32(), pa.timestamp("s")) is None


def test_a_file_that_cannot_be_written_again_leaves_no_open_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"x": ["1", "a"]}), tmp_path / "in.parquet", row_group_size=1)
    monkeypatch.setattr("manyhands.prepare.io.writing._ROW_GROUP_ROWS", 1)
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(schemas, "_check_same", lambda before, after: None)  # so that the first row group is written
    with io.BytesIO() as file:
        with pytest.raises(mh.DataError):
            rewrite(
                parquet_tables(f"{tmp_path}/in.parquet"), ParquetWriter(file, pa.schema([("x", pa.int64())]), "part-0")
            )
        assert file.tell() > 4
    gc.collect()
    assert not ignored


def test_the_identity_of_a_job_does_not_depend_on_the_compression_of_schemas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"x": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([2], pa.int64())}), tmp_path / "b.parquet")
    made = mh.Dataset.read(f"{tmp_path}/*.parquet")
    made.write(f"{tmp_path}/out", **ALONE)
    compress = zlib.compress
    monkeypatch.setattr(schemas.zlib, "compress", lambda data: compress(data, 0))  # as another zlib may compress
    again = mh.Dataset.read(f"{tmp_path}/*.parquet").write(f"{tmp_path}/out", **ALONE)
    assert again.records == 2  # not refused as the output of another job


def test_arrays_can_be_summed() -> None:
    records = [{"k": 1, "x": np.array([1, 2])}, {"k": 1, "x": np.array([3, 4])}]
    made = mh.Dataset.from_records(records).group_by("k").aggregate(x=mh.Aggregate.sum("x"))
    (row,) = made.take(2, **ALONE)
    assert row["x"].tolist() == [4, 6]
    missing = mh.Dataset.from_records([*records, {"k": 1, "x": None}]).group_by("k")
    with pytest.raises(mh.DataError, match=r"the value to aggregate \(sum\) is None"):
        missing.aggregate(x=mh.Aggregate.sum("x")).take(2, **ALONE)
