"""Preparing data: lists and tables, large chunks and small ones, odd values: what comes out is the same and right."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.plan.fingerprint import fingerprint_code
from manyhands.prepare.records.aggregate import MANY

ALONE: dict[str, Any] = {"workers": 0, "progress": False}


def all_of(made: mh.Dataset) -> list[Any]:
    return made.take(10**9, **ALONE)


@pytest.mark.parametrize("first_small", [0, 100], ids=["the same keys", "other keys"])
def test_groups_of_large_and_small_partitions_are_merged(first_small: int) -> None:
    large = [index % 3 for index in range(MANY + 1000)]
    small = [first_small + index % 3 for index in range(1000)]
    made = mh.Dataset.from_records(large + small, partition_bytes=8 * len(large))
    counts = all_of(made.group_by().aggregate(n=mh.Aggregate.count()))
    assert {row["key"]: row["n"] for row in counts} == Counter(large + small)


def test_parquet_has_the_same_bytes_with_any_memory(tmp_path: Path) -> None:
    rows = 60_000
    table = pa.table(
        {
            "k": [index * 7919 % rows for index in range(rows)],
            "t": ["x" * 40 + str(index) for index in range(rows)],
            "v": [None if index % 1000 == 0 else index for index in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5000)
    made = mh.Dataset.read(f"{tmp_path}/in.parquet", partition_bytes=2**19).sort_by("k")
    digests = {
        made.write(f"{tmp_path}/{memory}", format="parquet", engine=InProcess(memory), progress=False).digest
        for memory in (0, 2**27 + 2**23, 2**28, 2**33)
    }
    assert len(digests) == 1


def test_columns_may_have_names_that_arrow_uses_for_its_results(tmp_path: Path) -> None:
    table = pa.table({"x_sum": [10, 20, 10], "count_all": [1, 1, 2], "x": [1, 2, 4]})
    pq.write_table(table, tmp_path / "in.parquet")
    made = mh.Dataset.read(f"{tmp_path}/in.parquet")
    sums = {"n": mh.Aggregate.sum(of="x"), "again": mh.Aggregate.sum(of="x"), "most": mh.Aggregate.maximum(of="x")}
    assert all_of(made.group_by("x_sum").aggregate(**sums)) == [
        {"x_sum": 10, "n": 5, "again": 5, "most": 4},
        {"x_sum": 20, "n": 2, "again": 2, "most": 2},
    ]
    counts = {"n": mh.Aggregate.count(), "again": mh.Aggregate.count()}
    assert all_of(made.group_by("count_all").aggregate(**counts)) == [
        {"count_all": 1, "n": 2, "again": 2},
        {"count_all": 2, "n": 1, "again": 1},
    ]
    assert all_of(made.filter(lambda row: row["x"] > 9).group_by("x").aggregate(**counts)) == []


def test_sums_have_the_same_type_for_all_inputs(tmp_path: Path) -> None:
    for name, most in (("a", 9), ("b", 2**48)):
        values = pa.array([most] + [1] * 999, pa.uint64())
        pq.write_table(
            pa.table({"k": [f"{name}{index}" for index in range(1000)], "x": values}), tmp_path / f"{name}.parquet"
        )
    made = mh.Dataset.read(f"{tmp_path}/*.parquet", partition_bytes=4096)
    written = (
        made.group_by("k").aggregate(n=mh.Aggregate.sum(of="x")).write(f"{tmp_path}/out", format="parquet", **ALONE)
    )
    types = {str(pq.read_schema(f"{tmp_path}/out/{name}").field("n").type) for name in written.files}
    assert types == {"int64"}
    assert len(written.files) > 1


def test_integers_beyond_64_bits_are_exact(tmp_path: Path) -> None:
    lines = ['{"x": 123456789012345678901234567890}', '{"x": -9223372036854775809}', '{"x": 1.5, "y": "0"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    found = [row["x"] for row in all_of(mh.Dataset.read(f"{tmp_path}/in.jsonl"))]
    assert found == [123456789012345678901234567890, -9223372036854775809, 1.5]


def test_records_that_differ_stay_distinct() -> None:
    odd = [{"x": math.inf}, {"x": -math.inf}, {"x": None}, {"x": math.nan}, "1", 1, '{"a":1}', {"a": 1}]
    assert len(all_of(mh.Dataset.from_records(odd + odd).distinct())) == len(odd)


def test_a_row_of_csv_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("t,n\n" + '"' + "word \n" * 400_000 + '",1\nshort,2\n')
    rows = all_of(mh.Dataset.read(f"{tmp_path}/in.csv"))
    assert [(len(row["t"]), row["n"]) for row in rows] == [(2_400_000, "1"), (5, "2")]


def test_metadata_files_are_not_read_as_records(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    mh.Dataset.from_records([{"a": 1}]).write(out, format="jsonl", **ALONE)
    assert all_of(mh.Dataset.read(f"{out}/*.jsonl")) == [{"a": 1}]
    assert {"job started", "stage started", "stage done", "published"} == {
        row["event"] for row in all_of(mh.Dataset.read(f"{out}/_events.jsonl"))
    }


class Seen(mh.Listener):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, facts: Any) -> None:
        self.events.append({"event": name, **facts})


class Raises(mh.Listener):
    def event(self, name: str, facts: Any) -> None:
        raise RuntimeError("sorry\nand more")


def test_listeners_get_the_events_of_a_job_and_a_failing_one_is_removed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen, out = Seen(), tmp_path / "out"
    numbers = mh.Dataset.from_records([{"a": 2}, {"a": 1}]).sort_by("a")
    first = numbers.write(str(out), format="jsonl", listeners=[Raises(), seen], **ALONE)
    written = [json.loads(line) for line in (out / "_events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in seen.events] == [event["event"] for event in written]
    assert seen.events == written
    assert seen.events[-1]["digest"] == first.digest
    assert (
        capfd.readouterr().err.count(
            "the listener Raises failed, and the job continues without it: RuntimeError: sorry\n"
        )
        == 1
    )
    failed = Seen()
    with pytest.raises(mh.DataError):
        numbers.map(lambda row: row["b"]).write(str(tmp_path / "bad"), listeners=[failed], **ALONE)
    assert [failed.events[0]["event"], failed.events[-1]["event"]] == ["job started", "job failed"]
    for wrong in (Seen, print):
        with pytest.raises(mh.ConfigError, match="has no method event"):
            numbers.write(str(tmp_path / "wrong"), listeners=[wrong], **ALONE)


def test_records_that_columns_cannot_hold_are_refused(tmp_path: Path) -> None:
    for number, records in enumerate(([{}, {}], [{1: "x", "1": "y"}])):
        with pytest.raises(mh.DataError, match="the records can't be put into columns"):
            mh.Dataset.from_records(records).write(f"{tmp_path}/{number}", format="parquet", **ALONE)


def test_a_dictionary_encoded_column_can_be_a_key(tmp_path: Path) -> None:
    table = pa.table({"k": pa.array(["b", "a", "b"]).dictionary_encode(), "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert [row["n"] for row in all_of(mh.Dataset.read(f"{tmp_path}/in.parquet").sort_by("k"))] == [2, 1, 3]


@dataclass
class Adds:
    amount: int

    def __call__(self, value: int) -> int:
        return value + self.amount


def changed_call(self: Adds, value: int) -> int:
    return value - self.amount


class Has:
    @property
    def part(self) -> int:
        return 1

    @classmethod
    def made(cls) -> int:
        return 1

    LIMIT = 1


@pytest.mark.parametrize(
    ("kind", "member", "other"),
    [
        (Adds, "__call__", changed_call),
        (Has, "part", property(lambda self: 2)),
        (Has, "made", classmethod(lambda cls: 2)),
        (Has, "LIMIT", 2),
    ],
)
def test_a_changed_class_is_another_job(
    monkeypatch: pytest.MonkeyPatch, kind: type, member: str, other: Callable[..., Any]
) -> None:
    made = Adds(1) if kind is Adds else lambda value: (kind, value)
    before = fingerprint_code(made)
    assert fingerprint_code(made) == before
    monkeypatch.setattr(kind, member, other)
    assert fingerprint_code(made) != before


def test_a_changed_module_beside_the_script_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_the_script.py").write_text("def f(x):\n    return x\n")
    module = importlib.import_module("beside_the_script")

    def uses(value: int) -> Any:
        return module.f(value)

    before = fingerprint_code(uses)
    (tmp_path / "beside_the_script.py").write_text("def f(x):\n    return -x\n")
    assert fingerprint_code(uses) != before
