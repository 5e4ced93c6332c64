"""Preparing data: keys have one total order, and every record that enters a shuffle leaves it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import total_ordering
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.io import run_file
from manyhands.prepare.job.stages import StageResult, run_stages
from manyhands.prepare.records.key_order import DURATION, TIME, FineTime, group_keys, ordered_keys, time_of
from manyhands.prepare.records.keys import KeyedLists
from manyhands.prepare.records.pipeline import BadKey
from manyhands.prepare.shuffle import reduce

ALONE: dict[str, Any] = {"workers": 0, "progress": False}
TIGHT = InProcess(0)  # ranges are worked on a few blocks at a time
COUNT = mh.Aggregate.count()
ENDS_OF_SUMMER = {"Europe/Berlin": 1698537600, "America/New_York": 1699156800}  # two hours before the clock goes back


def all_of(made: mh.Dataset) -> list[Any]:
    return made.take(10**9, engine=TIGHT, progress=False)


def times(zone: str, count: int = 240, step: int = 60) -> list[datetime]:
    """One a minute over the hours around the end of summer time."""
    return [datetime.fromtimestamp(ENDS_OF_SUMMER[zone] + step * i, ZoneInfo(zone)) for i in range(count)]


def as_records(records: list[dict[str, Any]], folder: Path) -> mh.Dataset:
    return mh.Dataset.from_records(records, partition_bytes=2**10)


def as_table(records: list[dict[str, Any]], folder: Path) -> mh.Dataset:
    path = folder / "in.parquet"
    pq.write_table(pa.table({name: [row[name] for row in records] for name in records[0]}), path, row_group_size=80)
    return mh.Dataset.read(str(path), partition_bytes=2**10)


@pytest.mark.parametrize("zone", ENDS_OF_SUMMER)
@pytest.mark.parametrize("made_by", [as_records, as_table])
def test_an_hour_that_comes_twice_is_two_hours(
    made_by: Callable[[list[dict[str, Any]], Path], mh.Dataset], zone: str, tmp_path: Path
) -> None:
    rows = [{"t": time, "i": index} for index, time in enumerate(times(zone))]
    random.Random(0).shuffle(rows)
    made = made_by(rows, tmp_path)
    ordered = [row["i"] for row in all_of(made.sort_by("t"))]
    assert ordered == list(range(240))
    assert [row["i"] for row in all_of(made.sort_by("t", descending=True))] == ordered[::-1]
    assert [row["i"] for row in all_of(made.sort_by(lambda row: [row["t"], 0]))] == ordered
    assert len(all_of(made.distinct("t"))) == 240
    pairs = all_of(made.join(made.filter(lambda row: True), on="t"))
    assert [left["i"] for left, right in pairs] == [right["i"] for left, right in pairs] == ordered
    groups = all_of(made.group_by("t").aggregate(n=COUNT, i=mh.Aggregate.sum(of="i")))
    assert [(row["t"].timestamp(), row["n"], row["i"]) for row in groups] == [
        (ENDS_OF_SUMMER[zone] + 60 * index, 1, index) for index in ordered
    ]
    assert {row["t"].tzinfo for row in groups} == {ZoneInfo(zone)}  # the result shows the zone of the records
    pairs_of_columns = all_of(made.group_by(["t", "i"]).aggregate(n=COUNT))
    assert [(row["i"], row["n"]) for row in pairs_of_columns] == [(index, 1) for index in ordered]


def test_no_record_is_lost_around_the_end_of_summer_time_with_any_memory_and_workers(tmp_path: Path) -> None:
    count = 30_000
    seconds = [ENDS_OF_SUMMER["Europe/Berlin"] * 1000 + 480 * (index * 7919 % count) for index in range(count)]
    table = pa.table({"t": pa.array(seconds, pa.timestamp("ms", "Europe/Berlin")), "i": range(count)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5000)
    made = mh.Dataset.read(str(tmp_path / "in.parquet"), partition_bytes=2**17).sort_by("t")
    digests = set()
    for number, options in enumerate(({"engine": TIGHT}, {"engine": InProcess(2**27 + 2**22)}, {"workers": 2})):
        summary = made.write(str(tmp_path / f"out-{number}"), format="parquet", progress=False, **options)  # type: ignore[arg-type]
        assert summary.records == count
        digests.add(summary.digest)
    assert len(digests) == 1
    written = pa.concat_tables(pq.read_table(tmp_path / "out-0" / name) for name in summary.files)
    assert written.column("t").cast(pa.int64()).to_pylist() == sorted(seconds)


def test_the_same_instants_in_several_units_and_zones_are_the_same_keys(tmp_path: Path) -> None:
    stamps = [1699164000, 1699164001, 1699167600]
    found = []
    for unit, factor in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        for zone in ("UTC", "America/New_York", "+05:30"):
            values = pa.array([stamp * factor for stamp in stamps * 2], pa.timestamp(unit, zone))
            path = tmp_path / f"{unit}-{zone.replace('/', '-')}.parquet"
            pq.write_table(pa.table({"t": values}), path, version="2.6")
            found.append(mh.Dataset.read(str(path)))
    for made in found:
        groups = all_of(made.group_by("t").aggregate(n=COUNT))
        assert [(row["t"].timestamp(), row["n"]) for row in groups] == [(stamp, 2) for stamp in stamps]
        joined = found[0].map(lambda row: row["t"]).join(made.map(lambda row: row["t"]), on=lambda time: time)
        assert [left.timestamp() == right.timestamp() for left, right in all_of(joined)] == [True] * 12
    seconds, nanoseconds = found[1], found[-1]
    counted = seconds.join(nanoseconds, on="t").map(lambda pair: 1)
    assert counted.count(**ALONE) == 12


NANOSECONDS = {
    "time stamp": pa.timestamp("ns"),
    "zone": pa.timestamp("ns", "Europe/Berlin"),
    "time of day": pa.time64("ns"),
    "duration": pa.duration("ns"),
}


@pytest.mark.parametrize("kind", NANOSECONDS.values(), ids=NANOSECONDS)
def test_keys_that_differ_by_a_nanosecond_are_kept_apart(kind: Any, tmp_path: Path) -> None:
    count = 400
    values = [10**9 + index * 7919 % count // 2 for index in range(count)]  # each of them twice
    table = pa.table({"k": pa.array(values, pa.int64()).cast(kind), "i": range(count)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=100, version="2.6")
    made = mh.Dataset.read(str(tmp_path / "in.parquet"), partition_bytes=2**11)
    digests = set()
    for number, engine in enumerate((TIGHT, InProcess(2**30))):
        summary = made.sort_by("k").write(f"{tmp_path}/{number}", format="parquet", engine=engine, progress=False)
        digests.add(summary.digest)
    assert len(digests) == 1
    assert len(summary.files) > 1
    written = pa.concat_tables(pq.read_table(f"{tmp_path}/0/{name}") for name in summary.files)
    assert written.column("k").cast(pa.int64()).to_pylist() == sorted(values)
    with pytest.raises(mh.DataError, match="Python can't show exactly") as caught:
        made.group_by("k").aggregate(n=COUNT).count(**ALONE)
    assert "in.parquet, row " in str(caught.value.where)


def test_whole_microseconds_in_nanosecond_columns_are_shown(tmp_path: Path) -> None:
    """Without pandas, and with it, which would turn them into its own types."""
    expected = [
        (pa.timestamp("ns"), datetime(1970, 1, 1, 0, 0, 1)),
        (pa.timestamp("ns", "Europe/Berlin"), datetime(1970, 1, 1, 1, 0, 1, tzinfo=ZoneInfo("Europe/Berlin"))),
        (pa.time64("ns"), (datetime.min + timedelta(seconds=1)).time()),
        (pa.duration("ns"), timedelta(seconds=1)),
    ]
    for kind, value in expected:
        pq.write_table(pa.table({"k": pa.array([10**9] * 3, pa.int64()).cast(kind)}), tmp_path / "in.parquet")
        made = mh.Dataset.read(str(tmp_path / "in.parquet")).group_by("k").aggregate(n=COUNT)
        (row,) = all_of(made)
        assert row == {"k": value, "n": 3}
        assert type(row["k"]) is type(value)


def test_years_beyond_9999_are_sorted(tmp_path: Path) -> None:
    seconds = [10**12 - index * 7919 % 300 for index in range(300)]
    pq.write_table(pa.table({"k": pa.array(seconds, pa.timestamp("s"))}), tmp_path / "in.parquet", row_group_size=50)
    made = mh.Dataset.read(str(tmp_path / "in.parquet"), partition_bytes=512)
    written = made.sort_by("k").write(f"{tmp_path}/out", format="parquet", **ALONE)
    table = pa.concat_tables(pq.read_table(f"{tmp_path}/out/{name}") for name in written.files)
    assert table.column("k").cast(pa.timestamp("s")).cast(pa.int64()).to_pylist() == sorted(seconds)
    with pytest.raises(mh.DataError, match="Python can't show exactly"):
        made.group_by("k").aggregate(n=COUNT).count(**ALONE)


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()], ids=str)
def test_dates_beyond_9999_are_sorted(kind: Any, tmp_path: Path) -> None:
    days = [2**30 - n * 7 % 50 if n % 2 else n * 7 % 50 for n in range(100)]
    table = pa.table({"k": pa.array(days, pa.int32()).cast(pa.date32()).cast(kind), "i": range(100)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=20)
    made = mh.Dataset.read(str(tmp_path / "in.parquet"), partition_bytes=512)
    written = made.sort_by("k").write(f"{tmp_path}/out", format="parquet", **ALONE)
    found = pa.concat_tables(pq.read_table(f"{tmp_path}/out/{name}") for name in written.files)
    assert found.column("k").cast(pa.date32()).cast(pa.int32()).to_pylist() == sorted(days)
    for job in (made.group_by("k").aggregate(n=COUNT), made.distinct("k")):
        with pytest.raises(mh.DataError, match="Python can't show exactly"):
            job.count(**ALONE)
        assert job.count(max_bad_records=50, **ALONE) == len({day for day in days if day < 2**29})
    joined = made.join(made, on="k")
    assert joined.count(max_bad_records=100, **ALONE) == 50 * 50 // len({day for day in days if day < 2**29})


def odd_columns() -> dict[str, tuple[Any, list[Any]]]:
    """Columns of 40 values, each of them twice, with types that Arrow can't sort or rearrange, and the sorted keys."""
    numbers = [index * 7 % 20 for index in range(40)]
    ordered = sorted(numbers)
    texts = [f"{number:02}" for number in numbers]
    return {
        "float16": (pa.array(np.array(numbers, np.float16)), [float(number) for number in ordered]),
        "string_view": (pa.array(texts, pa.string_view()), sorted(texts)),
        "binary_view": (pa.array([t.encode() for t in texts], pa.binary_view()), [t.encode() for t in sorted(texts)]),
        "large_string": (pa.array(texts, pa.large_string()), sorted(texts)),
        "dictionary": (pa.array(texts).dictionary_encode(), sorted(texts)),
        "run_end_encoded": (pa.RunEndEncodedArray.from_arrays(list(range(1, 41)), numbers), ordered),
        "decimal32": (pa.array([Decimal(n) for n in numbers], pa.decimal32(5)), [Decimal(n) for n in ordered]),
        "decimal256": (pa.array([Decimal(n) for n in numbers], pa.decimal256(50)), [Decimal(n) for n in ordered]),
        "uuid": (pa.array([UUID(int=n).bytes for n in numbers], pa.uuid()), [UUID(int=n) for n in ordered]),
        "date64": (
            pa.array([number * 86_400_000 + 5 for number in numbers], pa.date64()),
            [date(1970, 1, 1) + timedelta(days=number) for number in ordered],
        ),
        "time32": (
            pa.array(numbers, pa.time32("s")),
            [(datetime.min + timedelta(seconds=number)).time() for number in ordered],
        ),
    }


@pytest.mark.parametrize("name", odd_columns())
def test_columns_of_every_type_with_an_order_are_keys(name: str) -> None:
    column, expected = odd_columns()[name]
    # The second column has a type that can't be rearranged either, and isn't a key.
    table = pa.table({"k": column, "other": pa.array(["x"] * 40, pa.string_view())})
    made = mh.Dataset.from_records([{"from": n} for n in range(0, 40, 8)], partition_bytes=24).map_batches(
        lambda batch: pa.concat_tables([table.slice(start.as_py(), 8) for start in batch.column("from")])
    )
    assert [row["k"] for row in all_of(made.sort_by("k"))] == expected
    assert [row["k"] for row in all_of(made.sort_by("k", descending=True))] == expected[::-1]
    counted = all_of(made.group_by("k").aggregate(n=COUNT, x=mh.Aggregate.first(of="other")))
    assert [(row["k"], row["n"]) for row in counted] == [(key, 2) for key in expected[::2]]
    assert all_of(made.group_by("k").aggregate(n=COUNT)) == [{"k": key, "n": 2} for key in expected[::2]]
    assert made.join(made.map_batches(lambda batch: batch), on="k").count(**ALONE) == 80
    assert len(all_of(made.distinct("k"))) == 20


ORDERLESS = {
    "list": pa.array([[2], [1]]),
    "list_view": pa.array([[2], [1]], pa.list_view(pa.int64())),
    "fixed_size_list": pa.array([[2], [1]], pa.list_(pa.int64(), 1)),
    "struct": pa.array([{"a": 2}, {"a": 1}]),
    "map": pa.array([[("a", 1)], [("b", 1)]], pa.map_(pa.string(), pa.int64())),
    "interval": pa.array([(1, 2, 3), (0, 1, 2)], pa.month_day_nano_interval()),
}


@pytest.mark.parametrize("name", ORDERLESS)
def test_key_columns_without_an_order_are_refused_with_column_file_and_row(name: str, tmp_path: Path) -> None:
    table = pa.table({"k": ORDERLESS[name]})
    made = mh.Dataset.from_records([0]).map_batches(lambda batch: table)
    if name not in ("interval", "list_view"):  # Parquet has no such types
        pq.write_table(table, tmp_path / "in.parquet")
        made = mh.Dataset.read(str(tmp_path / "in.parquet"))
    for job in (made.sort_by("k"), made.join(made, on="k"), made.group_by("k").aggregate(n=COUNT)):
        with pytest.raises(mh.DataError, match=r"the key column 'k' has the type .* which has no order") as caught:
            job.count(**ALONE)
        assert name in ("interval", "list_view") or str(caught.value.where).endswith("in.parquet, row 1")


NAN = float("nan")


@dataclass(frozen=True, order=True)
class Point:
    """Ordered by its fields."""

    x: Any
    y: Any = 0


WITHOUT_ORDER: dict[str, tuple[Any, str]] = {
    "frozenset": (frozenset({1}), "a set"),
    "set": ({1}, "a set"),
    "keys of a dict": ({1: 2}.keys(), "a set"),
    "frozenset in a tuple": ((1, frozenset({2})), "a set"),
    "dict": ({"a": 1}, "a dict"),
    "counter": (Counter("ab"), "a dict"),
    "complex": (1j, "a complex number"),
    "NumPy complex": (np.complex64(1j), "a complex number"),
    "array": (np.arange(2), "a NumPy value"),
    "NaN": (NAN, "NaN"),
    "NaN in a tuple": ((1, NAN), "NaN"),
    "NaN in a tuple in a tuple": ((1, (2, NAN)), "NaN"),
    "NaN in a list": ([1, NAN], "NaN"),
    "NaN in a dataclass": (Point(1, NAN), "NaN"),
    "NaN in a dataclass in a tuple": ((1, Point((NAN,))), "NaN"),
    "NumPy NaN": (np.float32("nan"), "NaN"),
    "NaT": (np.datetime64("NaT"), "NaN"),
    "decimal NaN": (Decimal("nan"), "NaN"),
    "signaling NaN": ((1, Decimal("snan")), "NaN"),
    "None in a tuple in a tuple": ((1, (None,)), "None"),
    "None in a dataclass": (Point(None), "None"),
}


@pytest.mark.parametrize("name", WITHOUT_ORDER)
def test_keys_without_a_total_order_are_refused(name: str) -> None:
    key, what = WITHOUT_ORDER[name]
    with pytest.raises(BadKey, match=f"the key is {what}"):
        ordered_keys([key])
    with pytest.raises(BadKey, match=f"the key is {what}"):
        group_keys([(1, 2), key])


@pytest.mark.parametrize("key", [frozenset, lambda record: (NAN, len(record))], ids=["frozenset", "NaN in a tuple"])
def test_keys_without_a_total_order_end_the_job_with_the_record(key: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("ab\nbc\nca\n" * 40)
    made = mh.Dataset.read(str(tmp_path / "in.txt"), partition_bytes=100)
    jobs = [made.sort_by(key), made.distinct(key), made.join(made, on=key), made.group_by(key).aggregate(n=COUNT)]
    for job in jobs:
        with pytest.raises(mh.DataError, match=r"the key is (a set|NaN)") as caught:
            job.count(**ALONE)
        assert "in.txt, line " in str(caught.value.where)


def test_keys_compare_like_the_values_that_they_stand_for() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    first = datetime(2023, 10, 29, 2, 30, tzinfo=berlin)
    keys = [first, first.replace(fold=1), first.replace(fold=1).astimezone(UTC), first.astimezone(timezone.min)]
    ordered = ordered_keys(keys)
    assert [ordered[0] < ordered[1], ordered[1] == ordered[2], ordered[0] == ordered[3]] == [True] * 3
    assert len(set(ordered)) == len(set(group_keys(keys))) == 2
    # NumPy itself says that each of these equals its neighbour.
    assert (
        len(set(group_keys([np.float64(2**53), 2**53 + 1])))
        == len(set(group_keys([np.int64(2**53 + 1), 2.0**53])))
        == 2
    )
    assert len(set(group_keys([np.int8(1), np.float32(1), 1, True, Fraction(1), Decimal(1)]))) == 1
    assert (
        ordered_keys([np.datetime64("2020-01-01", "D"), np.datetime64("2020-01-01T00", "ns")])
        == [datetime(2020, 1, 1)] * 2
    )
    late, fine = np.datetime64(10**12, "s"), np.datetime64(10**9 + 1, "ns")
    assert ordered_keys([late, fine]) == [FineTime(TIME, 10**21), FineTime(TIME, 10**9 + 1)]
    assert datetime(1970, 1, 1, 0, 0, 1) < FineTime(TIME, 10**9 + 1) < datetime(1970, 1, 1, 0, 0, 1, 1)
    assert time_of(DURATION, 1000) == timedelta(microseconds=1) < FineTime(DURATION, 1001)
    assert ordered_keys([[1, [2]], (1, (2,))]) == [(1, (2,))] * 2
    with pytest.raises(BadKey, match="lies outside of the years 1 to 9999 in UTC"):
        ordered_keys([datetime(1, 1, 1, tzinfo=berlin)])


def test_a_naive_datetime_beside_one_with_a_zone_is_an_error() -> None:
    times = [datetime(2023, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")), datetime(2023, 1, 1)] * 50
    made = mh.Dataset.from_records(times, partition_bytes=64)
    for job in (made.sort_by(), made.group_by().aggregate(n=COUNT), made.join(made.map(lambda time: time), on=None)):
        with pytest.raises(mh.DataError, match="can't compare offset-naive and offset-aware"):
            job.count(**ALONE)


@dataclass(frozen=True)
class Hand:
    """Rock, paper, scissors: each is less than another one."""

    shape: int

    def __lt__(self, other: Hand) -> bool:
        return (other.shape - self.shape) % 3 == 1


class Nameless:
    """Has an order, but two objects of equal value are not equal."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __lt__(self, other: Nameless) -> bool:
        return self.value < other.value


@total_ordering
class Version:
    """Has an order and no hash, as usual with `total_ordering`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self.value == other.value

    def __lt__(self, other: Version) -> bool:
        return self.value < other.value

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("key", [Hand, Nameless])
def test_a_class_whose_order_contradicts_itself_is_refused(key: Callable[[int], Any]) -> None:
    made = mh.Dataset.from_records([index * 7 % 3 for index in range(150)], partition_bytes=400)
    jobs = [made.sort_by(key), made.group_by(key).aggregate(n=COUNT), made.join(made.map(lambda x: x), on=key)]
    for job in jobs:
        with pytest.raises(mh.DataError, match=r"keys have no total order|records were lost or duplicated"):
            job.count(engine=TIGHT, progress=False)


def test_classes_with_an_order_are_keys() -> None:
    numbers = [index * 7919 % 100 for index in range(200)]
    made = mh.Dataset.from_records(numbers, partition_bytes=400)
    for key in (Version, Point, lambda number: [Point(number)], lambda number: UUID(int=number)):
        assert all_of(made.sort_by(key)) == sorted(numbers)
    assert [row["key"] for row in all_of(made.group_by(Point).aggregate(n=COUNT))] == [Point(n) for n in range(100)]
    assert [row["n"] for row in all_of(made.group_by(lambda n: [n]).aggregate(n=COUNT))] == [2] * 100
    assert made.join(made.map(lambda x: x), on=lambda n: [n]).count(**ALONE) == 400
    with pytest.raises(mh.DataError, match="a key is not hashable"):
        made.join(made.map(lambda x: x), on=Version).count(**ALONE)


class Raises:
    """Can't be compared."""

    def __lt__(self, other: object) -> bool:
        raise ZeroDivisionError("no")


def test_an_error_in_a_comparison_names_the_task() -> None:
    with pytest.raises(mh.DataError, match="keys can't be compared: ZeroDivisionError: no") as caught:
        mh.Dataset.from_records([1, 2]).sort_by(lambda _: Raises()).count(**ALONE)
    assert caught.value.where == "stage 0, partition 0"


# Each of these drops or repeats a record somewhere in a shuffle.


def skipping(count_before: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    """Every other cut lies one record too late: where a part starts is no longer where the one before it stops."""
    calls = iter(range(10**9))
    return lambda keyed, cut: min(len(keyed), count_before(keyed, cut) + next(calls) % 2)


def shifting(count_before: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    """All cuts lie one record too early, so equal keys end up in two parts."""
    return lambda keyed, cut: max(0, count_before(keyed, cut) - 1)


@pytest.mark.parametrize("wrong", [skipping, shifting])
@pytest.mark.parametrize("job", ["sort", "group", "join", "inner join with nothing"])
def test_a_shuffle_that_loses_a_record_publishes_nothing(
    job: str, wrong: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mh.Dataset.from_records([index * 7919 % 1000 for index in range(3000)], partition_bytes=2**14)
    jobs = {
        "sort": made.sort_by(),
        "group": made.group_by().aggregate(all=mh.Aggregate.collect()),
        "join": made.join(made.map(lambda x: x), on=None),
        "inner join with nothing": made.join(made.filter(lambda x: x == 3), on=None),
    }
    monkeypatch.setattr(KeyedLists, "count_before", wrong(KeyedLists.count_before))
    out = tmp_path / "out"
    with pytest.raises(mh.DataError, match=r"records were lost or duplicated|keys have no total order"):
        jobs[job].write(str(out), engine=TIGHT, progress=False)
    assert not [path.name for path in out.iterdir() if path.name.startswith(("part-", "_manifest"))]
    with pytest.raises(mh.DataError, match=r"records were lost or duplicated|keys have no total order"):
        all_of(jobs[job])


def forgetting_a_block(overlaps: Callable[..., bool]) -> Callable[..., bool]:
    return lambda block, start, stop: overlaps(block, start, stop) and block.offset != 0


def forgetting_a_file(read_index: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda path: [] if path.endswith("part-00001.runs") else read_index(path)


def test_a_task_that_misses_a_block_or_a_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = mh.Dataset.from_records([index * 7919 % 1000 for index in range(2000)], partition_bytes=4000).sort_by()
    with monkeypatch.context() as patch:
        patch.setattr(run_file.Block, "overlaps", forgetting_a_block(run_file.Block.overlaps))
        with pytest.raises(mh.DataError, match="records were lost or duplicated") as caught:
            made.write(str(tmp_path / "out"), **ALONE)
        assert caught.value.where == "stage 1, which reads stage 0"
        assert caught.value.expected == "2000 records"
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "read_index", forgetting_a_file(reduce.read_index))
        with pytest.raises(mh.DataError, match="records were lost or duplicated"):
            made.count(**ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(reduce.Sorted, "_records", lambda self, keyed: keyed.chunk[1:])
        with pytest.raises(mh.DataError, match="records were lost or duplicated") as caught:
            made.count(**ALONE)
        assert str(caught.value.where).startswith("stage 1, partition ")


def test_a_run_that_is_not_sorted_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mh.Dataset.from_records([index * 7919 % 1000 for index in range(2000)], partition_bytes=4000).sort_by()
    monkeypatch.setattr(KeyedLists, "in_order", lambda self, descending=False: self)
    with pytest.raises(mh.DataError, match="keys have no total order"):
        made.count(**ALONE)


def test_a_manifest_whose_counts_do_not_add_up_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(StageResult):
        """Says that one record more was written."""

        @property
        def records(self) -> int:
            return sum(result.records for result in self.results) + 1

    def forgetful(*arguments: Any) -> list[StageResult]:
        return [Forgetful(**vars(stage)) for stage in run_stages(*arguments)]

    monkeypatch.setattr("manyhands.prepare.job.output.run_stages", forgetful)
    with pytest.raises(mh.DataError, match="records were lost or duplicated"):
        mh.Dataset.from_records(range(10)).write(str(tmp_path / "out"), **ALONE)
    assert not (tmp_path / "out" / "_manifest.json").exists()
