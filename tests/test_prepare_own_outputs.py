"""Preparing data: what a job writes can be read again, and what Arrow holds reaches Python unchanged or not at all."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.records.columns import rows_of
from manyhands.prepare.records.schemas import common_type

ALONE: dict[str, Any] = {"workers": 0, "progress": False}
NOON = dt.datetime(2020, 1, 2, 12, 30, 15, 250)


def rows(made: mh.Dataset) -> list[Any]:
    return made.take(10**6, **ALONE)


def files(folder: Path, *tables: pa.Table) -> str:
    folder.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (pa.array([None, None]), pa.array(["a", "b"]), pa.string()),
        (pa.array([[None], []]), pa.array([[1], None]), pa.list_(pa.field("element", pa.int64()))),
        (pa.array([1, 2], pa.int32()), pa.array([2**40, 3]), pa.int64()),
        (pa.array([1, 2], pa.uint32()), pa.array([-1, 3], pa.int8()), pa.int64()),
        (pa.array(["a", None]), pa.array(["b", "c"], pa.large_string()), pa.large_string()),
        (pa.array([NOON, None], pa.timestamp("us")), pa.array([1, 2], pa.timestamp("ns")), pa.timestamp("ns")),
        (pa.array([Decimal("1.5"), None]), pa.array([Decimal("100.25"), None]), pa.decimal128(5, 2)),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", None]), pa.string()),
    ],
)
def test_files_whose_columns_hold_the_same_kind_of_values_are_read_together(
    tmp_path: Path, one: pa.Array, other: pa.Array, kind: pa.DataType
) -> None:
    read = mh.Dataset.read(files(tmp_path / "in", pa.table({"x": one}), pa.table({"x": other})))
    read.write(f"{tmp_path}/out", format="parquet", **ALONE)
    table = pq.read_table(tmp_path / "out")
    assert table.schema.field("x").type == kind
    assert table.column("x").cast(kind).equals(pa.chunked_array([one.cast(kind), other.cast(kind)]))
    assert mh.Dataset.read(f"{tmp_path}/out").count(**ALONE) == 4


def test_the_order_of_columns_and_nullability_may_differ_between_files(tmp_path: Path) -> None:
    first = pa.table({"a": [1], "b": ["x"], "c": [1.5]})
    fields = [pa.field("c", pa.float64(), nullable=False), pa.field("b", pa.string()), pa.field("a", pa.int64())]
    second = pa.table({"c": [2.5], "b": ["y"], "a": [2]}, schema=pa.schema(fields, metadata={"k": "v"}))
    folder = files(tmp_path / "in", first, second)
    both = [{"a": 1, "b": "x", "c": 1.5}, {"a": 2, "b": "y", "c": 2.5}]
    read = rows(mh.Dataset.read(folder))
    assert read == both
    assert [list(row) for row in read] == [["a", "b", "c"]] * 2
    some = rows(mh.Dataset.read(folder, columns=["c", "a"]))
    assert some == [{"c": 1.5, "a": 1}, {"c": 2.5, "a": 2}]
    assert list(some[0]) == list(some[1])
    assert rows(mh.Dataset.read(folder).sort_by("c", descending=True)) == both[::-1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array([1.5])),
        (pa.array([1]), pa.array(["1"])),
        (pa.array([NOON]), pa.array([NOON], pa.timestamp("us", "UTC"))),
        (pa.array([NOON], pa.timestamp("us", "Asia/Tokyo")), pa.array([NOON], pa.timestamp("us", "UTC"))),
        (pa.array([{"a": 1}]), pa.array([{"a": "b"}])),
    ],
)
def test_files_whose_columns_hold_other_kinds_of_values_are_refused(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    folder = files(tmp_path / "in", pa.table({"x": one}), pa.table({"x": other}))
    with pytest.raises(mh.DataError, match="a file has different columns than the first one") as caught:
        mh.Dataset.read(folder)
    assert str(caught.value.where).endswith("1.parquet")


@pytest.mark.parametrize("form", ["jsonl", "text", "parquet", "jsonl.gz"])
def test_an_output_without_records_is_read_as_no_records(tmp_path: Path, form: str) -> None:
    schema = pa.schema([("x", pa.int64())]) if form == "parquet" else None
    nothing = mh.Dataset.from_records(["a", "b"]).filter(lambda _: False)
    assert nothing.write(f"{tmp_path}/out", format=form, schema=schema, **ALONE).files == ()
    read = mh.Dataset.read(f"{tmp_path}/out")
    assert (rows(read), read.count(**ALONE)) == ([], 0)
    assert rows(read.sort_by("x")) == rows(read.join(read, on="x")) == rows(read.shuffle(1)) == []
    assert rows(read.group_by("x").aggregate(n=mh.Aggregate.count())) == []
    again = read.map(str).write(f"{tmp_path}/again", format=form, **ALONE)
    assert (again.records, again.files) == (0, ())
    both = mh.Dataset.read([f"{tmp_path}/out", str(Path(__file__))], format="text")
    assert both.count(**ALONE) == len(Path(__file__).read_text().splitlines())


def test_a_folder_without_files_that_is_no_output_is_refused(tmp_path: Path) -> None:
    for content in ("{}", '{"files": [], "records": 3}', "no JSON", "[]"):
        (tmp_path / "_manifest.json").write_text(content)
        with pytest.raises(mh.DataError, match="no file matches"):
            mh.Dataset.read(str(tmp_path))


ODD = {
    "timestamp[ns]": pa.array([1000, 1001], pa.timestamp("ns")),
    "time64[ns]": pa.array([1000, 1001], pa.time64("ns")),
    "duration[ns]": pa.array([1000, 1001], pa.duration("ns")),
    "list": pa.array([[1000], [1001]], pa.list_(pa.timestamp("ns"))),
    "struct": pa.array([{"a": [1000]}, {"a": [1001]}], pa.struct([("a", pa.list_(pa.duration("ns")))])),
    "map": pa.array([[("a", 1000)], [("a", 1001)]], pa.map_(pa.string(), pa.time64("ns"))),
    "year 10000": pa.array([1000, 253402300800], pa.timestamp("s")),
    "negative year": pa.array([1000, -100000000000], pa.timestamp("s")),
    "late date": pa.array([1, 10**7], pa.date32()),
    "long duration": pa.array([1, 2**60], pa.duration("s")),
}


@pytest.mark.parametrize("name", ODD)
def test_a_value_that_python_cannot_hold_is_named_with_file_column_and_row(tmp_path: Path, name: str) -> None:
    table = pa.table({"k": [2, 1], "x": ODD[name]})
    read = mh.Dataset.read(files(tmp_path / "in", table))
    made = [read, read.map(lambda row: row["k"]), read.filter(lambda row: True), read.sort_by(lambda row: row["k"])]
    for each in (*made, read.join(read, on="k")):
        with pytest.raises(mh.DataError, match="a value of column 'x' has no Python form") as caught:
            rows(each)
        assert caught.value.where == f"{tmp_path}/in/0.parquet, row 2"
    with pytest.raises(mh.DataError, match="a value of column 'x' has no Python form") as caught:
        read.write(f"{tmp_path}/jsonl", **ALONE)
    assert caught.value.where == f"{tmp_path}/in/0.parquet, row 2"
    kept = read.map(lambda row: row["k"]).write(f"{tmp_path}/kept", max_bad_records=1, **ALONE)
    assert (kept.records, kept.bad_records) == (1, 1)
    pairs = read.join(read, on="k").map(lambda pair: 1).write(f"{tmp_path}/pairs", max_bad_records=1, **ALONE)
    assert (pairs.records, pairs.bad_records) == (1, 1)  # the file is read once


@pytest.mark.parametrize("name", ODD)
def test_columns_that_no_function_uses_are_not_converted(tmp_path: Path, name: str) -> None:
    table = pa.table({"k": [2, 1], "v": [1, 2], "x": ODD[name]})
    folder = files(tmp_path / "in", table)
    read = mh.Dataset.read(folder)
    table = pq.read_table(f"{folder}/0.parquet")

    def written(made: mh.Dataset) -> pa.Table:
        digest = made.write(f"{tmp_path}/out", format="parquet", overwrite=True, **ALONE).digest
        assert len(digest) == 64
        return pq.read_table(tmp_path / "out")

    assert written(read).equals(table)
    assert written(read.sort_by("k")).equals(table.take([1, 0]))
    assert written(read.map_batches(lambda batch: batch)).equals(table)
    assert written(read.sample(1.0)).equals(table)
    assert sorted(written(read.shuffle(1)).column("k").to_pylist()) == [1, 2]
    assert written(read.repartition()).equals(table)
    sums = {"least": mh.Aggregate.minimum(of="v"), "all": mh.Aggregate.collect(of="v")}
    assert rows(read.group_by("k").aggregate(**sums)) == [
        {"k": 1, "least": 2, "all": [2]},
        {"k": 2, "least": 1, "all": [1]},
    ]
    assert read.count(**ALONE) == 2
    assert rows(mh.Dataset.read(folder, columns=["k"])) == [{"k": 2}, {"k": 1}]


PANDAS = """
import hashlib, json, sys, types
import manyhands as mh

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(name) if name[0].islower() else type(name, (), {"__init__": lambda self, *a, **k: None})

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pandas":
            raise ImportError("pandas is blocked")

if sys.argv[3] == "with":
    stub = sys.modules["pandas"] = Stub("pandas")
    stub.__version__, stub.__path__ = "3.0.0", []
else:
    sys.meta_path.insert(0, Blocker())
import pyarrow as pa
kind = type(pa.array([1000], pa.timestamp("ns"))[0].as_py()).__name__
assert kind == ("Timestamp" if sys.argv[3] == "with" else "datetime"), kind
read = mh.Dataset.read(sys.argv[1])
types = read.map(lambda row: {name: repr(value) for name, value in row.items()}).take(9, workers=0, progress=False)
digests = [
    made.write(f"{sys.argv[2]}/{number}", format=form, workers=0, progress=False).digest
    for number, (made, form) in enumerate([
        (read, "parquet"), (read, "jsonl"), (read.map(dict), "parquet"), (read.sort_by("k"), "jsonl"),
        (read.map_batches(lambda batch: {"k": batch["k"]}, form="numpy"), "parquet"),
        (read.distinct(lambda row: row["k"]), "jsonl"),
    ])
]
print(json.dumps([types, digests]))
"""


def test_types_and_bytes_do_not_depend_on_pandas(tmp_path: Path) -> None:
    table = pa.table(
        {
            "k": [2, 1],
            "t": pa.array([1000, -2000], pa.timestamp("ns")),
            "z": pa.array([1000, None], pa.timestamp("ns", "UTC")),
            "h": pa.array([5000, 6000], pa.time64("ns")),
            "l": pa.array([[{"a": 1000}], None], pa.list_(pa.struct([("a", pa.timestamp("ns"))]))),
        }
    )
    folder = files(tmp_path / "in", table)
    results = []
    for what in ("with", "without"):
        out = tmp_path / what
        command = [sys.executable, "-c", PANDAS, folder, str(out), what]
        results.append(subprocess.run(command, timeout=240, check=True, capture_output=True, text=True).stdout)
    assert results[0] == results[1]
    assert rows(mh.Dataset.read(folder)) == [
        {
            "k": 2,
            "t": dt.datetime(1970, 1, 1, 0, 0, 0, 1),
            "z": dt.datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC),
            "h": dt.time(0, 0, 0, 5),
            "l": [{"a": dt.datetime(1970, 1, 1, 0, 0, 0, 1)}],
        },
        {"k": 1, "t": dt.datetime(1969, 12, 31, 23, 59, 59, 999998), "z": None, "h": dt.time(0, 0, 0, 6), "l": None},
    ]


def test_nanosecond_durations_become_time_differences() -> None:
    table = pa.table({"x": pa.array([1000, None], pa.duration("ns"))})
    assert rows_of(table) == [{"x": dt.timedelta(microseconds=1)}, {"x": None}]
    assert type(rows_of(table)[0]["x"]) is dt.timedelta


COUNT = 40


def column(kind: pa.DataType, value: Any) -> pa.Array:
    return pa.array([None if index % 7 == 3 else value(index) for index in range(COUNT)], kind)


COLUMNS = {
    "int8": column(pa.int8(), lambda i: i - 20),
    "uint64": column(pa.uint64(), lambda i: 2**63 + i),
    "float16": column(pa.float16(), lambda i: i / 2),
    "float32": column(pa.float32(), lambda i: i / 3 if i else float("inf")),
    "bool": column(pa.bool_(), lambda i: i % 2 == 0),
    "large_string": column(pa.large_string(), str),
    "string_view": column(pa.string_view(), lambda i: "view " * i),
    "binary_view": column(pa.binary_view(), lambda i: b"view " * i),
    "fixed binary": column(pa.binary(4), lambda i: b"%04d" % i),
    "date": column(pa.date32(), lambda i: dt.date(2020, 1, 1) + dt.timedelta(i)),
    "timestamp[ms]": column(pa.timestamp("ms"), lambda i: i),
    "timestamp[ns]": column(pa.timestamp("ns", "Europe/Berlin"), lambda i: i),
    "time32": column(pa.time32("ms"), lambda i: i),
    "time64": column(pa.time64("ns"), lambda i: i),
    "duration": column(pa.duration("ns"), lambda i: i),
    "decimal256": column(pa.decimal256(60, 3), lambda i: Decimal(i) / 8 * 8),
    "decimal32": column(pa.decimal32(7, 2), lambda i: Decimal(i)),
    "list": column(pa.list_(pa.list_(pa.int16())), lambda i: [[i], None, []]),
    "large_list": column(pa.large_list(pa.string()), lambda i: [str(i)]),
    "fixed list": column(pa.list_(pa.int8(), 2), lambda i: [i, None]),
    "list_view": column(pa.list_view(pa.int64()), lambda i: [i] * (i % 4)),
    "struct": column(pa.struct([("a", pa.int8()), ("b", pa.list_(pa.string()))]), lambda i: {"a": i, "b": [str(i)]}),
    "map": column(pa.map_(pa.string(), pa.int64()), lambda i: [(str(i), None)]),
    "dictionary": column(pa.string(), lambda i: f"word {i % 3}").dictionary_encode(),
    "uuid": column(pa.uuid(), lambda i: uuid.UUID(int=i).bytes),
    "json": column(pa.json_(pa.string()), lambda i: "[]"),
    "null": pa.nulls(COUNT),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_type_is_read_sorted_shuffled_and_written_unchanged(tmp_path: Path, name: str) -> None:
    order = [index * 7 % COUNT for index in range(COUNT)]
    table = pa.table({"k": order, "x": COLUMNS[name]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet", row_group_size=10)
    kind = {"string_view": pa.string(), "binary_view": pa.binary()}.get(name)
    table = pq.read_table(tmp_path / "in")
    if kind is not None:
        table = table.set_column(1, "x", table.column("x").cast(kind))
    if name == "list_view":
        lists = pa.array(table.column("x").to_pylist(), pa.large_list(pa.field("element", pa.int64())))
        table = table.set_column(1, "x", lists)
    read = mh.Dataset.read(f"{tmp_path}/in", partition_bytes=300)

    def written(made: mh.Dataset, memory: int = 2**30, folder: str = "out") -> pa.Table:
        engine = InProcess(memory)
        made.write(f"{tmp_path}/{folder}", format="parquet", overwrite=True, engine=engine, progress=False)
        return pq.read_table(tmp_path / folder)

    assert written(read).equals(table)
    assert written(read.filter(lambda row: row["k"] >= 0) if name not in NO_PYTHON else read).equals(table)
    by_key = table.take([order.index(key) for key in range(COUNT)])
    assert written(read.sort_by("k")).equals(by_key)
    assert written(read.shuffle(1)).equals(written(read.shuffle(1), memory=2**27))
    assert written(mh.Dataset.read(f"{tmp_path}/out").sort_by("k"), folder="again").equals(by_key)


NO_PYTHON = ("timestamp[ns]", "time64", "duration")  # odd nanoseconds


def test_list_views_inside_other_types_are_refused_with_file_and_column(tmp_path: Path) -> None:
    inner = pa.array([[[1]]], pa.list_(pa.list_view(pa.int64())))
    folder = files(tmp_path / "in", pa.table({"x": inner}))
    with pytest.raises(mh.DataError, match="column 'x' has list views inside another type") as caught:
        rows(mh.Dataset.read(folder))
    assert caught.value.where == f"{folder}/0.parquet"


def test_common_types_hold_the_values_of_both() -> None:
    expected = {
        (pa.int8(), pa.uint8()): pa.int16(),
        (pa.uint64(), pa.int64()): pa.uint64(),
        (pa.float16(), pa.float64()): pa.float64(),
        (pa.int64(), pa.float32()): pa.float64(),
        (pa.decimal128(38, 0), pa.decimal128(38, 10)): pa.decimal256(48, 10),
        (pa.decimal256(76, 0), pa.decimal256(76, 1)): None,
        (pa.time32("s"), pa.time64("ns")): pa.time64("ns"),
        (pa.duration("s"), pa.duration("us")): pa.duration("us"),
        (pa.bool_(), pa.int8()): None,
        (pa.string(), pa.binary()): None,
        (pa.binary(3), pa.binary(4)): pa.binary(),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int64(), 3)): pa.list_(pa.int64()),
        (pa.list_(pa.null()), pa.large_list(pa.string())): pa.large_list(pa.string()),
        (pa.map_(pa.string(), pa.null()), pa.map_(pa.string(), pa.int8())): pa.map_(pa.string(), pa.int8()),
        (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string())): pa.dictionary(
            pa.int32(), pa.string()
        ),
        (pa.null(), pa.uuid()): pa.uuid(),
        (pa.uuid(), pa.binary(16)): None,
    }
    for (one, other), kind in expected.items():
        for found in (common_type(one, other), common_type(other, one)):
            assert found == kind or (found is not None and found.equals(kind)), (one, other, found)
