"""Preparing data: arrays as values of records. Shape, type and bits come out of every path as they went in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.prepare.io import reading, writing
from manyhands.prepare.records import pipeline
from manyhands.prepare.records.array_columns import stack_of
from manyhands.prepare.records.chunks import pack, size_bytes, table_of, unpack
from manyhands.prepare.records.columns import rows_of

ALONE: dict[str, Any] = {"workers": 0, "progress": False}
DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "M8[us]", "M8[ns]", "m8[s]", "M8[D]"]
NUMBERS = DTYPES[:12]


def bits(value: Any) -> Any:
    """What must stay the same: the type, the shape and the bytes of an array, or the value itself."""
    if not isinstance(value, np.ndarray):
        return value
    assert type(value) is np.ndarray
    return str(value.dtype), value.shape, value.tobytes()


def all_bits(records: list[Any]) -> list[Any]:
    return [{name: bits(value) for name, value in record.items()} for record in records]


def random_array(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    """Random bits, so floats have NaN of all kinds."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape))
    data = np.random.default_rng(seed).bytes(size * kind.itemsize)
    if dtype == "?":
        return (np.frombuffer(data, np.uint8) % 2).astype(bool).reshape(shape)
    if dtype == "M8[D]":
        return (np.frombuffer(data, np.int64) % 10**6).astype(kind).reshape(shape)  # Arrow's days have 32 bits
    return np.frombuffer(data, kind).reshape(shape)


@st.composite
def columns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records with one to three columns of arrays, some of them null, beside a number."""
    names = "xyz"[: draw(st.integers(1, 3))]
    count = draw(st.integers(1, 9))
    records: list[dict[str, Any]] = [{"n": number} for number in range(count)]
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(1, 3), max_size=4).map(tuple))
        seed = draw(st.integers(0, 2**32))
        missing = draw(st.sets(st.integers(0, 8)))
        for number, record in enumerate(records):
            if number not in missing:
                record[name] = random_array(dtype, shape, seed + number)
            elif draw(st.booleans()):
                record[name] = None
    return records


def filled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records as rows of a table: with all columns in each record."""
    names = dict.fromkeys(name for record in records for name in record)
    return [{name: record.get(name) for name in names} for record in records]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=columns(), cut=st.integers(1, 9), start=st.integers(0, 9))
def test_arrays_come_back_from_tables_files_and_numpy(
    records: list[dict[str, Any]], cut: int, start: int, tmp_path: Path
) -> None:
    expected = all_bits(filled(records))
    table = table_of(records)
    assert all_bits(rows_of(table)) == expected
    assert all_bits(rows_of(table.slice(start))) == expected[start:]
    assert all_bits(rows_of(unpack(bytes(pack(table.slice(start)))))) == expected[start:]
    sliced = pa.concat_tables([table.slice(start), table.slice(0, start)])
    pq.write_table(sliced, tmp_path / "x.parquet", row_group_size=cut)
    read = mh.Dataset.read(tmp_path / "x.parquet", partition_bytes=1)
    assert all_bits(list(read)) == expected[start:] + expected[:start]
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "n" or pa.types.is_null(column.type):
            continue
        stack = stack_of(column)
        rows = [None if np.ma.getmaskarray(row).any() else np.array(np.ma.getdata(row)) for row in stack]
        assert [bits(row) for row in rows] == [record[name] for record in expected]
    lines = writing.json_lines(records, "here")
    (tmp_path / "x.jsonl").write_bytes(lines)
    assert all_bits(list(mh.Dataset.read(tmp_path / "x.jsonl"))) == all_bits(records)


def test_case_19(tmp_path: Path) -> None:
    """All types, 0 to 4 dimensions, a null row, a slice from row 1, two row groups; through every shuffle."""
    shapes = [(), (3,), (2, 3), (1, 2, 3), (2, 1, 3, 2)]
    records = [
        {
            "n": number,
            **{
                f"{dtype} {len(shape)}": random_array(dtype, shape, number + len(shape)) if number != 2 else None
                for dtype in NUMBERS
                for shape in shapes
            },
        }
        for number in range(5)
    ]
    made = mh.Dataset.from_records(records, partition_bytes=2000)
    expected = all_bits(records)
    plain = made.write(tmp_path / "a", format="parquet", **ALONE)
    schema = pq.read_schema(tmp_path / "a" / plain.files[0])
    assert str(schema.field("f4 2").type) == "extension<arrow.fixed_shape_tensor[value_type=float, shape=[2,3]]>"
    read = mh.Dataset.read(tmp_path / "a")
    made.write(tmp_path / "j", **ALONE)
    back = lambda row: -row["n"]  # noqa: E731
    paths = {
        "parquet": read,
        "json": mh.Dataset.read(tmp_path / "j"),
        "filter": read.filter(lambda row: True),
        "map": read.map(lambda row: row),
        "cache": read.cache(tmp_path / "cache"),
        "cached records": made.cache(),
        "sort": read.sort_by(back).sort_by("n"),
        "shuffle": read.shuffle(1).sort_by("n"),
        "shuffled records": made.shuffle(1).sort_by("n"),
        "repartition": read.repartition(partition_bytes=1),
        "first": read.group_by("n").aggregate(row=mh.Aggregate.first()).map(lambda group: group["row"]),
        "distinct": read.flat_map(lambda row: [row, row]).distinct().sort_by("n"),
        "join": read.join(made, "n").map(lambda pair: pair[0]),
        "join with records": read.join(made, back).map(lambda pair: pair[1]).sort_by("n"),
        "arrow": read.map_batches(lambda table: table.slice(0)),
    }
    for name, dataset in paths.items():
        assert all_bits(dataset.take(9, **ALONE)) == expected, name
    same = read.map_batches(lambda columns: {name: columns[name] for name in columns if name[-1] != "0"}, form="numpy")
    kept = [{name: value for name, value in record.items() if name[-1] != "0"} for record in expected]
    assert all_bits(same.take(9, **ALONE)) == kept
    again = read.write(tmp_path / "b", format="parquet", workers=2, progress=False)
    assert all_bits(mh.Dataset.read(tmp_path / "b").take(9, **ALONE)) == expected
    assert again.digest == read.write(tmp_path / "c", format="parquet", **ALONE).digest


def test_numpy_batches_have_one_array_per_column_and_may_return_one(tmp_path: Path) -> None:
    def double(columns: dict[str, Any]) -> dict[str, Any]:
        assert (columns["x"].shape, columns["x"].dtype) == ((3, 2, 3), np.float32)
        return {
            "x": np.asfortranarray(columns["x"] * 2),
            "big": np.arange(6, dtype=">f4").reshape(3, 2),
            "few": np.ma.array(np.arange(6).reshape(3, 2), mask=[[0, 0], [1, 1], [0, 0]]),
            "list": columns["list"],
            "given": [np.arange(2, dtype="i2")] * 3,
            "one": np.arange(3, dtype=">i4"),
        }

    records = [{"x": np.full((2, 3), number, "f4"), "list": [0.5] * number} for number in range(3)]
    made = mh.Dataset.from_records(records).map_batches(double, form="numpy")
    rows = made.take(3, **ALONE)
    assert bits(rows[1]["x"]) == bits(np.full((2, 3), 2, "f4"))
    assert bits(rows[1]["big"]) == bits(np.array([2, 3], "f4"))
    assert [bits(row["few"]) for row in rows] == [bits(np.array([0, 1])), None, bits(np.array([4, 5]))]
    assert [row["list"] for row in rows] == [[], [0.5], [0.5, 0.5]]
    assert bits(rows[2]["given"]) == bits(np.arange(2, dtype="i2"))
    assert rows[2]["one"] == 2


def test_arrays_of_any_layout_are_written_in_c_order_and_native_bytes(tmp_path: Path) -> None:
    plain = np.arange(6, dtype="f4").reshape(2, 3)
    strided = np.zeros((4, 6), "f4")
    strided[::2, ::2] = plain
    layouts = [plain, np.asfortranarray(plain), plain.astype(">f4"), strided[::2, ::2], plain[:, ::-1][:, ::-1]]
    made = mh.Dataset.from_records([{"x": layout} for layout in layouts])
    for form in ("parquet", "jsonl"):
        made.write(tmp_path / form, format=form, **ALONE)
        assert all_bits(mh.Dataset.read(tmp_path / form).take(9, **ALONE)) == all_bits([{"x": plain}] * 5)
    assert made.distinct().count(**ALONE) == 1


def test_a_row_may_be_changed_without_effect_on_other_rows_and_the_table(tmp_path: Path) -> None:
    mh.Dataset.from_records([{"x": np.zeros(2)}] * 3).write(tmp_path / "out", format="parquet", **ALONE)

    def spoil(row: dict[str, Any]) -> bool:
        row["x"] += 1
        return bool(row["x"].sum() == 2)

    read = mh.Dataset.read(tmp_path / "out").filter(spoil)
    assert all_bits(read.take(3, **ALONE)) == all_bits([{"x": np.zeros(2)}] * 3)


def test_tensors_that_others_wrote_are_read_in_their_logical_shape(tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.int16(), [2, 3], dim_names=["a", "b"], permutation=[1, 0])
    storage = pa.array([list(range(6)), None, list(range(6, 12))], kind.storage_type)
    column = pa.ExtensionArray.from_storage(kind, storage)
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet", row_group_size=2)
    logical = np.arange(6, dtype="i2").reshape(2, 3).T
    read = mh.Dataset.read(tmp_path / "a.parquet")
    assert [bits(row["x"]) for row in read] == [bits(logical), None, bits(logical + np.int16(6))]
    read.write(tmp_path / "out", format="parquet", **ALONE)  # the table stays as it is
    assert pq.read_schema(tmp_path / "out" / "part-00000.parquet").field("x").type.equals(kind)
    pq.write_table(table_of([{"x": logical}]), tmp_path / "b.parquet")
    both = mh.Dataset.read(tmp_path / "*.parquet")
    assert [bits(row["x"]) for row in both][2:] == [bits(logical + np.int16(6)), bits(logical)]


def test_arrays_with_missing_elements_are_refused_where_python_needs_them(tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.int16(), [2])
    column = pa.ExtensionArray.from_storage(kind, pa.array([[1, 2], [3, None]], kind.storage_type))
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    read = mh.Dataset.read(tmp_path / "a.parquet")
    assert read.count(**ALONE) == 2
    with pytest.raises(mh.DataError, match="a value of column 'x' has no Python form") as caught:
        read.map(lambda row: row).count(**ALONE)
    assert caught.value.where == f"{tmp_path}/a.parquet, row 2"
    with pytest.raises(mh.DataError, match=r"missing elements \(null\)"):
        read.map_batches(lambda columns: columns, form="numpy").count(**ALONE)


REFUSED: dict[str, tuple[list[Any], str]] = {
    "shape": ([np.zeros((2, 3)), np.zeros((3, 2))], r"an array of shape \[3, 2\], and the array before it has shape"),
    "length": ([np.zeros(2), np.zeros(3)], r"an array of shape \[3\], and the array before it has shape \[2\]"),
    "type": ([np.zeros(2), np.zeros(2, "f4")], "arrays of type float64 and float32, which are never mixed"),
    "list": ([np.zeros(2), [0.0, 0.0]], "arrays and a list, which have no common type"),
    "number": ([np.zeros(()), 0.0], "arrays and a float, which have no common type"),
    "objects": ([np.zeros((1, 1)), np.array([[None]])], "an array of type object"),
    "complex": ([np.zeros(2), np.zeros(2, "c8")], "an array of type complex64.*: use two arrays"),
    "structured": ([np.zeros(2), np.zeros(2, "i4,f4")], "an array of type .*: use one column for each field"),
    "text": ([np.zeros((1, 1)), np.array([["a"]])], "an array of type <U1"),
    "hours": ([np.zeros(2), np.zeros(2, "M8[h]")], r"an array of type datetime64\[h\]"),
    "days": (
        [np.zeros(1, "M8[D]"), np.array(["200000000-01-01"], "M8[D]")],
        "a date that a column of dates can't hold",
    ),
    "inside": ([{"y": [np.zeros(2)]}, {"y": [np.zeros((2, 2))]}], ".*arrays inside of lists or dicts"),
    "masked": ([np.zeros(2), np.ma.array([1.0, 2.0], mask=[0, 1])], "an array with masked elements"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arrays_that_do_not_fit_are_refused_with_file_and_record(name: str, tmp_path: Path) -> None:
    values, message = REFUSED[name]
    made = mh.Dataset.from_records([{"x": value} for value in values])
    with pytest.raises(
        mh.DataError, match=f"the records can't be put into columns: column 'x': (it has )?{message}"
    ) as e:
        made.write(tmp_path / "out", format="parquet", **ALONE)
    assert e.value.where == "part-00000.parquet, stage 0, partition 0, record 2"
    with pytest.raises(mh.DataError, match=message):
        made.map_batches(lambda table: table).count(**ALONE)


def test_another_shape_in_a_later_row_group_or_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 2)
    (tmp_path / "in.jsonl").write_text("0\n1\n2\n3\n4\n")
    made = mh.Dataset.read(tmp_path / "in.jsonl").map(lambda n: {"x": np.zeros(3 if n < 3 else 2) if n != 2 else None})
    with pytest.raises(mh.DataError, match="no common type"):
        made.repartition(partition_bytes=1).write(tmp_path / "files", format="parquet", **ALONE)
    with pytest.raises(mh.DataError) as caught:
        made.write(tmp_path / "groups", format="parquet", **ALONE)
    assert caught.value.where == "part-00000.parquet, stage 0, partition 0, record 4"
    assert not (tmp_path / "groups" / "_manifest.json").exists()


def test_arrays_without_elements_are_kept_except_by_parquet(tmp_path: Path) -> None:
    records = [{"x": np.zeros((0, 3), "f4")}, {"x": None}]
    made = mh.Dataset.from_records(records)
    assert all_bits(made.map_batches(lambda table: table).take(2, **ALONE)) == all_bits(records)
    made.write(tmp_path / "lines", **ALONE)
    assert all_bits(mh.Dataset.read(tmp_path / "lines").take(2, **ALONE)) == all_bits(records)
    with pytest.raises(mh.DataError, match=r"arrays of shape \[0, 3\], which have no elements"):
        made.write(tmp_path / "out", format="parquet", **ALONE)


SCHEMA = pa.schema([("x", pa.fixed_shape_tensor(pa.float32(), [2]))])


def test_a_schema_may_round_floats_but_not_change_other_values(tmp_path: Path) -> None:
    given = [np.array([0.1, np.nan]), np.array([2**24, 1]), np.array([1, 2], "u1"), np.array([np.inf, 0], "f2"), None]
    made = mh.Dataset.from_records([{"x": value} for value in given])
    made.write(tmp_path / "out", format="parquet", schema=SCHEMA, **ALONE)
    read = mh.Dataset.read(tmp_path / "out").take(9, **ALONE)
    assert [bits(row["x"]) for row in read] == [None if x is None else bits(x.astype("f4")) for x in given]
    for number, wrong in enumerate([np.array([2**24 + 1, 0]), np.array([1e300, 0]), np.array([True, False]), [0, 1]]):
        made = mh.Dataset.from_records([{"x": wrong}])
        with pytest.raises(mh.DataError, match="the records can't be put into columns"):
            made.write(tmp_path / f"no-{number}", format="parquet", schema=SCHEMA, **ALONE)
    lists = pa.schema([("x", pa.list_(pa.float32()))])
    mh.Dataset.from_records([{"x": np.zeros(2)}, {"x": np.ones(3)}]).write(
        tmp_path / "lists", format="parquet", schema=lists, **ALONE
    )
    assert mh.Dataset.read(tmp_path / "lists").take(1, **ALONE) == [{"x": [0.0, 0.0]}]


def test_arrays_can_not_be_keys(tmp_path: Path) -> None:
    made = mh.Dataset.from_records([{"x": np.zeros(2)}, {"x": np.zeros(2)}])
    made.write(tmp_path / "out", format="parquet", **ALONE)
    for dataset in (made, mh.Dataset.read(tmp_path / "out")):
        for job in (dataset.sort_by("x"), dataset.distinct("x"), dataset.join(dataset, "x")):
            with pytest.raises(mh.DataError, match=r"the key is a NumPy value|the key column 'x' has arrays"):
                job.count(**ALONE)
        assert dataset.distinct(lambda row: row["x"].tobytes()).count(**ALONE) == 1


def test_arrays_in_json_are_read_again_and_damaged_ones_are_bad_records(tmp_path: Path) -> None:
    record = {"deep": [{"x": np.arange(2, dtype="i2")}], "scalar": np.array(7, "u1")}
    mh.Dataset.from_records([record]).write(tmp_path / "out", **ALONE)
    text = (tmp_path / "out" / "part-00000.jsonl").read_text()
    form = {"__ndarray__": "AAABAA==", "dtype": "int16", "shape": [2]}
    assert json.loads(text)["deep"] == [{"x": form}]
    (read,) = mh.Dataset.read(tmp_path / "out").take(1, **ALONE)
    assert bits(read["deep"][0]["x"]) == bits(record["deep"][0]["x"])
    assert bits(read["scalar"]) == bits(record["scalar"])
    wrong = [
        {"shape": [3]},
        {"dtype": "object"},
        {"dtype": 3},
        {"dtype": []},
        {"shape": [-2, -1]},
        {"__ndarray__": "%"},
    ]
    wrong += [{"dtype": name} for name in ("(2,f4", "2i1", "<i2", "h", "f4,f4", "datetime64[2s]", "datetime64[h]")]
    wrong += [{"__ndarray__": "", "shape": shape} for shape in ([0, 2**70], [0, 2**40, 2**40], [0] * 99)]
    lines = [{"x": {**form, **change}} for change in wrong]
    kept = [{"x": {**form, "more": 1}}, {"x": {**form, "__ndarray__": [0, 1]}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + kept))
    dataset = mh.Dataset.read(tmp_path / "in.jsonl")
    assert dataset.write(tmp_path / "w", max_bad_records=len(wrong), **ALONE).bad_records == len(wrong)
    with pytest.raises(mh.DataError, match="the line has an array that can't be read") as caught:
        dataset.count(**ALONE)
    assert caught.value.where == f"{tmp_path}/in.jsonl, line 1"
    assert mh.Dataset.read(tmp_path / "w").take(9, **ALONE) == kept
    for value in (
        np.zeros(2, "c8"),
        np.array([object()]),
        np.zeros(2, "i4,f4"),
        np.zeros(2, "M8[2s]"),
        np.ma.array([1.0], mask=[1]),
    ):
        with pytest.raises(mh.DataError, match="array"):
            mh.Dataset.from_records([0]).map(lambda _, value=value: value).write(tmp_path / "no", **ALONE)


def test_whether_a_line_has_an_array_does_not_depend_on_other_lines(tmp_path: Path) -> None:
    line = json.dumps({"x": {"__ndarray__": "AAABAA==", "dtype": "int16", "shape": [2]}})
    escaped = line.replace("_", r"\u005f", 1)
    for name, lines in {"alone": [escaped], "first": [escaped, line], "last": [line, escaped]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        found = dict(zip(lines, mh.Dataset.read(tmp_path / f"{name}.jsonl").take(9, **ALONE), strict=True))
        assert isinstance(found[escaped]["x"], dict), name
        assert line not in found or bits(found[line]["x"]) == bits(np.arange(2, dtype="i2"))


def test_the_size_of_arrays_is_measured() -> None:
    records = [{"x": np.zeros((100, 100), "f4")}, {"x": None}]
    assert 20_000 < size_bytes(records) // 2 < 20_100
    assert size_bytes(table_of(records)) == 80_000
    assert size_bytes(table_of(records).slice(1)) == 40_000


def test_large_results_are_not_in_memory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records after each other, with a bad one, and with what `map_batches` gets."""
    monkeypatch.setattr(pipeline, "_MOST_RESULT_BYTES", 1_000)
    sizes: list[int] = []
    flush = writing.ParquetWriter.add
    monkeypatch.setattr(
        writing.ParquetWriter, "add", lambda self, chunk: (sizes.append(len(chunk)), flush(self, chunk))
    )

    def large(n: int) -> dict[str, Any]:
        if n == 7:
            raise ValueError("seven")
        return {"n": n, "r": random.random(), "x": np.full(25, n, "f8")}

    made = mh.Dataset.from_records(range(20)).map(large)
    with pytest.raises(mh.DataError, match="seven") as caught:
        made.count(**ALONE)
    assert caught.value.where == "given records, partition 0, record 8"
    written = made.write(tmp_path / "out", format="parquet", max_bad_records=1, **ALONE)
    assert (written.records, written.bad_records, sum(sizes), max(sizes)) == (19, 1, 19, 3)
    rows = mh.Dataset.read(tmp_path / "out").take(20, **ALONE)
    assert [row["n"] for row in rows] == [n for n in range(20) if n != 7]
    assert len({row["r"] for row in rows}) == 19
    good = mh.Dataset.from_records(range(20)).filter(lambda n: n != 7).map(large)
    batches = good.map_batches(lambda columns: {"count": [len(columns["n"])]}, form="numpy").take(20, **ALONE)
    assert [batch["count"] for batch in batches] == [3, 3, 4, 3, 3, 3]  # the record that is left out counts
    small = mh.Dataset.from_records(range(20)).map(lambda n: {"n": n})
    assert small.map_batches(lambda table: [len(table)]).take(9, **ALONE) == [20]
