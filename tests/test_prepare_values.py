"""Preparing data: values don't change when they are written, and all files of a Parquet output have one schema."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import Future
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.data.token_file import TokenFile
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.io import reading, writing
from manyhands.prepare.io.token_writing import token_schema
from manyhands.prepare.job import publishing
from manyhands.prepare.records.chunks import BadColumn, table_of
from manyhands.prepare.task import Task, TaskResult

ALONE: dict[str, Any] = {"workers": 0, "progress": False}
UTC = dt.UTC
DAY, NOON = dt.date(2020, 1, 2), dt.datetime(2020, 1, 2, 12, 30, 15, 250)
GROUP = 100  # rows of a Parquet row group here


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_ROW_GROUP_ROWS", GROUP)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 40)  # ten lines of three digits


def numbers(folder: Path, count: int) -> mh.Dataset:
    """The numbers below `count`, read in small chunks."""
    (folder / "in.txt").write_text("".join(f"{index:03}\n" for index in range(count)))
    return mh.Dataset.read(f"{folder}/in.txt").map(int)


def parquet(records: list[Any], folder: Path, *, bytes_each: int = 2**25, **options: Any) -> pa.Table:
    """What a job writes, read back. All files must have one schema."""
    made = mh.Dataset.from_records(records, partition_bytes=bytes_each)
    written = made.write(str(folder), format="parquet", **ALONE, **options)
    schemas = [pq.read_schema(folder / name) for name in written.files]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert mh.Dataset.read(str(folder)).count(**ALONE) == written.records == len(records)
    return pa.concat_tables([pq.read_table(folder / name) for name in written.files])


def refusal(records: list[Any], folder: Path, **options: Any) -> str:
    with pytest.raises(mh.DataError) as caught:
        parquet(records, folder, **options)
    assert not (folder / "_manifest.json").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("early", "late", "kind"),
    [
        (1, 0.5, "double"),
        (None, "text", "string"),
        ([], [{"a": 2}], "list<element: struct<a: int64>>"),
        ({"a": [None]}, {"b": 1.5, "a": [3]}, "struct<a: list<element: int64>, b: double>"),
        (Decimal("1.25"), Decimal("1000.5"), "decimal128(6, 2)"),
    ],
)
def test_a_column_whose_type_changes_in_a_later_row_group_keeps_its_values(
    tmp_path: Path, early: Any, late: Any, kind: str
) -> None:
    made = numbers(tmp_path, GROUP + 1).map(lambda index: {"x": early if index < GROUP else late})
    assert made.write(f"{tmp_path}/out", format="parquet", **ALONE).records == GROUP + 1
    table = pq.read_table(tmp_path / "out")
    assert str(table.schema.field("x").type) == kind
    read = table.column("x").to_pylist()
    assert len(read) == GROUP + 1
    assert _without_nulls(read[0]) == _without_nulls(early)
    assert _without_nulls(read[-1]) == late
    assert pq.ParquetFile(tmp_path / "out" / "part-00000.parquet").num_row_groups == 2


def _without_nulls(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def test_a_widened_part_has_the_bytes_of_one_that_was_written_with_its_schema(tmp_path: Path) -> None:
    made = numbers(tmp_path, GROUP + 1).map(lambda index: {"x": index} if index < GROUP else {"x": 0.5, "y": "late"})
    schema = pa.schema([("x", pa.float64()), ("y", pa.string())])
    widened = made.write(f"{tmp_path}/one", format="parquet", **ALONE)
    assert widened.digest == made.write(f"{tmp_path}/other", format="parquet", schema=schema, **ALONE).digest
    assert pq.read_table(tmp_path / "one" / "part-00000.parquet").column("x").to_pylist() == [*range(GROUP), 0.5]


def test_random_numbers_and_bad_records_are_the_same_if_a_part_is_written_twice(tmp_path: Path) -> None:
    def number(index: int) -> dict[str, Any]:
        if index == 7:
            raise ValueError("seven")
        return {"r": random.random(), "x": None if index < GROUP + 1 else index}

    made = numbers(tmp_path, GROUP + 2).map(number)
    twice = made.write(f"{tmp_path}/twice", format="parquet", max_bad_records=1, **ALONE)
    assert (twice.records, twice.bad_records) == (GROUP + 1, 1)
    assert len((tmp_path / "twice" / "_bad_records.jsonl").read_text().splitlines()) == 1
    schema = pa.schema([("r", pa.float64()), ("x", pa.int64())])
    once = made.write(f"{tmp_path}/once", format="parquet", max_bad_records=1, schema=schema, **ALONE)
    read, other = (pq.read_table(f"{tmp_path}/{name}") for name in ("twice", "once"))
    assert read.column("x").to_pylist() == [None] * GROUP + [GROUP + 1] == other.column("x").to_pylist()
    assert len(set(read.column("r").to_pylist())) == GROUP + 1
    assert once.records == twice.records


PARTS = [
    ([{"x": 1}, {"x": 2}, {"x": 0.5}], {"x": "double"}),
    ([{"x": None}, {"x": "a"}, {"x": None}], {"x": "string"}),
    ([{"x": 1}, {"y": "a", "x": 2}, {"y": "b"}], {"x": "int64", "y": "string"}),
    ([{"x": {"a": None}}, {"x": {"a": [1]}}, {"x": None}], {"x": "struct<a: list<element: int64>>"}),
    ([{"x": Decimal(10) ** index} for index in range(3)], {"x": "decimal128(3, 0)"}),
    ([{"x": 1}, {"x": Decimal("0.5")}], {"x": "decimal128(21, 1)"}),
    ([{"x": b"a"}, {"x": None}], {"x": "binary"}),
]


@pytest.mark.parametrize(("records", "kinds"), PARTS)
def test_all_files_of_an_output_have_one_schema(tmp_path: Path, records: list[Any], kinds: dict[str, str]) -> None:
    table = parquet(records, tmp_path / "out", bytes_each=1)
    assert {field.name: str(field.type) for field in table.schema} == kinds
    assert table.to_pylist() == [{name: record.get(name) for name in kinds} for record in records]


@pytest.mark.parametrize(
    "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_files_with_one_schema_are_the_same_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    records = [{"x": index if index < 190 else index + 0.5} for index in range(200)]
    made = mh.Dataset.from_records(records, partition_bytes=500).sort_by(lambda record: record["x"])
    alone = made.write(f"{tmp_path}/alone", format="parquet", **ALONE)
    several = made.write(f"{tmp_path}/several", format="parquet", workers=workers, memory="600MiB", progress=False)
    assert alone.digest == several.digest
    assert [(stage.tasks, stage.records) for stage in alone.stages] == [
        (stage.tasks, stage.records) for stage in several.stages
    ]


def differing() -> mh.Dataset:
    return mh.Dataset.from_records([{"x": index // 18 or None} for index in range(20)], partition_bytes=1)


class Stopping(InProcess):
    """Fails at the n-th task that writes a file again."""

    def __init__(self, n: int) -> None:
        super().__init__(2**30)
        self.left = n

    def submit(self, task: Task) -> Future[TaskResult]:
        self.left -= task.schema is not None
        if self.left < 0:
            raise KeyboardInterrupt
        return super().submit(task)


def test_a_job_that_is_stopped_while_files_get_one_schema_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = differing().write(f"{tmp_path}/undisturbed", format="parquet", **ALONE)
    for stopped_at in (0, 3):
        with pytest.raises(mh.Interrupted):
            differing().write(f"{tmp_path}/out", format="parquet", engine=Stopping(stopped_at), progress=False)
    moved: list[str] = []

    def move(source: str, to: str) -> None:
        if len(moved) in (2, 8):
            moved.append("stopped")
            raise KeyboardInterrupt
        moved.append(to)
        os.replace(source, to)

    monkeypatch.setattr(publishing, "move", move)
    for _ in range(2):  # between two renames
        with pytest.raises(mh.Interrupted):
            differing().write(f"{tmp_path}/out", format="parquet", **ALONE)
    assert moved.count("stopped") == 2
    again = differing().write(f"{tmp_path}/out", format="parquet", **ALONE)
    assert (again.digest, again.records) == (undisturbed.digest, 20)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*again.files, "_manifest.json", "_events.jsonl"}


def test_two_ranks_give_all_files_one_schema(tmp_path: Path) -> None:
    undisturbed = differing().write(f"{tmp_path}/alone", format="parquet", **ALONE)
    digests: list[str] = []

    def rank(number: int) -> None:
        written = differing().write(f"{tmp_path}/out", format="parquet", engine=f"rank {number} of 2", **ALONE)
        digests.append(written.digest)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert digests == [undisturbed.digest] * 2


SCRIPT = """
import sys, os, signal
import manyhands as mh
from manyhands.prepare.job import publishing
if sys.argv[2] != "-":
    moves = iter(range(int(sys.argv[2])))
    move = publishing.move
    def killed(source, to):
        if next(moves, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, to)
    publishing.move = killed
made = mh.Dataset.from_records([{"x": index // 18 or None} for index in range(20)], partition_bytes=1)
print(made.write(sys.argv[1], format="parquet", workers=0, progress=False).digest)
"""


def test_a_job_that_is_killed_between_two_renames_publishes_the_right_files(tmp_path: Path) -> None:
    undisturbed = differing().write(f"{tmp_path}/alone", format="parquet", **ALONE)
    command = [sys.executable, "-c", SCRIPT, f"{tmp_path}/out"]
    assert subprocess.run([*command, "9"], timeout=240).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("part-*"))) == 9
    done = subprocess.run([*command, "-"], timeout=240, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == undisturbed.digest
    assert pq.read_table(tmp_path / "out").column("x").to_pylist() == [None] * 18 + [1] * 2


@pytest.mark.parametrize(
    ("early", "late", "kinds"),
    [
        (1, "a", ("int64", "string")),
        (NOON, NOON.replace(tzinfo=UTC), ("timestamp[us]", "timestamp[us, tz=UTC]")),
        (DAY, NOON, ("date32[day]", "timestamp[us]")),
        (1, True, ("int64", "bool")),
        ({"a": 1}, {"a": "b"}, ("struct<a: int64>", "struct<a: string>")),
    ],
)
def test_files_without_a_common_schema_are_refused(
    tmp_path: Path, early: Any, late: Any, kinds: tuple[str, str]
) -> None:
    message = refusal([{"x": early}, {"x": early}, {"x": late}], tmp_path / "out", bytes_each=1)
    assert "the files of the output have no common schema: column 'x'" in message
    assert "write(schema=...)" in message
    assert "part-00000.parquet and part-00002.parquet" in message
    assert all(kind in message for kind in kinds)


def test_an_integer_that_a_float_column_of_another_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    records = [{"x": 2**53 + 1}, {"x": 0.5}]
    assert "column 'x': Integer value 9007199254740993" in refusal(records, tmp_path / "parts", bytes_each=1)
    made = numbers(tmp_path, GROUP + 5).map(lambda index: {"x": index + 2**53 if index < GROUP else 0.5})
    with pytest.raises(mh.DataError, match="column 'x': Integer value 9007199254740993") as caught:
        made.write(f"{tmp_path}/late", format="parquet", **ALONE)
    assert "part-00000.parquet, stage 0, partition 0, record 2" in str(caught.value)


def test_a_late_value_of_another_type_is_refused_with_its_position(tmp_path: Path) -> None:
    made = numbers(tmp_path, 3 * GROUP).map(lambda index: {"x": "text" if index == 2 * GROUP + 7 else index})
    with pytest.raises(mh.DataError, match="column 'x': it has text and whole numbers") as caught:
        made.write(f"{tmp_path}/out", format="parquet", **ALONE)
    assert f"part-00000.parquet, stage 0, partition 0, record {2 * GROUP + 8}" in str(caught.value)
    made = numbers(tmp_path, 2 * GROUP).map(lambda index: {"x": "text" if index >= GROUP else index})
    with pytest.raises(mh.DataError, match="column 'x': int64 and string have no common type") as caught:
        made.write(f"{tmp_path}/out", format="parquet", overwrite=True, **ALONE)
    assert f"records {GROUP + 1} to {2 * GROUP}" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "other", "why"),
    [
        (True, 0.5, "floats and true or false"),
        (1, True, "true or false and whole numbers"),
        ("a", b"b", "bytes and text"),
        (DAY, NOON, "dates and datetimes"),
        (NOON, DAY, "dates and datetimes"),
        (DAY, 5, "dates and whole numbers"),
        (dt.timedelta(1), 5, "time differences and whole numbers"),
        (1, uuid.UUID(int=4), "UUIDs and whole numbers"),
        (NOON, NOON.replace(tzinfo=UTC), "datetimes with a zone and datetimes without one"),
        (dt.time(1), dt.time(1, tzinfo=UTC), "times with a zone"),
        (np.float32(0.5), np.datetime64("2020-01-01"), "NumPy datetimes and floats"),
        ([1], [True], "true or false and whole numbers"),
        ([{"a": "b"}], [{"a": b"b"}], "field 'a': it has bytes and text"),
        ({1: "a"}, {1: "b"}, "keys that are not text"),
        (2**53 + 1, 0.5, "Integer value 9007199254740993"),
    ],
)
def test_values_that_arrow_would_change_are_refused(value: Any, other: Any, why: str) -> None:
    with pytest.raises(BadColumn, match="the records can't be put into columns: column 'x'") as caught:
        table_of([{"x": value}, {"x": None}, {"x": other}])
    assert why in str(caught.value)
    assert caught.value.index in ((0,) if why == "keys that are not text" else (2,))


SCHEMA = [
    (1.7, pa.int64(), "1.7, which is not a whole number"),
    (float("nan"), pa.int64(), "nan, which is not a whole number"),
    (Decimal("1.5"), pa.int64(), "not a whole number"),
    (True, pa.int64(), "true or false"),
    ("1", pa.int64(), "text"),
    (uuid.UUID(int=1), pa.int64(), "UUIDs"),
    (300, pa.int8(), "300"),
    ({"a": 1, "b": 2}, pa.struct([("a", pa.int64())]), "a field 'b', which its type lacks"),
    ([{"a": 1, "b": 2}], pa.list_(pa.struct([("a", pa.int64())])), "a field 'b', which its type lacks"),
    ([1.5], pa.list_(pa.int64()), "not a whole number"),
    (np.array([1.5]), pa.list_(pa.int64()), "not a whole number"),
    (np.array([True]), pa.list_(pa.int64()), "true or false"),
    (b"ab", pa.list_(pa.uint8()), "bytes"),
    ({"a": 1.5}, pa.map_(pa.string(), pa.int64()), "not a whole number"),
    (NOON, pa.date32(), "their times would be lost"),
    (NOON, pa.timestamp("s"), "would lose data"),
    (NOON, pa.timestamp("us", "UTC"), "datetimes without a zone"),
    (NOON.replace(tzinfo=UTC), pa.timestamp("us"), "datetimes with a zone"),
    (dt.time(1, 2, 3, 4), pa.time32("ms"), "would lose data"),
    (dt.timedelta(microseconds=1), pa.duration("s"), "would lose data"),
    (1e300, pa.float32(), "can't hold"),
    (70000, pa.float16(), "can't hold"),
    (2**53 + 1, pa.float64(), "9007199254740993"),
    (2**24 + 1, pa.float32(), "16777217"),
    (Decimal("1.555"), pa.decimal128(9, 2), "data loss"),
    (0.5, pa.timestamp("us"), "floats"),
]


@pytest.mark.parametrize(("value", "kind", "why"), SCHEMA)
def test_values_that_a_schema_cannot_hold_are_refused(value: Any, kind: Any, why: str) -> None:
    with pytest.raises(BadColumn, match="the records can't be put into columns: column 'x'") as caught:
        table_of([{"x": None}, {"x": value}], pa.schema([("x", kind)]))
    assert why in str(caught.value)
    assert caught.value.index == 1


def test_a_value_that_does_not_fit_ends_the_job_with_its_position(tmp_path: Path) -> None:
    message = refusal([{"x": 1}, {"x": 1.7}], tmp_path / "out", schema=pa.schema([("x", pa.int64())]))
    assert "column 'x': it has 1.7, which is not a whole number" in message
    assert "part-00000.parquet, stage 0, partition 0, record 2" in message
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])
    assert "Column 'x' is declared non-nullable" in refusal([{"x": None}], tmp_path / "none", schema=schema)


@pytest.mark.parametrize(
    ("value", "kind", "read"),
    [
        (1.0, pa.int64(), 1),
        (Decimal(3), pa.int64(), 3),
        (0.1, pa.float32(), float(np.float32(0.1))),
        (5, pa.timestamp("us"), dt.datetime(1970, 1, 1, 0, 0, 0, 5)),
        (dt.datetime(2020, 1, 2), pa.date32(), DAY),
        (2**70, pa.decimal128(38, 0), Decimal(2**70)),
        (2**63, pa.uint64(), 2**63),
        ({"a": 1}, pa.map_(pa.string(), pa.int64()), [("a", 1)]),
        ("a", pa.dictionary(pa.int8(), pa.string()), "a"),
        (uuid.UUID(int=1), pa.uuid(), uuid.UUID(int=1)),
        (np.array([7]), pa.list_(pa.uint16()), [7]),
        ([1], pa.list_(pa.float32()), [1.0]),
    ],
)
def test_values_that_a_schema_can_hold_are_written(value: Any, kind: Any, read: Any) -> None:
    table = table_of([{"x": None}, {"x": value}], pa.schema([("x", kind)]))
    assert table.column("x").to_pylist() == [None, read]
    assert table.schema.field("x").type == kind


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1.7], pa.int64(), None),
        ([2.0], pa.int64(), [2]),
        (["00123"], pa.int64(), None),
        (["123"], pa.int64(), [123]),
        ([5], pa.bool_(), None),
        ([1e300], pa.float32(), None),
        ([float("inf"), None], pa.float32(), [float("inf"), None]),
        ([NOON], pa.date32(), None),
        ([NOON], pa.timestamp("us", "Europe/Berlin"), None),
        ([{"a": 1, "b": 2}], pa.struct([("a", pa.int64())]), None),
        ([[300]], pa.list_(pa.int8()), None),
        ([[1], []], pa.list_(pa.int8()), [[1], []]),
    ],
)
def test_tables_are_cast_to_a_schema_without_changes(values: Any, kind: Any, read: Any) -> None:
    given = pa.table({"x": pa.array(values)})
    schema = pa.schema([("x", kind), ("missing", pa.int64())])
    if read is None:
        with pytest.raises(BadColumn, match="the records can't be put into columns: column 'x'"):
            table_of(given, schema)
    else:
        table = table_of(given, schema)
        assert table.to_pydict() == {"x": read, "missing": [None] * len(read)}


def test_tables_of_one_part_keep_their_types(tmp_path: Path) -> None:
    """They became Python values, and short integers 64 bits wide, if one of them differed from the others."""

    def batch(table: pa.Table) -> Any:
        short = table["value"].cast(pa.int32())
        return pa.table({"x": short, "y": pa.nulls(len(table)) if short[0].as_py() == 0 else short})

    made = numbers(tmp_path, 30).map_batches(batch)
    made.write(f"{tmp_path}/out", format="parquet", **ALONE)
    table = pq.read_table(tmp_path / "out")
    assert table.schema.equals(pa.schema([("x", pa.int32()), ("y", pa.int32())]))
    assert table.column("y").to_pylist() == [None] * 10 + list(range(10, 30))


def jsonl(records: list[Any], folder: Path) -> bytes:
    mh.Dataset.from_records(records).write(str(folder), **ALONE)
    return (folder / "part-00000.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"n": 2**70, "f": 1e-7, "t": NOON}, b'{"n":1180591620717411303424,"f":1e-7,"t":"2020-01-02T12:30:15.000250"}'),
        ({"n": -(2**63) - 1, "f": np.float32(0.5)}, b'{"n":-9223372036854775809,"f":0.5}'),
        ({"l": [{"a": 2**64, "é": float("nan")}]}, '{"l":[{"a":18446744073709551616,"é":null}]}'.encode()),
        ({2**70: 1, 5: 2}, b'{"1180591620717411303424":1,"5":2}'),
        ({"s": "a\ud800b", "é": "é"}, '{"s":"a\\ud800b","é":"é"}'.encode()),
        ({"\udc80": 1}, b'{"\\udc80":1}'),
        ([float("inf")], b"[null]"),
    ],
)
def test_a_value_that_orjson_rejects_changes_nothing_beside_it(tmp_path: Path, record: Any, line: bytes) -> None:
    beside = {"f": 1e-7, "t": NOON, "n": 1, "e": float("nan"), 3: "three"}
    lines = jsonl([beside, record, beside], tmp_path / "out").splitlines()
    assert lines[0] == lines[2] == b'{"f":1e-7,"t":"2020-01-02T12:30:15.000250","n":1,"e":null,"3":"three"}'
    assert lines[1] == line


def test_long_integers_lone_surrogates_and_deep_lists_are_read_back(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    records = [{"n": 2**70, "m": -(2**100)}, "a\ud800", {"\udfff": ["\ud800x"]}, {"d": deep}, {"x": 1}]
    jsonl(records, tmp_path / "out")
    assert mh.Dataset.read(f"{tmp_path}/out").take(9, **ALONE) == records


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({1: "a", "1": "b"}, "two keys of a dict are equal as text"),
        ({"x": [{None: 1, "null": 2}]}, "two keys of a dict are equal as text"),
        ({True: 1, "true": 2}, "two keys of a dict are equal as text"),
        ("\ud83d\ude00", "two surrogates in a row"),
        ({"x": b"bytes"}, "bytes"),
        ({"x": Decimal(1)}, "decimal.Decimal"),
    ],
)
def test_records_that_json_would_change_are_refused(tmp_path: Path, record: Any, why: str) -> None:
    with pytest.raises(mh.DataError, match="a record can't be written as JSON") as caught:
        jsonl([{"x": 1}, record], tmp_path / "out")
    assert why in str(caught.value)
    assert "part-00000.jsonl, stage 0, partition 0" in str(caught.value)


@pytest.mark.parametrize("record", ["a\r", "\ud800", "a\nb"])
def test_text_that_would_be_read_back_changed_is_refused(tmp_path: Path, record: str) -> None:
    with pytest.raises(mh.DataError, match="a record can't be written as"):
        mh.Dataset.from_records(["b", record]).write(f"{tmp_path}/out", format="text", **ALONE)


def test_text_is_read_back_as_it_was(tmp_path: Path) -> None:
    records = ["\ufeffbyte order mark", "", "a\rb", "\u2028\x85", " x ", ""]
    mh.Dataset.from_records(records).write(f"{tmp_path}/out", format="text", **ALONE)
    assert mh.Dataset.read(f"{tmp_path}/out").take(9, **ALONE) == records


@pytest.mark.parametrize("tokens", [[1, -1], [2**32], [1.5], [True], ["1"], b"ab", "ab", np.array([1.5]), 5, [[1]]])
def test_tokens_that_would_change_are_refused(tmp_path: Path, tokens: Any) -> None:
    made = mh.Dataset.from_records([{"tokens": [1]}, {"tokens": tokens}])
    with pytest.raises(mh.DataError, match="records can't be written as tokens") as caught:
        made.write(f"{tmp_path}/out", format="tokens", **ALONE)
    assert "part-00000.tokens, stage 0, partition 0, record 2" in str(caught.value)
    with pytest.raises(mh.DataError, match="records can't be written as tokens"):
        made.write(f"{tmp_path}/out", format="tokens", schema=token_schema(100), **ALONE)


def test_tokens_may_be_whole_floats_and_numpy_arrays(tmp_path: Path) -> None:
    records = [{"tokens": tokens} for tokens in ([1.0], np.array([2, 3], np.int64), [4, np.uint8(5)])]
    mh.Dataset.from_records(records).write(f"{tmp_path}/out", format="tokens", **ALONE)
    data = TokenFile(f"{tmp_path}/out", length=4)
    assert (data.documents, data.tokens) == (3, 5)
    written = (tmp_path / "out" / "part-00000.tokens").read_bytes()
    assert np.frombuffer(written, "<u4", 5).tolist() == [1, 2, 3, 4, 5]


def test_the_manifest_names_the_files_that_were_written_again(tmp_path: Path) -> None:
    written = differing().write(f"{tmp_path}/out", format="parquet", **ALONE)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert [file["bytes"] for file in manifest["files"]] == [
        (tmp_path / "out" / name).stat().st_size for name in written.files
    ]


@dataclasses.dataclass
class Hidden:
    """A record with a field that JSON libraries like to drop."""

    a: int
    _b: int


@pytest.mark.parametrize("value", [2, 2**70])
def test_all_fields_of_a_dataclass_are_written(tmp_path: Path, value: int) -> None:
    made = mh.Dataset.from_records([{"x": [Hidden(1, value)]}])
    made.write(str(tmp_path / "out"), workers=0)
    assert (tmp_path / "out" / "part-00000.jsonl").read_text() == f'{{"x":[{{"a":1,"_b":{value}}}]}}\n'
